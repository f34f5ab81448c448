"""`jsurgery encode` on small videos: latents compared with the VAE on frames chosen by NumPy, resuming, skipping."""

import json
import shutil
from fractions import Fraction

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from PIL import Image

from jsurgery.cli import main
from jsurgery.data import encode
from jsurgery.data.latents import batches, check_latents, padded_text
from jsurgery.data.shards import Records, array_text
from jsurgery.errors import InputError
from jsurgery.load_config import load_config
from jsurgery.wan.checkpoint import load_text_encoder, load_vae
from jsurgery.wan.text_encoder import encode_prompts
from jsurgery.wan.tokenizer import Tokenizer

FRAMES, HEIGHT, WIDTH = 5, 32, 48
CAPTIONS = [
    "a red circle moves left over a grey background",
    "",
    "a blue square stays still",
    "a green triangle",
    "a circle",
    "a red square moves right",
    "a blue circle",
    "out of the folder",
]
RATES = {0: (24, 40, 66), 2: (8, 37, 48), 5: (30, 33, 51), 6: (16, 48, 32)}  # clip: frames a second, height, width


def frames_of(number):
    return np.random.default_rng(number).integers(0, 256, (12, *RATES[number][1:], 3), dtype=np.uint8)


def write_clip(path, number):
    """Writes PNG in QuickTime, which is lossless."""
    fps, height, width = RATES[number]
    with av.open(str(path), "w", format="mov") as container:
        stream = container.add_stream("png", rate=Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = height, width, "rgb24"
        for pixels in frames_of(number):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Four clips of different sizes and rates; one without a caption, a truncated file, a text file, a path outside."""
    folder = tmp_path_factory.mktemp("videos")
    for number in RATES:
        write_clip(folder / f"{number}.mov", number)
    shutil.copy(folder / "0.mov", folder / "1.mov")
    content = (folder / "0.mov").read_bytes()
    (folder / "3.mov").write_bytes(content[: len(content) // 2])
    (folder / "4.mp4").write_text("not a video")
    paths = ["0.mov", "1.mov", "2.mov", "3.mov", "4.mp4", "5.mov", "6.mov", "../7.mov"]
    index = folder / "clips.jsonl"
    index.write_text("".join(json.dumps({"path": p, "cap": [c]}) + "\n" for p, c in zip(paths, CAPTIONS, strict=True)))
    return folder


def arguments(tiny_pipeline, videos, workdir, **fields):
    chosen = {
        "model.path": tiny_pipeline, "video.frames": FRAMES, "video.height": HEIGHT, "video.width": WIDTH,
        "video.fps": 16, "data.clips_per_shard": 3, "data.batch": 2, "data.workers": 1, "data.max_crop": 0.7,
        "data.max_upscale": 2.0,
    } | {name.replace("__", "."): value for name, value in fields.items()}  # fmt: skip
    overrides = [f"--config.{name}={value}" for name, value in chosen.items()]
    return ["encode", "--config=tiny", f"--videos={videos / 'clips.jsonl'}", f"--workdir={workdir}", *overrides]


@pytest.fixture(scope="module")
def encoded(tiny_pipeline, videos, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    assert main(arguments(tiny_pipeline, videos, workdir, data__workers=2)) == 0
    return workdir / "encoded"


def stored(folder, bucket="5x32x48"):
    records = Records(folder / bucket)
    return {array_text(record["caption"]): record for record in (records[i] for i in range(len(records)))}


def same(one, other):
    return one.keys() == other.keys() and all(
        np.array_equal(one[caption][name], other[caption][name]) for caption in one for name in one[caption]
    )


def expected_video(number):
    """Nearest frames, cropped to the target's aspect ratio and resized by Pillow."""
    fps, height, width = RATES[number]
    chosen = frames_of(number)[[int(np.argmin([abs(j * 16 - i * fps) for j in range(12)])) for i in range(FRAMES)]]
    if number == 2:  # only cropped, from 37 rows to 32
        return chosen[:, 2:34]
    tall = height / width > HEIGHT / WIDTH
    box_height, box_width = (width * HEIGHT / WIDTH, width) if tall else (height, height * WIDTH / HEIGHT)
    left, top = (width - box_width) // 2, (height - box_height) // 2
    box = left, top, left + box_width, top + box_height
    resample = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(frame).resize((WIDTH, HEIGHT), resample, box)) for frame in chosen])


