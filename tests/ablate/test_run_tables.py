"""Ablations on a random model: the models equal those of the stages, and measures equal brute force."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from jsurgery.ablate.attention_concentration import attention_statistics
from jsurgery.ablate.attention_concentration import of_seed as attention_of
from jsurgery.ablate.measures import branch_share, samples
from jsurgery.ablate.phi_before_rope import phi_and_rope
from jsurgery.ablate.predicted_errors import PREDICTORS, objective, predicted
from jsurgery.ablate.seed_run import SeedRun, velocity
from jsurgery.ablate.tables import ARM_TABLES, Arm
from jsurgery.attention.hybrid import HybridConfig, token_order
from jsurgery.attention.kinds.prefix_losses import AttentionInputs
from jsurgery.attention.rope import apply_rope, rope_tables
from jsurgery.attention.token_shards import TokenShards
from jsurgery.cli import main
from jsurgery.load_config import load_config
from jsurgery.surgery.distillation.saved_maps import load_maps
from jsurgery.surgery.finetune import finetune
from jsurgery.surgery.operate import operate
from jsurgery.wan.checkpoint import load_transformer, save_transformer
from pallas_kernels.api import hybrid_attention
from pallas_kernels.feature_map import HedgehogMap
from pallas_kernels.reference import softmax_share

SIZES = {
    "video.frames": 5, "video.height": 64, "video.width": 48, "sampler.steps": 2, "trace.prompts": 3,
    "trace.holdout": 2, "trace.keep_steps": 2, "trace.batch": 3, "distill.steps": 2, "plan.budget": "1R8",
    "hybrid.rates": '(2, 8, "linear")', "plan.rates": "(1, 2, 8)",
    "finetune.steps": 2, "finetune.batch": 2, "data.clips": 4, "evaluate.prompts": 2, "evaluate.validation_clips": 8,
    "log_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def arguments(tiny_pipeline):
    return {**{field: str(value) for field, value in SIZES.items()}, "model.path": str(tiny_pipeline)}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("ablations")


@pytest.fixture(scope="module")
def seed(arguments, workdir):
    return SeedRun(load_config("tiny_ablations", arguments), workdir, 0)


@pytest.fixture(scope="module")
def attention_inputs(seed):
    """q, k, v [blocks, B, N, H, D] of the teacher at the first held-out steps, in natural order."""
    batch, model = seed.held_out[0], seed.run.teacher

    def attention(q, k, v, _):
        return hybrid_attention(q, k, v, None, None, num_softmax=k.shape[1]), (q, k, v)

    return model.apply_blocks(batch["latents"], batch["timestep"], batch["text"], attention, None, order=None)[1]


def test_the_command_writes_a_table_and_resumes(arguments, workdir, tmp_path):
    document = tmp_path / "results.md"
    document.write_text("# Results\n\n<!-- begin hedgehog -->\n<!-- end hedgehog -->\n")
    command = [f"--config.{field}={value}" for field, value in arguments.items()]
    command += ["ablate", "--table=hedgehog", "--seeds=1", "--config=tiny_ablations", f"--workdir={workdir}"]
    assert main([*command, f"--results={document}"]) == 0
    found = json.loads((workdir / "hedgehog.json").read_text())
    assert list(found["rows"]) == [arm.name for arm in ARM_TABLES["hedgehog"].arms]
    assert found["rows"]["HedgeHog"]["phi_kparams"] == 2 * 12 * 12 / 1e3
    rows = {name: row["velocity_error"][0] for name, row in found["rows"].items()}
    assert len(set(rows.values())) == 4 and min(rows.values()) > 0
    assert (workdir / "hedgehog.md").read_text() in document.read_text().replace("\n\n<!-- end", "\n<!-- end")
    kept = {path: path.stat().st_mtime_ns for path in workdir.rglob("*.safetensors")}
    assert len(kept) == 4 and main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*.safetensors")} == kept


def test_models_measured_during_fine_tuning_equal_those_of_the_stage(seed, workdir):
    """The model after two steps is the same, whether or not the model after one step is measured."""
    arm = Arm("20R8")
    found = seed.operation(arm)
    models = {step: model.load() for step, model in seed.models(found).items()}
    assert list(models) == [1, 2]
    stage = seed.stage("finetune", found.config, ("finetune",), [])
    hybrid = HybridConfig.of(found.config, found.plan["rates"])
    maps = load_maps(seed.distilled(found.config) / "feature_maps.safetensors", hybrid.rates, hybrid.feature_map)
    student = operate(seed.run.teacher, hybrid, maps)
    straight = finetune(found.config, student, seed.run.pipeline, seed.run.training_latents, stage.folder)
    leaves = [jax.tree.leaves(nnx.state(model)) for model in (models[1], models[2], straight)]
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(leaves[1], leaves[2], strict=True))
    assert not all(np.allclose(a, b, atol=1e-6) for a, b in zip(leaves[0], leaves[2], strict=True))

    names = [model.name for model in seed.models(found).values()]
    scored = samples(seed, list(seed.models(found).values()))
    assert list(scored) == ["teacher", *names] and seed.run.pipeline.transformer is seed.run.teacher
    again = samples(SeedRun(seed.config, workdir, 0), list(seed.models(found).values()))  # read from the file
    assert json.dumps(again) == json.dumps(scored)  # as text, since some scores are NaN
    assert scored["teacher"]["latent_rmse"] == [0, 0]
    assert [len(items["total"]) for items in scored.values()] == [2, 1, 1]
    assert scored[names[0]]["latent_rmse"] != scored[names[1]]["latent_rmse"]


def test_errors_of_the_objective_table_are_those_of_hybrid_models(seed):
    table = objective([seed])
    (found,) = table["per_seed"]
    assert objective([seed]) == table and list(table["rows"]) == list(PREDICTORS.values())
    number = next(i for i, plan in enumerate(found["random"]["plans"]) if 0 not in plan)
    rates = [found["rates"][index] for index in found["random"]["plans"][number]]
    hybrid = HybridConfig.of(seed.config, rates)
    maps = load_maps(seed.distilled(seed.config) / "feature_maps.safetensors", rates, hybrid.feature_map)
    model, batch = operate(seed.run.teacher, hybrid, maps), seed.held_out[1]
    expected = np.asarray(velocity(seed.run.teacher, batch), np.float64)
    difference = np.asarray(velocity(model, batch), np.float64) - expected
    assert found["random"]["l1"][number] == pytest.approx(np.abs(difference).sum() / np.abs(expected).sum(), rel=1e-3)
    errors = json.loads((seed.distilled(seed.config) / "errors.json").read_text())
    by_rate = dict(zip(map(str, errors["rates"]), zip(*errors["errors"], strict=True), strict=True))
    total = sum(by_rate[str(rate)][block] for block, rate in enumerate(rates) if rate != 1)
    assert predicted(found, "attention", "random")[number] == pytest.approx(total)
    permuted = {tuple(sorted(plan)) for plan in found["permuted"]["plans"]}
    assert permuted == {(0, 1)}
    single = np.array(found["block_errors"]["velocity"])
    assert single.shape == (2, 3) and single[:, 0].max() < 1e-6 < 1e-3 < single[:, 1:].min()


def test_attention_statistics_equal_brute_force(seed, attention_inputs):
    table = attention_statistics([seed])
    (found,) = table["per_seed"]
    assert list(table["rows"]) == ["block 0", "block 1", "timestep 1000", "timestep 750", "all"]
    q, k, _ = (np.asarray(x, np.float64) for x in attention_inputs)
    scores = np.einsum("lbnhd,lbmhd->lbhnm", q, k) / np.sqrt(12)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    frame = np.arange(24) // 12
    expected = {
        "entropy / log N": -(p * np.log(p)).sum(-1) / np.log(24),
        "top 1": p.max(-1),
        "top 8": np.sort(p, -1)[..., -8:].sum(-1),
        "top 64": np.ones(p.shape[:-1]),
        "top 1 % (1)": p.max(-1),
        "own frame": (p * (frame[:, None] == frame)).sum(-1),
        "on R2 keys": p[..., ::2].sum(-1),
        "on R8 keys": p[..., ::8].sum(-1),
    }
    assert [name.replace("top 24", "top 64") for name in found["statistics"]] == list(expected)
    both = np.array(found["values"])  # the mean over the two held-out prompts
    first = np.stack([value.mean(axis=(2, 3)).T for value in expected.values()], axis=-1)
    seed_of_one = type("One", (), {"config": seed.config, "run": seed.run, "held_out": seed.held_out[:1]})
    np.testing.assert_allclose(np.array(attention_of(seed_of_one)["values"]), first, rtol=1e-3, atol=1e-4)
    assert both.shape == first.shape and not np.allclose(both, first)


def test_softmax_share_equals_the_reference(seed):
    """The reference forms all scores, with the queries and keys of the hybrid model itself."""
    arm = Arm("30R2", "30R2", finetuned=False)
    found = seed.operation(arm)
    model = seed.models(found)[0].load()
    shares = []
    for batch in seed.held_out:
        grid = model.config.token_grid(batch["latents"].shape[1:4])
        order = model.config.hybrid.token_order(grid)

        def attention(q, k, v, maps, order=order):
            options = {"num_softmax": order.num_softmax(2), "stabilizer": "lse"}
            return hybrid_attention(q, k, v, *maps, **options), softmax_share(q, k, *maps, **options).mean()

        inputs = batch["latents"], batch["timestep"], batch["text"]
        maps = model.query_maps.maps, model.key_maps.maps
        shares.append(model.apply_blocks(*inputs, attention, maps, order=order)[1])
    measured = branch_share(seed, model)["softmax_share"]
    np.testing.assert_allclose(measured, np.mean(shares, axis=0), rtol=1e-4)
    assert min(measured) > 0 and max(measured) < 1


def test_phi_before_rope_gets_inputs_without_rope():
    rng = np.random.default_rng(0)
    cos, sin = rope_tables((2, 3, 4), 12)
    order = token_order((2, 3, 4), (1, 2), "strided")
    cos, sin = cos[order.permutation], sin[order.permutation]
    plain = [rng.normal(size=(1, 24, 2, 12)).astype(np.float32) for _ in range(2)]
    rotated = [apply_rope(x, cos, sin) for x in plain]
    at = AttentionInputs(2, *rotated, None, None, None, TokenShards(order), "lse", (cos, -sin))
    np.testing.assert_allclose(at.inputs[0], plain[0], atol=1e-5)
    np.testing.assert_allclose(at.inputs[1], plain[1], atol=1e-5)
    assert not np.allclose(rotated[0], plain[0], atol=0.1)
    after = dataclasses.replace(at, inverse_rope=None)
    assert after.inputs[0] is rotated[0]


def test_maps_before_and_after_rope_have_different_errors(seed):
    found = phi_and_rope([seed])
    before, after = (found["per_seed"][0][side] for side in ("before", "after"))
    np.testing.assert_allclose(before["teacher_softmax_share"], after["teacher_softmax_share"], rtol=1e-5)
    assert not np.allclose(before["errors"], after["errors"], rtol=1e-4)
    column = [row[1] for row in before["errors"]]  # at rate 8
    assert found["rows"]["before RoPE"]["error R8"] == (pytest.approx(np.mean(column)), 0.0)


def test_a_model_with_hedgehog_maps_is_saved_and_loaded(seed, tmp_path):
    model = seed.models(seed.operation(ARM_TABLES["hedgehog"].arms[2]))[0].load()
    save_transformer(model, tmp_path)
    loaded = load_transformer(tmp_path)
    assert loaded.config == model.config and isinstance(loaded.key_maps.maps, HedgehogMap)
    states = [nnx.to_flat_state(nnx.state(of)) for of in (model, loaded)]
    for (path, expected), (_, leaf) in zip(*states, strict=True):
        np.testing.assert_array_equal(leaf[...], expected[...], err_msg=str(path))
