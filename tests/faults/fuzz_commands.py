"""Readers for `fuzz` that go through a command's own entry: what people give to it, changed gently or wildly.

A gentle change is one that people's own files show: fields that newer versions add, other names of columns, prefixes
before the names of tensors. At least a fifth of all examples should be read.
"""

import contextlib
import functools
import io
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from jsurgery import cli, sample
from jsurgery.data.video_writer import gif_frames, read_settings, write_video
from jsurgery.errors import InputError
from tests.faults.fuzz import Reader, as_json, changed_json, changes, files_of

SIZE = ("--frames=5", "--height=32", "--width=48", "--steps=2")
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"
ADDED_FIELDS = (
    "clip_output", "_name_or_path", "transformer_2", "boundary_ratio", "expand_timesteps", "image_encoder", "dtype",
    "shift_terminal", "use_dynamic_shifting", "solver_order", "final_sigmas_type", "new_field", "quantization_config",
)  # fmt: skip
UNUSED: list[Any] = [None, False, [], "", [None, None]]  # values that say that a field is not used
ADDED_VALUES = 4 * UNUSED + [True, 2, "zero", {"a": 1}, ["x", "Y"]]
VBENCH_FLAGS = ("info", "prompts", "augmented")
PREFIXES = ("", "model.", "module.", "_orig_mod.", "diffusion_model.", "model.diffusion_model.", "module.ema.", "x")


def command(*arguments: str) -> None:
    """Runs a command. Raises InputError with its message if it refuses, and AssertionError for more than one line."""
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        code = cli.main(arguments)
    if code:
        assert code == 2, error.getvalue()
        message = error.getvalue().splitlines()[-1]
        assert message.startswith("jsurgery: "), message
        raise InputError(message)


def pipeline_files() -> dict[str, bytes]:
    """The files of a tiny pipeline without hashes, which would refuse every change."""
    parts = ("transformer", "vae", "text_encoder", "tokenizer")
    files = {f"{part}/{name}": content for part in parts for name, content in files_of(part).items()}
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    unipc = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    files |= {"model_index.json": as_json(index), SCHEDULER: as_json(unipc)}
    return {name: content for name, content in files.items() if not name.endswith("hashes.json")}


def try_sampling(folder: pathlib.Path) -> None:
    """All that `sample` does before it reads weights."""
    command("sample", f"--model={folder}", "--prompt=a red circle", "--dry_run", *SIZE)


def pipeline_reader(*changed: str) -> Reader:
    return Reader(pipeline_files(), changed, try_sampling)


def names_reader() -> Reader:
    """`convert` of a file with one tensor's name, or all, changed in its header."""

    def read(folder: pathlib.Path) -> None:
        try:
            command("convert", f"--model={folder}/transformer", f"--output={folder}/out")
        finally:
            shutil.rmtree(folder / "out", ignore_errors=True)

    files = {name: content for name, content in pipeline_files().items() if name.startswith("transformer/")}
    return Reader(files, (TRANSFORMER,), read)


def index_reader(kind: str) -> Reader:
    """`encode --dry_run` of an index, which reads every row."""
    rows = [{"path": f"{name}.mp4", "cap": caption} for name, caption in (("a", "one"), ("b", "two"), ("c", "é"))]
    content = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "csv": 'path,caption\na.mp4,"one, two"\nb.mp4,two\nc.mp4,three\n',
    }[kind]
    read = lambda folder: command(
        "encode", "--config=tiny", f"--videos={folder}/i.{kind}", "--workdir=run", "--dry_run"
    )
    return Reader({f"i.{kind}": content.encode()}, (f"i.{kind}",), read)


def vbench_reader() -> Reader:
    """`evaluate vbench --dry_run` with a list, the suite's text and its augmented prompts."""
    entries = [{"prompt_en": text, "dimension": [name]} for text, name in (("a", "Mechanics"), ("b", "Material"))]
    files = {"info.json": as_json([*entries, entries[0]]), "text.txt": b"b\na\n", "aug.txt": b"a long b\na long a\n"}
    given = lambda folder: [f"--{flag}={folder}/{name}" for flag, name in zip(VBENCH_FLAGS, files, strict=True)]
    read = lambda folder: command("evaluate", "vbench", *given(folder), "--output=out", "--dry_run", *SIZE)
    return Reader(files, tuple(files), read)


READERS: dict[str, Callable[[], Reader]] = {
    "sample_model_index": lambda: pipeline_reader("model_index.json"),
    "sample_parts": lambda: pipeline_reader("transformer/config.json", "vae/config.json", "text_encoder/config.json"),
    "sample_scheduler": lambda: pipeline_reader(SCHEDULER),
    "sample_weights": lambda: pipeline_reader(TRANSFORMER),
    "convert_names": names_reader,
    "encode_jsonl": lambda: index_reader("jsonl"),
    "encode_csv": lambda: index_reader("csv"),
    "evaluate_vbench": vbench_reader,
}


