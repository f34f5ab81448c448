"""`jsurgery synthesize`: its shards hold what the pipeline samples, and a second run makes only missing shards."""

import os
import signal
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jsurgery.cli import main
from jsurgery.data import synthesize
from jsurgery.data.latents import batches, padded_text
from jsurgery.data.shards import Records, array_text, shard_path, text_array
from jsurgery.load_config import load_config
from jsurgery.runtime.mesh import make_mesh
from jsurgery.wan.pipeline import Pipeline, load_pipeline

PROMPTS = ["a red circle", "a blue square stays still", "a green triangle moves left", "a circle", "a square"]


def overrides(tiny_pipeline):
    return {
        "model.path": str(tiny_pipeline), "video.frames": "5", "video.height": "32", "video.width": "48",
        "sampler.steps": "2", "trace.keep_steps": "2", "data.clips_per_shard": "2", "data.batch": "2",
        "sampler.guidance": "3.0",
    }  # fmt: skip


@pytest.fixture(scope="module")
def command(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthesize")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    fields = [f"--config.{name}={value}" for name, value in overrides(tiny_pipeline).items()]
    files = [f"--prompts_file={folder / 'prompts.txt'}", f"--workdir={folder}"]
    return folder / "synthesized", ["synthesize", "--config=tiny", *files, *fields]


def test_shards_equal_the_pipeline_and_only_missing_ones_are_made(command, tiny_pipeline, monkeypatch, capsys):
    folder, arguments = command
    assert main(arguments) == 0
    records = Records(folder)
    assert [array_text(records[i]["caption"]) for i in range(len(records))] == PROMPTS
    pipeline = load_pipeline(str(tiny_pipeline), jnp.float32)
    config = load_config("tiny", overrides(tiny_pipeline))
    expected = np.asarray(pipeline.sample(PROMPTS[2:4], config, seed=config.seed, first=2)[0])
    for row in (2, 3):
        np.testing.assert_allclose(records[row]["latents"], expected[row - 2], atol=5e-3)
    assert np.abs(records[4]["latents"] - expected[0]).max() > 0.1

    element = batches(folder, 4, seed=0)[0]
    text = padded_text(element["text"], config.text_length)
    np.testing.assert_allclose(text, pipeline.embed(element["captions"], config.text_length), atol=2e-3)

    before = shard_path(folder, 0).read_bytes()
    shard_path(folder, 1).unlink()
    (folder / "stage.json").write_text(
        (folder / "stage.json").read_text().replace('"complete": true', '"complete": false')
    )
    sampled = []
    sample = Pipeline.sample
    monkeypatch.setattr(
        Pipeline, "sample", lambda self, batch, *a, **k: sampled.extend(batch) or sample(self, batch, *a, **k)
    )
    assert main(arguments) == 0
    assert sampled == PROMPTS[2:4] and shard_path(folder, 0).read_bytes() == before
    assert len(Records(folder)) == len(PROMPTS)

    (folder.parent / "prompts.txt").write_text("a dog")
    assert main(arguments) == 2
    assert "prompts was" in capsys.readouterr().err


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_stopped_shard_goes_on_after_its_last_batch(command, tiny_pipeline, tmp_path, monkeypatch):
    """Three batches of two clips in one shard. Every prompt is sampled once, but those of the batch that was open."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    more = ["--config.data.clips_per_shard=8", f"--prompts_file={tmp_path / 'prompts.txt'}"]
    start = lambda folder: main([*command[1], *more, f"--workdir={folder}"])
    whole = tmp_path / "whole"
    assert start(whole) == 0
    sampled, sample, write = [], Pipeline.sample, synthesize.write_shard

    def stopped(at, how):
        def sample_until(self, batch, *more, **options):
            if len(sampled) == at:
                how()
            sampled.append(list(batch))
            return sample(self, batch, *more, **options)

        return sample_until

    def kill(*_):
        raise Killed

    for at, how, folder in ((1, kill, "killed"), (0, lambda: os.kill(os.getpid(), signal.SIGTERM), "stopped")):
        monkeypatch.setattr(Pipeline, "sample", stopped(at, how))
        if how is kill:
            with pytest.raises(Killed):
                start(tmp_path / folder)
        else:
            assert start(tmp_path / folder) == 143
        assert sampled == [PROMPTS[:2]], "the first batch alone was finished"
        monkeypatch.setattr(Pipeline, "sample", stopped(None, kill))
        monkeypatch.setattr(synthesize, "write_shard", kill)
        with pytest.raises(Killed):
            start(tmp_path / folder)
        assert sampled == [PROMPTS[:2], PROMPTS[2:4], PROMPTS[4:]]
        monkeypatch.setattr(synthesize, "write_shard", write)
        assert start(tmp_path / folder) == 0 and len(sampled) == 3
        (made,) = (tmp_path / folder).rglob("*.array_record")
        assert made.read_bytes() == shard_path(whole / "synthesized", 0).read_bytes()
        assert sorted(path.name for path in made.parent.iterdir()) == [made.name, "stage.json"]
        sampled.clear()


def test_shards_are_divided_among_hosts(command, tiny_pipeline, tmp_path, monkeypatch):
    made = {}
    monkeypatch.setattr(synthesize, "configured_pipeline", lambda *_: mock.MagicMock())
    record = lambda config, pipeline, prompts, *_: [{"caption": text_array(prompt)} for prompt in prompts]
    monkeypatch.setattr(synthesize, "records", record)
    captions = lambda records: [array_text(record["caption"]) for record in records]
    config = load_config("tiny", overrides(tiny_pipeline))
    for host in range(2):
        monkeypatch.setattr(synthesize.jax, "process_index", lambda host=host: host)
        monkeypatch.setattr(synthesize.jax, "process_count", lambda: 2)
        monkeypatch.setattr(
            synthesize,
            "write_shard",
            lambda path, records, host=host: made.setdefault(path.name, (host, captions(records))),
        )
        synthesize.make_shards(config, PROMPTS, epath.Path(tmp_path), make_mesh(config.mesh))
    assert [made[f"{shard:05d}.array_record"] for shard in range(3)] == [
        (0, PROMPTS[:2]),
        (1, PROMPTS[2:4]),
        (0, PROMPTS[4:]),
    ]
