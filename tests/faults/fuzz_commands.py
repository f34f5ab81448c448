"""Readers for `fuzz` that go through a command's own entry: what people give to it, changed gently or wildly.

A gentle change is one that people's own files show: fields that newer versions add, other names of columns, prefixes
before the names of tensors. At least a fifth of all examples should be read.
"""

import contextlib
import functools
import io
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
import safetensors.numpy
from hypothesis import strategies as st

from jsurgery import cli, sample
from jsurgery.data.video_writer import gif_frames, read_settings, write_video
from jsurgery.errors import InputError
from jsurgery.io.files import decode_text
from tests.faults.fuzz import Reader, as_json, changed_bytes, changed_json, changes, files_of

SIZE = ("--frames=5", "--height=32", "--width=48", "--steps=2")
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "text_encoder/model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"
ADDED_FIELDS = (
    "clip_output", "_name_or_path", "transformer_2", "boundary_ratio", "expand_timesteps", "image_encoder", "dtype",
    "shift_terminal", "use_dynamic_shifting", "solver_order", "final_sigmas_type", "new_field", "quantization_config",
)  # fmt: skip
UNUSED: list[Any] = [None, False, [], "", [None, None]]  # values that say that a field is not used
ADDED_VALUES = 4 * UNUSED + [True, 2, "zero", {"a": 1}, ["x", "Y"]]
VBENCH_FLAGS = ("info", "prompts", "augmented")
PREFIXES = ("", "model.", "module.", "_orig_mod.", "diffusion_model.", "model.diffusion_model.", "module.ema.", "x")
NUMBERS = (np.nan, np.inf, -np.inf, 3e38, 1e30, 65504.0, 1e-40, 0.0, -1.0, 0.5)  # of single weights
FOREIGN = (
    b"GGUF\x03\0\0\0" + b"\0" * 500, b"ggjt" + b"\0" * 50, b"\x80\x02}q\0." + b"\0" * 50, b"PK\x03\x04" + b"\0" * 50,
    b"\x1f\x8b\x08" + b"\0" * 50, b"\x89HDF\r\n\x1a\n" + b"\0" * 50, b"\x93NUMPY" + b"\0" * 50, b"7z\xbc\xaf\x27\x1c",
    b"<html>", b"Entry not found", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"",
)  # fmt: skip
# Ends of names that formats of quantised weights and LoRAs add, and harmless wrappers within names.
SUFFIXES = (
    ".lora_down.weight",
    ".lora_A.weight",
    ".scale_weight",
    ".weight_scale_inv",
    ".int8_weight",
    ".qweight",
    ".SCB",
)
WRAPPERS = ("", "_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
CLIP_NAMES = (
    "a.mp4", "B.MOV", "._a.mp4", ".hidden/c.mkv", "d e/é.webm", "__MACOSX/f.mp4", ".ipynb_checkpoints/a-checkpoint.mp4",
    "g.gif", "h.ts", "i.txt", "j.flv", "k", "#l%20?.mp4", "m.mp4.part", "-n.avi", "videos/o.m4v",
)  # fmt: skip
TAKEN = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".webm")


