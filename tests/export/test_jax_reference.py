"""The samples on which the reference of an export is computed: steps of `trace`."""

import numpy as np
import pytest
from etils import epath

from jsurgery.data.shards import Records, array_text
from jsurgery.export.jax_reference import samples
from jsurgery.export.run_export import SAMPLES, make_job
from jsurgery.load_config import load_config
from jsurgery.runtime.stage_folder import StageFolder
from jsurgery.surgery.trace import trace
from jsurgery.wan.pipeline import load_pipeline
from jsurgery.wan.tokenizer import Tokenizer

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