def gentle_changes(valid: bytes) -> st.SearchStrategy[bytes]:
    """Changes that are as likely as not to leave a file that can be read."""
    if len(valid) > 8 and int.from_bytes(valid[:8], "little") < len(valid):
        return renamed_tensors(valid)
    try:
        document = json.loads(valid)
    except ValueError:
        return rewritten_text(valid.decode())
    if not isinstance(document, dict):
        return st.just(valid) | changed_json(document).map(as_json)
    fields = st.dictionaries(st.sampled_from(ADDED_FIELDS), st.sampled_from(ADDED_VALUES), max_size=2)
    return fields.map(lambda added: as_json(document | added))


@st.composite
def renamed_tensors(draw: st.DrawFn, valid: bytes) -> bytes:
    """A safetensors file whose names have a prefix; perhaps all but one of them."""
    size = int.from_bytes(valid[:8], "little")
    header, prefix = json.loads(valid[8 : 8 + size]), draw(st.sampled_from(PREFIXES))
    kept = draw(st.sampled_from([None] * 6 + [max(header)]))
    named = {name if name in ("__metadata__", kept) else prefix + name: place for name, place in header.items()}
    text = json.dumps(named).encode()
    return len(text).to_bytes(8, "little") + text + valid[8 + size :]


@st.composite
def rewritten_text(draw: st.DrawFn, valid: str) -> bytes:
    """Lines in another order, with other separators, names of columns, line ends or encoding, or one line spoilt."""
    lines = valid.splitlines()
    spoilt = draw(st.integers(1, max(1, len(lines) - 1)))
    if len(lines) > spoilt:
        lines[spoilt] = draw(st.sampled_from([lines[spoilt]] * 3 + ["", '"open', "a,b,c,d", "{", "\ud800", "[1]"]))
    text = draw(st.sampled_from(["\n", "\r\n", "\n\n"])).join(lines) + "\n"
    for old, new in (("path", "video"), ("cap", "text"), (",", ";")):
        text = text.replace(old, new) if draw(st.integers(0, 3)) == 0 else text
    return text.encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])), errors="surrogatepass")


def contents(reader: Reader) -> st.SearchStrategy[dict[str, bytes]]:
    """{file: content} of the fuzzed files: of several, most are unchanged; most changes are gentle."""
    gentle = lambda file: gentle_changes(reader.files[file])
    of = lambda file: gentle(file) | gentle(file) | changes(reader.files[file])
    valid = {file: st.just(reader.files[file]) for file in reader.changed}
    one = st.sampled_from(reader.changed).flatmap(lambda file: st.fixed_dictionaries(valid | {file: of(file)}))
    return one | st.fixed_dictionaries({file: gentle(file) for file in reader.changed})


def output_names() -> st.SearchStrategy[str]:
    """Names of files for --output: any characters but a slash and NUL, of any length, with a suffix or without."""
    letters = st.characters(blacklist_characters="/\0", blacklist_categories=())
    plain = st.text(letters, min_size=1, max_size=40) | st.sampled_from(["12:30", "-x", "~", "100%d", "a b", "n" * 251])
    return st.tuples(plain, st.sampled_from([".mp4", ".gif", ".png", ".mp4", ".gif", ".png", "", ".webm"])).map("".join)


@functools.cache
def one_frame() -> np.ndarray:
    return np.zeros((1, 16, 16, 3), np.uint8)


def check_output(name: str, folder: pathlib.Path) -> str:
    """`sample` with a video of one frame: the file has the name that was asked for, or the command refuses it."""

    def make_videos(config: Any, requests: Any) -> Any:
        for request in requests:
            write_video(request.file, one_frame(), 16, {"prompt": request.prompt})
            yield request.file

    making, sample.make_videos = sample.make_videos, make_videos
    output = folder / name
    try:
        command("sample", "--prompt=x", f"--output={output}", *SIZE)
    except InputError:
        assert not list(folder.iterdir()), f"{name!r} was refused, and something was written"
        return "refused"
    finally:
        sample.make_videos = making
    assert [file.name for file in folder.iterdir()] == [name] and read_settings(output) == {"prompt": "x"}
    output.unlink()
    return "taken"


def rates() -> st.SearchStrategy[tuple[int, float]]:
    return st.tuples(st.integers(1, 200), st.integers(1, 240) | st.floats(0.5, 240))


def check_rate(drawn: tuple[int, float]) -> str:
    """A GIF lasts as long as its video, to a hundredth of a second, and no frame is too short for a browser."""
    frames, fps = drawn
    chosen, durations = gif_frames(frames, fps)
    assert chosen[0] == 0 and sorted(set(chosen)) == chosen and chosen[-1] < frames
    assert min(durations) >= 20 and len(chosen) == len(durations)
    assert abs(sum(durations) - 1000 * frames / fps) <= 25
    assert len(chosen) == frames or fps > 100 / 3
    return "taken"