def command(*arguments: str) -> str:
    """Runs a command and returns what it printed. Raises InputError with its message if it refuses, and AssertionError
    for any other end."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = cli.main(arguments)
    if code:
        assert code == 2, error.getvalue()
        message = error.getvalue().splitlines()[-1]
        assert message.startswith("jsurgery: "), message
        raise InputError(message)
    return out.getvalue() + error.getvalue()


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


def numbers_reader() -> Reader:
    """`sample` of a video from weights with a few odd numbers: a video, or a refusal that names what is not finite."""
    files, weights = pipeline_files(), (TRANSFORMER, "vae/diffusion_pytorch_model.safetensors", TEXT_WEIGHTS)

    def read(folder: pathlib.Path) -> None:
        output = folder / "o.png"
        try:
            command("sample", f"--model={folder}", "--prompt=a", f"--output={output}", *SIZE[1:], "--frames=1")
            assert read_settings(output)["prompt"] == "a"
        except InputError as refusal:
            assert "finite" in str(refusal), refusal
            assert not output.exists()
            raise
        output.unlink()

    def odd_numbers(drawn: tuple[str, list[tuple[int, float]]]) -> dict[str, bytes]:
        changed = dict.fromkeys(weights, b"") | {name: files[name] for name in weights}
        content = bytearray(files[drawn[0]])
        start = 8 + int.from_bytes(content[:8], "little")
        for place, number in drawn[1]:
            at = start + 4 * (place % ((len(content) - start) // 4))
            content[at : at + 4] = np.float32(number).tobytes()
        return changed | {drawn[0]: bytes(content)}

    places = st.lists(st.tuples(st.integers(0, 1 << 24), st.sampled_from(NUMBERS)), max_size=3)
    drawn = st.tuples(st.sampled_from(weights), places).map(odd_numbers)
    return Reader(files, weights, read, drawn)


def formats_reader() -> Reader:
    """What `sample` says of weights in other formats: their first bytes, or names as quantised files have them."""
    files = pipeline_files()
    valid = files[TRANSFORMER]

    @st.composite
    def named(draw: st.DrawFn) -> bytes:
        suffix, wrapper = draw(st.sampled_from([None] * 8 + list(SUFFIXES))), draw(st.sampled_from(WRAPPERS))
        size = int.from_bytes(valid[:8], "little")
        header = json.loads(valid[8 : 8 + size])
        chosen = draw(st.sets(st.sampled_from(sorted(header.keys() - {"__metadata__"})), min_size=1, max_size=5))
        for name in chosen:
            place = header.pop(name)
            renamed = name.replace("blocks.0.", "blocks.0." + wrapper)
            header[renamed if suffix is None else re.sub(r"\.(weight|bias)$", "", renamed) + suffix] = place
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + valid[8 + size :]

    drawn = (named() | named() | named() | st.sampled_from(FOREIGN)).map(lambda content: {TRANSFORMER: content})
    return Reader(files, (TRANSFORMER,), try_sampling, drawn)


def prompts_reader() -> Reader:
    """`sample --dry_run` of a file of prompts: it counts those that have more tokens than fit."""
    files = pipeline_files() | {"p.txt": b"a red circle\n"}

    def read(folder: pathlib.Path) -> None:
        fields = ("--config.text_length=12", f"--model={folder}", f"--prompts_file={folder}/p.txt")
        said = command("sample", *fields, "--dry_run", *SIZE)
        if cut := re.search(r"(\d+) of (\d+) prompts are cut", said):
            lines = decode_text((folder / "p.txt").read_bytes()).split("\n")
            assert 1 <= int(cut[1]) <= int(cut[2]) == sum(bool(line.strip()) for line in lines), said

    words = st.text(max_size=60) | st.sampled_from(
        ["a red circle", "x " * 40, "&lt;b&gt;", "\u2028", "é漢" * 9, "</s>"]
    )
    codes = st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"])
    lines = st.tuples(st.lists(words, max_size=4), st.sampled_from(["\n", "\r\n"]), codes)
    text = lines.map(lambda drawn: drawn[1].join(drawn[0]).encode(drawn[2], errors="replace"))
    return Reader(
        files, ("p.txt",), read, (text | changed_bytes(files["p.txt"])).map(lambda content: {"p.txt": content})
    )


@functools.cache
def single_files() -> dict[str, dict[str, np.ndarray]]:
    """The tensors of a VAE, a text encoder and a transformer under their original names: those that `convert` takes."""
    from flax import nnx

    from jsurgery.wan.checkpoint_layouts import original_text_encoder_name, original_vae_name, transformer_tensors
    from jsurgery.wan.model_config import VaeConfig
    from jsurgery.wan.text_encoder import TextEncoder
    from jsurgery.wan.torch_layout import mirrored_tensors
    from jsurgery.wan.transformer import WanTransformer
    from jsurgery.wan.vae import WanVae
    from tests.conftest import TINY_TEXT_ENCODER, TINY_TRANSFORMER, random_module

    rng = np.random.default_rng(0)
    vae = random_module(lambda: WanVae(VaeConfig(base_dim=4), rngs=nnx.Rngs(0)), rng)
    encoder = random_module(lambda: TextEncoder(TINY_TEXT_ENCODER, rngs=nnx.Rngs(0)), rng)
    transformer = random_module(lambda: WanTransformer(TINY_TRANSFORMER, rngs=nnx.Rngs(0)), rng)
    return {
        "vae": {original_vae_name(name): tensor for name, tensor in mirrored_tensors(vae).items()},
        "text_encoder": {original_text_encoder_name(name): t for name, t in mirrored_tensors(encoder).items()},
        "transformer": transformer_tensors(transformer, "original"),
    }


def try_converting(folder: pathlib.Path, name: str = "m.safetensors") -> None:
    """`convert`, which leaves a whole result or none."""
    try:
        command("convert", f"--model={folder / name}", f"--output={folder}/out")
    except InputError:
        assert not [file for file in (folder / "out").rglob("*") if file.is_file()], "a refused model left files"
        raise
    finally:
        shutil.rmtree(folder / "out", ignore_errors=True)


def single_file_reader(part: str) -> Reader:
    """`convert` of one file of a VAE or text encoder, as other programs name its tensors."""
    files = {"m.safetensors": safetensors.numpy.save(single_files()[part])}
    return Reader(files, ("m.safetensors",), try_converting)


def original_folder_reader() -> Reader:
    """`convert` of the original repository's folder, of which a file was changed or is packed differently."""
    import torch

    packed: dict[str, list[bytes]] = {}
    for part, name in (("vae", "Wan2.1_VAE.pth"), ("text_encoder", "models_t5_x.pth")):
        state = {key: torch.tensor(tensor) for key, tensor in single_files()[part].items()}
        for content in (state, {"state_dict": {f"module.{key}": t for key, t in state.items()}, "step": 1}):
            for zipped in (True, False):
                stream = io.BytesIO()
                torch.save(content, stream, _use_new_zipfile_serialization=zipped)
                packed.setdefault(name, []).append(stream.getvalue())
    fields = {"_class_name": "WanModel", "model_type": "t2v", "num_heads": 2, "eps": 1e-6, "dim": 24, "text_len": 512}
    files = {
        "config.json": as_json(fields),
        "diffusion_pytorch_model.safetensors": safetensors.numpy.save(single_files()["transformer"]),
        "google/umt5-xxl/spiece.model": files_of("tokenizer")["spiece.model"],
    } | {name: contents[0] for name, contents in packed.items()}
    valid = {name: st.just(content) for name, content in files.items()}
    of = {name: gentle_changes(content) for name, content in files.items() if name.endswith(("json", "safetensors"))}
    of |= {name: st.sampled_from(contents) | changed_bytes(contents[0]) for name, contents in packed.items()}
    drawn = st.sampled_from(sorted(of)).flatmap(lambda name: st.fixed_dictionaries(valid | {name: of[name]}))
    return Reader(files, tuple(files), lambda folder: try_converting(folder, ""), drawn)


