import json

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from flax import nnx

from jsurgery.attention.feature_maps import FeatureMapConfig, LearnedMaps
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.errors import InputError
from jsurgery.io.safetensors import read_tensors, write_shards
from jsurgery.surgery.distillation.saved_maps import load_maps, save_maps
from jsurgery.surgery.operate import operate, save_model, save_operated
from jsurgery.wan import checkpoint_layouts
from jsurgery.wan.checkpoint import load_transformer, save_transformer
from jsurgery.wan.model_config import WanConfig
from pallas_kernels.feature_map import init_polynomial_map

BLOCKS, HEADS, WIDTH = 4, 2, 6
RATES = (2, 8, "linear")
PLAN = (8, 1, "linear", 2)
PHI = FeatureMapConfig(degree=3, layers=2, activation="softplus")


@pytest.fixture(scope="module")
def teacher(random_transformer):
    return random_transformer(
        WanConfig(
            num_attention_heads=HEADS, attention_head_dim=WIDTH, in_channels=3, out_channels=3, text_dim=6, freq_dim=8,
            ffn_dim=16, num_layers=BLOCKS,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def maps():
    """phi_q and phi_k of every block and rate, all different."""
    rng = np.random.default_rng(1)
    make = lambda key: init_polynomial_map(key, HEADS, WIDTH, PHI.degree, PHI.layers, PHI.activation)
    shapes = jax.eval_shape(make, jax.random.key(0))
    draw = lambda leaf: rng.normal(size=(BLOCKS, len(RATES), *leaf.shape)).astype(np.float32)
    return jax.tree.map(draw, LearnedMaps(shapes, shapes))


@pytest.fixture(scope="module")
def file(maps, tmp_path_factory):
    path = epath.Path(tmp_path_factory.mktemp("distill")) / "feature_maps.safetensors"
    save_maps(path, maps, RATES, range(BLOCKS))
    return path


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def chosen(maps, plan):
    """The maps of the blocks that the plan converts."""
    indices = [(block, RATES.index(rate)) for block, rate in enumerate(plan) if rate != 1]
    return jax.tree.map(lambda leaf: np.stack([leaf[index] for index in indices]), maps)


@pytest.mark.parametrize("plan", [PLAN, (1, 1, 2, 1), (2, 2, 2, 2)])
def test_a_plan_gets_the_maps_of_its_blocks_and_rates(maps, file, plan):
    assert_equal(load_maps(file, plan, PHI), chosen(maps, plan))


def test_an_all_softmax_plan_needs_no_maps(file):
    assert load_maps(file, (1,) * BLOCKS, PHI) is None


def test_a_rate_that_was_not_distilled_is_refused(file):
    with pytest.raises(InputError, match=r"feature_maps.safetensors: holds no blocks.2.rate_4.phi_q"):
        load_maps(file, (1, 1, 4, 1), PHI)


def parameters(model):
    return {".".join(map(str, path)): param.get_value() for path, param in nnx.to_flat_state(nnx.state(model))}


def test_the_hybrid_shares_the_weights_of_the_teacher(teacher, maps, file, tmp_path):
    before = parameters(teacher)
    operated = operate(teacher, HybridConfig(PLAN, feature_map=PHI), load_maps(file, PLAN, PHI))
    assert_equal((operated.query_maps.maps, operated.key_maps.maps), chosen(maps, PLAN).pair)
    after = {path: leaf for path, leaf in parameters(operated).items() if "_maps" not in path}
    assert after.keys() == before.keys()
    assert all(after[path] is before[path] for path in before), "copied"

    assert teacher.config.hybrid is None and not hasattr(teacher, "query_maps")
    assert parameters(teacher).keys() == before.keys()

    save_model(operated, epath.Path(tmp_path), "somewhere/wan")
    loaded = load_transformer(tmp_path)
    assert loaded.config == operated.config
    assert_equal(parameters(loaded), parameters(operated))
    assert json.loads((tmp_path / "config.json").read_text())["base_pipeline"] == "somewhere/wan"


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("linear_branch", [True, False])
def test_operating_on_files_gives_the_same_files(teacher, file, tmp_path, layout, linear_branch):
    plan = HybridConfig(PLAN, feature_map=PHI, linear_branch=linear_branch)
    maps = load_maps(file, PLAN, PHI)
    save_transformer(teacher, tmp_path / "teacher", layout)
    save_model(operate(load_transformer(tmp_path / "teacher"), plan, maps), tmp_path / "expected", "somewhere/wan")
    save_operated(tmp_path / "teacher", plan, maps, tmp_path / "found", "somewhere/wan")
    files = {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "found").iterdir()} == files
    assert len(files) == 3


def test_operating_on_files_keeps_their_types_and_loads_no_model(teacher, file, tmp_path, monkeypatch):
    save_transformer(teacher, tmp_path / "teacher")
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in read_tensors(tmp_path / "teacher").items()}
    write_shards(tmp_path / "teacher", "diffusion_pytorch_model", tensors)
    monkeypatch.setattr(checkpoint_layouts, "fill", lambda *_, **__: pytest.fail("weights are put on a device"))
    plan, maps = HybridConfig(PLAN, feature_map=PHI), load_maps(file, PLAN, PHI)
    save_operated(tmp_path / "teacher", plan, maps, tmp_path / "found", "wan")
    found = read_tensors(tmp_path / "found")
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)
    assert {tensor.dtype.name for name, tensor in found.items() if name not in tensors} == {"float32"}
    with pytest.raises(InputError, match="plan: has 2 rates, the transformer 4 blocks"):
        save_operated(tmp_path / "teacher", HybridConfig((2, 1)), maps, tmp_path / "two", "wan")


def test_operating_on_the_files_of_a_hybrid_replaces_its_maps(teacher, file, tmp_path):
    plan, maps = HybridConfig(PLAN, feature_map=PHI), load_maps(file, PLAN, PHI)
    save_model(operate(teacher, plan, maps), tmp_path / "hybrid", "wan")
    other = jax.tree.map(lambda leaf: leaf + 1, maps)
    save_operated(tmp_path / "hybrid", plan, other, tmp_path / "again", "wan")
    assert_equal(load_transformer(tmp_path / "again").query_maps.maps, other[0])


def test_a_hybrid_without_linear_branch_has_no_maps(teacher, file):
    operated = operate(teacher, HybridConfig(PLAN, feature_map=PHI, linear_branch=False), load_maps(file, PLAN, PHI))
    assert parameters(operated).keys() == parameters(teacher).keys()


@pytest.mark.parametrize(
    ("plan", "rates_of_maps", "message"),
    [
        ((2, 1), (2, 1, 1, 1), "plan: has 2 rates, the transformer 4 blocks"),
        (PLAN, (2, 1, 1, 1), "the plan converts 3 blocks, found maps for 1"),
        (PLAN, (1, 1, 1, 1), "the plan converts 3 blocks, found maps for 0"),
    ],
)
def test_plans_that_do_not_match_model_or_maps_are_refused(teacher, file, plan, rates_of_maps, message):
    with pytest.raises(InputError, match=message):
        operate(teacher, HybridConfig(plan, feature_map=PHI), load_maps(file, rates_of_maps, PHI))
