import pytest

from jsurgery.wan.model_config import WanConfig


@pytest.fixture(scope="module")
def teacher(random_transformer):
    """A transformer with two blocks of two heads of width 8, and random weights."""
    return random_transformer(
        WanConfig(
            num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, text_dim=6, freq_dim=8,
            ffn_dim=16, num_layers=2,
        )
    )  # fmt: skip