@pytest.fixture(scope="module")
def posterior(tiny_pipeline):
    """{clip: (mean, standard deviation)} of the normalised latents of `expected_video`, each clip encoded at once."""
    vae = load_vae(tiny_pipeline / "vae")
    clips = jnp.asarray(np.stack([expected_video(number) for number in RATES]), jnp.float32) / 127.5 - 1
    means, log_variances = map(np.asarray, nnx.jit(lambda vae, clips: vae.moments(clips))(vae, clips))
    center, scale = np.asarray(vae.config.latents_mean), np.asarray(vae.config.latents_std)
    return dict(zip(RATES, zip((means - center) / scale, np.exp(log_variances / 2) / scale, strict=True), strict=True))


def test_latents_equal_the_vae_on_frames_chosen_by_numpy(encoded, posterior):
    found = stored(encoded)
    assert sorted(found) == sorted(CAPTIONS[number] for number in RATES)
    for number in RATES:
        expected, latents = posterior[number][0], found[CAPTIONS[number]]["latents"]
        assert latents.dtype == np.float16 and latents.shape == (2, 4, 6, 4)
        assert np.abs(latents - expected).max() < 1e-4 + np.abs(expected).max() * 2**-11  # float16
        assert array_text(found[CAPTIONS[number]]["path"]).endswith(f"/{number}.mov")


def test_text_embeddings_equal_the_text_encoder(encoded, tiny_pipeline):
    token_ids, mask = Tokenizer(tiny_pipeline / "tokenizer")([CAPTIONS[0], CAPTIONS[6]], 16)
    encoder = load_text_encoder(tiny_pipeline / "text_encoder")
    expected = np.asarray(encode_prompts(encoder, jnp.asarray(token_ids), jnp.asarray(mask)))
    found = [stored(encoded)[CAPTIONS[number]]["text"] for number in (0, 6)]
    assert [len(text) for text in found] == mask.sum(1).tolist() and len(found[0]) > len(found[1])
    assert np.abs(padded_text(found, 16) - expected).max() < 2e-3
    with pytest.raises(InputError, match=f"text_length: 4; expected at least {len(found[0])}"):
        padded_text(found, 4)


def test_skipped_clips_are_listed_with_reasons(encoded, videos):
    rows = [json.loads(line) for line in (encoded / "skipped.jsonl").read_text().splitlines()]
    assert [row["path"].removeprefix(f"{videos}/") for row in rows[:3]] == ["1.mov", "3.mov", "4.mp4"]
    reasons = [row["reason"] for row in rows]
    assert reasons[0] == "no caption" and "Invalid" in reasons[1] and "Invalid" in reasons[2]
    assert len(rows) == 4 and rows[3]["reason"] == f"outside of {videos}"


def test_a_second_run_does_nothing(encoded, tiny_pipeline, videos, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in encoded.rglob("*")}
    monkeypatch.setattr(encode, "encode_shards", None)
    assert main(arguments(tiny_pipeline, videos, encoded.parent)) == 0
    output = capsys.readouterr()
    assert "skipped" in output.err and output.out.strip() == str(encoded)
    assert {path: path.stat().st_mtime_ns for path in encoded.rglob("*")} == before


def test_a_missing_shard_is_made_again_with_the_same_contents(encoded, tiny_pipeline, videos, tmp_path, capsys):
    again = shutil.copytree(encoded.parent, tmp_path / "run") / "encoded"
    shards = sorted((again / "5x32x48").glob("*.array_record"))
    assert len(shards) == 3
    shards[0].unlink()
    (again / "5x32x48" / "00000.tmp").write_bytes(b"left by a run that was killed")
    kept = {shard: shard.stat().st_mtime_ns for shard in shards[1:]}
    assert main(arguments(tiny_pipeline, videos, again.parent)) == 0
    assert "3/3" in capsys.readouterr().err
    assert kept == {shard: shard.stat().st_mtime_ns for shard in shards[1:]}
    assert same(stored(again), stored(encoded))
    assert json.loads((again / "stage.json").read_text())["complete"]