def index_reader(kind: str) -> Reader:
    """`encode --dry_run` of an index, which reads every row."""
    rows = [{"path": f"{name}.mp4", "cap": caption} for name, caption in (("a", "one"), ("b", "two"), ("c", "é"))]
    content = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "json": json.dumps({"data": rows}),
        "csv": 'path,caption\na.mp4,"one, two"\nb.mp4,two\nc.mp4,three\n',
        "tsv": "path\tcaption\na.mp4\tone, two\nb.mp4\ttwo\nc.mp4\tthree\n",
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
    "sample_numbers": numbers_reader,
    "sample_formats": formats_reader,
    "sample_prompts": prompts_reader,
    "convert_names": names_reader,
    "convert_vae": lambda: single_file_reader("vae"),
    "convert_text_encoder": lambda: single_file_reader("text_encoder"),
    "convert_folder": original_folder_reader,
    "encode_jsonl": lambda: index_reader("jsonl"),
    "encode_json": lambda: index_reader("json"),
    "encode_csv": lambda: index_reader("csv"),
    "encode_tsv": lambda: index_reader("tsv"),
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
    if reader.drawn is not None:
        return reader.drawn
    gentle = lambda file: gentle_changes(reader.files[file])
    of = lambda file: gentle(file) | gentle(file) | changes(reader.files[file])
    valid = {file: st.just(reader.files[file]) for file in reader.changed}
    one = st.sampled_from(reader.changed).flatmap(lambda file: st.fixed_dictionaries(valid | {file: of(file)}))
    return one | st.fixed_dictionaries({file: gentle(file) for file in reader.changed})


def output_names() -> st.SearchStrategy[tuple[str, str]]:
    """(a flag, a name for its file): any characters but a slash and NUL, of any length, with a suffix or without."""
    letters = st.characters(blacklist_characters="/\0", blacklist_categories=())
    plain = st.text(letters, min_size=1, max_size=40) | st.sampled_from(["12:30", "-x", "~", "100%d", "a b", "n" * 251])
    suffixes = st.sampled_from([".mp4", ".gif", ".png", ".mp4", ".gif", ".png", "", ".webm"])
    return st.tuples(st.sampled_from(["--output", "--json"]), st.tuples(plain, suffixes).map("".join))


@functools.cache
def one_frame() -> np.ndarray:
    return np.zeros((1, 16, 16, 3), np.uint8)


