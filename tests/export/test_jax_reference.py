"""The reference of an export: its samples, which are steps of `trace`, and the tensors that its parts make of them."""

import dataclasses

import numpy as np
import pytest
from etils import epath

from jsurgery.attention.hybrid import HybridConfig
from jsurgery.data.shards import Records, array_text
from jsurgery.export import jax_reference
from jsurgery.export.jax_reference import samples
from jsurgery.export.run_export import SAMPLES, make_job
from jsurgery.load_config import load_config
from jsurgery.runtime.stage_folder import StageFolder
from jsurgery.surgery.trace import trace
from jsurgery.wan.checkpoint import save_transformer
from jsurgery.wan.pipeline import load_pipeline
from jsurgery.wan.tokenizer import Tokenizer
from tests.conftest import FULL_GRID, TINY_TRANSFORMER

KEEP_STEPS = 3  # steps of each traced prompt
FIELDS = {
    "video.frames": "5", "video.height": "32", "video.width": "48", "text_length": "7", "sampler.steps": "3",
    "trace.prompts": "4", "trace.holdout": "2", "trace.keep_steps": str(KEEP_STEPS), "trace.batch": "2",
}  # fmt: skip


@pytest.mark.parametrize(("mode", "traced"), [("traces", [0, 1, 2, 3]), ("sampling", [2, 3])])
def test_samples_are_spread_over_the_traced_prompts_and_steps(tiny_pipeline, tmp_path, mode, traced):
    """With mode=sampling `trace` keeps only the steps of held-out prompts."""
    config = load_config("tiny", FIELDS | {"model.path": str(tiny_pipeline), "distill.mode": mode})
    stage = StageFolder(tmp_path, "trace", config, ("video", "text_length", "trace"))
    stage.run(lambda: trace(config, load_pipeline(str(tiny_pipeline)), stage.folder))
    job, _ = make_job(config, tmp_path, str(tiny_pipeline), blocks_per_file=1)
    assert job.trace == str(tmp_path / "trace")

    steps, texts = (Records(epath.Path(job.trace) / name) for name in ("steps", "text"))
    records = {}
    for index in range(len(steps)):
        records.setdefault(int(steps[index]["prompt"]), []).append(steps[index])
    assert {prompt: len(kept) for prompt, kept in records.items()} == dict.fromkeys(traced, KEEP_STEPS)
    tokenizer = Tokenizer(tiny_pipeline / "tokenizer")
    shares = [0.5, *np.linspace(0, 1, SAMPLES - 1)]
    for number, (sample, share) in enumerate(zip(samples(job), shares, strict=True)):
        prompt = traced[number % len(traced)]
        record = records[prompt][round(share * (KEEP_STEPS - 1))]
        np.testing.assert_array_equal(sample["latents"], record["latents"].astype(np.float32))
        np.testing.assert_array_equal(sample["timestep"], record["timestep"][None])
        text = array_text(texts[prompt if record["conditional"] else len(texts) - 1]["prompt"])
        np.testing.assert_array_equal(sample["token_ids"], tokenizer([text], 7)[0])


@pytest.fixture(scope="module")
def hybrid(random_transformer, tmp_path_factory):
    """A transformer alone, with a block of every kind."""
    hybrid = HybridConfig((4, 1, "linear"), stabilizer="max")
    folder = tmp_path_factory.mktemp("hybrid")
    save_transformer(random_transformer(dataclasses.replace(TINY_TRANSFORMER, num_layers=3, hybrid=hybrid)), folder)
    return folder


def tensors(folder, number=0):
    return {file.stem: np.load(file) for file in (folder / "reference" / str(number)).iterdir()}


def test_a_part_is_made_without_the_weights_of_other_blocks(hybrid, tmp_path, monkeypatch, capfd):
    """The whole export checks the parts against the model's own forward. Tensors that are there are not made again."""
    config = load_config("tiny", FIELDS)
    job, _ = make_job(config, tmp_path, str(hybrid), blocks_per_file=2)
    one = dataclasses.replace(job, only=("blocks_00_01",))
    whole, part, reads, opened = tmp_path / "whole", tmp_path / "part", [], jax_reference.open_transformer

    def spied(path):
        config, stored = opened(path)
        watched = lambda name, tensor: dataclasses.replace(tensor, fetch=lambda: reads.append(name) or tensor.fetch())
        return config, {name: watched(name, tensor) for name, tensor in stored.items()}

    monkeypatch.setattr(jax_reference, "open_transformer", spied)
    jax_reference.export(one, part, ("2",))
    assert {name.split(".")[1] for name in reads if name.startswith("blocks.")} == {"0", "1"}
    assert tensors(part).keys() == {
        "latents", "timestep", "text_embeddings", "time", "modulation", "text", "tokens_00", "tokens_02",
    }  # fmt: skip
    if not FULL_GRID:
        return  # `make kernels` also compares with the whole export, which takes half a minute
    jax_reference.export(job, whole, ("2",))
    assert tensors(whole).keys() == tensors(part).keys() | {"tokens_03", "velocity"}
    for number in range(2):
        for name, tensor in tensors(part, number).items():
            np.testing.assert_array_equal(tensor, tensors(whole, number)[name])
    (part / "reference" / "1" / "tokens_02.npy").unlink()
    reads.clear()
    capfd.readouterr()
    jax_reference.export(one, part, ("2",))
    assert capfd.readouterr().err == "export: reference 3/3  blocks_00_01\n"
    np.testing.assert_array_equal(tensors(part, 1)["tokens_02"], tensors(whole, 1)["tokens_02"])

    (whole / "reference" / "0" / "velocity.npy").unlink()
    right = jax_reference.JaxParts.whole
    monkeypatch.setattr(
        jax_reference.JaxParts, "whole", lambda parts: lambda *given: (1.001 * right(parts)(*given)[0],)
    )
    with pytest.raises(AssertionError, match="the parts differ from the whole model by 1.0e-03"):
        jax_reference.export(job, whole, ("2",))
    assert "velocity" not in tensors(whole)