def test_shards_are_divided_among_hosts(encoded, tiny_pipeline, videos, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    made = []
    for host in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        assert main(arguments(tiny_pipeline, videos, tmp_path, data__max_skipped=0.7)) == 0
        made.append(sorted(path.name[4] for path in (tmp_path / "encoded").glob("*/*.array_record")))
    assert made == [["1"], ["0", "1", "2"]]
    assert same(stored(tmp_path / "encoded"), stored(encoded))
    assert (tmp_path / "encoded" / "skipped.jsonl").read_text() == (encoded / "skipped.jsonl").read_text()


def test_posterior_samples_are_the_mean_plus_seeded_noise(posterior, tiny_pipeline, videos, tmp_path):
    assert main(arguments(tiny_pipeline, videos, tmp_path, data__posterior="sample")) == 0
    samples = stored(tmp_path / "encoded")
    for number, (mean, deviation) in posterior.items():
        noise = (samples[CAPTIONS[number]]["latents"] - mean) / deviation
        expected = np.random.default_rng([0, number]).standard_normal(noise.shape, np.float32)
        assert np.abs(noise - expected).max() < 0.02


def test_batches_take_buckets_in_proportion_to_their_clips(tiny_pipeline, videos, tmp_path):
    several = arguments(tiny_pipeline, videos, tmp_path, data__buckets="several", data__batch=1)
    assert main(several) == 0
    folder = tmp_path / "encoded"
    assert sorted(stored(folder)) == sorted(CAPTIONS[number] for number in (0, 2, 5))
    assert list(stored(folder, "5x48x32")) == [CAPTIONS[6]]
    taken = [batch["latents"].shape for batch in (batches(folder, 2, seed=0)[i] for i in range(40))]
    assert set(taken) == {(2, 2, 4, 6, 4), (2, 2, 6, 4, 4)}
    assert taken.count((2, 2, 4, 6, 4)) == 30  # as that bucket has three of the four clips


def test_too_many_skipped_clips_stop_the_run(tiny_pipeline, videos, tmp_path, capsys):
    command = arguments(tiny_pipeline, videos, tmp_path, data__max_skipped=0.34)
    assert main(command) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "config.data.max_skipped: 0.34; 3 of 6 clips" in message and "no caption" in message
    assert len((tmp_path / "encoded" / "skipped.jsonl").read_text().splitlines()) == 3
    assert not json.loads((tmp_path / "encoded" / "stage.json").read_text())["complete"]
    assert main([*command, "--config.data.max_skipped=0.5"]) == 0  # shards do not depend on it, so that they are kept
    assert "2/2" in capsys.readouterr().err


def test_another_config_or_index_is_refused(encoded, tiny_pipeline, videos, tmp_path, capsys):
    assert main(arguments(tiny_pipeline, videos, encoded.parent, video__fps=8)) == 2
    assert "video.fps was 16, is 8" in capsys.readouterr().err
    command = [argument for argument in arguments(tiny_pipeline, videos, encoded.parent) if "--videos" not in argument]
    (tmp_path / "clips.csv").write_text("path,cap\na.mp4,b\n")
    assert main([*command, f"--videos={tmp_path / 'clips.csv'}"]) == 2
    assert "videos was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "text"), [("max_crop", "1.1"), ("max_skipped", "-1"), ("workers", "0"), ("batch", "0")]
)
def test_a_bad_value_is_named(field, text):
    with pytest.raises(InputError, match=f"config.data.{field}: expected .* found {text}"):
        load_config("tiny", {f"data.{field}": text})


def test_finetune_trains_on_the_encoded_folder(encoded, tiny_pipeline, tmp_path):
    fields = {
        "model.path": tiny_pipeline, "data.path": encoded, "video.frames": FRAMES, "video.height": HEIGHT,
        "video.width": WIDTH, "sampler.steps": 1, "trace.prompts": 2, "trace.holdout": 1, "trace.keep_steps": 1,
        "trace.batch": 2, "hybrid.rates": "(2,)", "plan.rates": "(2,)", "plan.budget": "2R2", "distill.steps": 1,
        "distill.calibrate": False, "finetune.steps": 2, "finetune.batch": 2, "log_every": 1,
    }  # fmt: skip
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    for stage in ("trace", "distill", "plan", "operate", "finetune"):
        assert main([stage, "--config=tiny", f"--workdir={tmp_path}", *overrides]) == 0
    rows = [json.loads(line) for line in (tmp_path / "finetune" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(np.isfinite(row["loss"]) for row in rows)
    assert (tmp_path / "model" / "config.json").exists()


def test_an_unfinished_folder_and_latents_of_another_vae_are_refused(encoded, tiny_pipeline, tmp_path):
    vae = shutil.copytree(tiny_pipeline / "vae", tmp_path / "vae")
    check_latents(epath.Path(encoded), epath.Path(vae))  # a copy is the same VAE
    (vae / "config.json").write_text((vae / "config.json").read_text() + " ")
    with pytest.raises(InputError, match="config.data.path: .*: expected latents of .*vae, found those of another VAE"):
        check_latents(epath.Path(encoded), epath.Path(vae))

    unfinished = epath.Path(shutil.copytree(encoded, tmp_path / "unfinished"))
    marker = json.loads((unfinished / "stage.json").read_text())
    (unfinished / "stage.json").write_text(json.dumps(marker | {"complete": False}))
    with pytest.raises(InputError, match="config.data.path: .*unfinished: not finished"):
        check_latents(unfinished, epath.Path(tiny_pipeline / "vae"))
    (unfinished / "stage.json").unlink()
    check_latents(unfinished, epath.Path(vae))
