"""The size of a video in latents and in tokens, and whether a model takes it.

The VAE turns pixels into latents (`strides`), the transformer turns patches of latents into tokens.
"""

from jsurgery.attention.rope import check_grid
from jsurgery.errors import InputError
from jsurgery.wan.model_config import WanConfig

WAN_2_1 = WanConfig()


def latent_grid(
    frames: int, height: int, width: int, strides: tuple[int, int, int] = WAN_2_1.strides
) -> tuple[int, int, int]:
    """(T, H, W) of the latents of a video of `frames` x `height` x `width` pixels."""
    t, h, w = strides
    return (frames - 1) // t + 1, height // h, width // w


def num_tokens(frames: int, height: int, width: int, network: WanConfig = WAN_2_1) -> int:
    """Tokens of a video of `frames` x `height` x `width` pixels.

    Raises InputError for a size that the strides of the VAE and the patches do not divide.
    """
    tokens = 1
    sizes = zip(
        ("frames", "height", "width"),
        (frames, height, width),
        (1, 0, 0),  # the first frame has a latent frame of its own; the strides divide the others
        network.patch_size,
        network.strides,
        strict=True,
    )
    for name, size, first, patch, stride in sizes:
        latent, rest = divmod(size - first, stride)
        latent += first
        if size < 1 or rest or latent % patch:
            form = f"{stride}k + 1" if first else f"a multiple of {stride * patch}"
            raise InputError(f"{name}: expected {form}, found {size}")
        tokens *= latent // patch
    return tokens


def check_size(config: WanConfig, frames: int, height: int, width: int) -> None:
    """Raises InputError for a video that strides and patches do not divide, or that RoPE's table is too short for."""
    num_tokens(frames, height, width, config)
    grid = config.token_grid(latent_grid(frames, height, width, config.strides))
    check_grid(grid, config.rope_max_seq_len)