@contextlib.contextmanager
def quick_sampling(frames: int = 1) -> Iterator[None]:
    """Inside the block, `sample` writes black frames and loads no model."""

    def make_videos(config: Any, requests: Any) -> Any:
        for request in requests:
            write_video(request.file, one_frame().repeat(frames, 0), config.video.fps, {"prompt": request.prompt})
            yield request.file

    making, sample.make_videos = sample.make_videos, make_videos
    try:
        yield
    finally:
        sample.make_videos = making


def check_output(drawn: tuple[str, str], folder: pathlib.Path) -> str:
    """The file of `sample --output` or of `cost --json` has the name that was asked for, or the command refuses it."""
    flag, name = drawn
    output = folder / name
    arguments = ("sample", "--prompt=x", *SIZE) if flag == "--output" else ("cost", "--config=tiny")
    try:
        with quick_sampling():
            command(*arguments, f"{flag}={output}")
    except InputError:
        assert not list(folder.iterdir()), f"{name!r} was refused, and something was written"
        return "refused"
    assert [file.name for file in folder.iterdir()] == [name]
    assert read_settings(output) == {"prompt": "x"} if flag == "--output" else json.loads(output.read_bytes())
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


def video_rates() -> st.SearchStrategy[tuple[int, str]]:
    return st.tuples(st.integers(1, 12), st.integers(-2, 240).map(str) | st.sampled_from(["23.976", "x", "1e3", "30"]))


def check_video_rate(drawn: tuple[int, str], folder: pathlib.Path) -> str:
    """An mp4 of `sample` has all its frames at the rate that was asked for, and says its colours."""
    frames, fps = drawn
    output = folder / "o.mp4"
    try:
        with quick_sampling(frames):
            command("sample", "--prompt=x", f"--output={output}", f"--config.video.fps={fps}", *SIZE)
    except InputError:
        assert not output.exists()
        return "refused"
    with av.open(str(output)) as container:
        stream = container.streams.video[0]
        times = [frame.pts * frame.time_base for frame in container.decode(stream)]
        assert times == [Fraction(number) / Fraction(fps) for number in range(frames)], times
        assert stream.codec_context.colorspace == stream.codec_context.color_primaries == 1  # BT.709
    output.unlink()
    return "taken"


def clip_folders() -> st.SearchStrategy[tuple[list[str], set[str], str | None]]:
    """(files of a folder, those of them that have a caption, a list of captions beside them or None)."""
    names = st.sets(st.sampled_from(CLIP_NAMES), min_size=1, max_size=6).map(sorted)
    lists = st.sampled_from([None, None, None, "metadata.csv", "metadata.jsonl", "videos.txt", "loop"])
    return st.tuples(names, st.sets(st.sampled_from(CLIP_NAMES)), lists)


def check_clips(drawn: tuple[list[str], set[str], str | None]) -> str:
    """`encode --dry_run` of a folder counts the clips whose names are those of videos, and no hidden ones."""
    names, captioned, listed = drawn
    with tempfile.TemporaryDirectory() as parent:
        folder = pathlib.Path(parent)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"")
            if name in captioned:
                (folder / name).with_suffix(".txt").write_text("a caption")
        if listed == "loop":
            (folder / "again").symlink_to(folder)
        elif listed is not None:
            write_captions(folder, listed, names)
        seen = [name for name in names if not any(part[0] in "._" for part in name.split("/"))]
        videos = [name for name in seen if os.path.splitext(name)[1].lower() in TAKEN]
        own = [name for name in videos if name in captioned]
        if not own and listed not in (None, "loop"):
            videos = own = names  # all that the list names
        try:
            said = command("encode", "--config=tiny", f"--videos={folder}", "--workdir=run", "--dry_run")
        except InputError as refusal:
            assert len(own) < 0.5 * len(videos) or not videos, refusal
            return "refused"
    assert f"encode: {len(videos)} clips, of which {len(videos) - len(own)} cannot be used" in said, said
    return "taken"


def write_captions(folder: pathlib.Path, listed: str, names: Iterable[str]) -> None:
    """Writes the captions of a folder's clips as people keep them."""
    if listed == "videos.txt":
        (folder / listed).write_text("".join(f"{name}\n" for name in names))
        (folder / "prompts.txt").write_text("".join("a caption\n" for _ in names))
    elif listed == "metadata.csv":
        (folder / listed).write_text("file_name,text\n" + "".join(f"{name},a caption\n" for name in names))
    else:
        rows = [json.dumps({"file_name": name, "text": "a caption"}) for name in names]
        (folder / listed).write_text("\n".join(rows))
