"""Readers on files that were changed at random: each must read or refuse them, and touch no other file.

    python tests/faults/fuzz.py READER --minutes=10     (READER may be `all`, as in `make fuzz`)
    python tests/faults/fuzz.py READER --examples=5000

A reader may raise only InputError, and may take at most `PATIENCE` seconds of CPU time. It must not change its folder
or open files outside of it. Hypothesis shrinks and prints contents on which a reader fails; add them to `REGRESSIONS`.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from etils import epath
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from jsurgery import cli, config
from jsurgery.attention.kinds.registry import check_rates
from jsurgery.config import base, check_video, flatten
from jsurgery.errors import InputError
from jsurgery.load_config import load_config
from jsurgery.runtime.compile_cache import default_folder

PATIENCE = 30
SECRET = "outside.safetensors"  # a file outside of the folder, which no reader may open
ODD_VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, 10**400, -0.5, 0.5, 1e308, math.nan, math.inf, "", "x",
    "1", "linear", "\0", "\ud800", "\x1b[2J", "a" * 300, "../" + SECRET, "/etc/passwd", "gs://bucket/x", "~", ".",
    [], {}, [[]], [[[1]]], {"a": 1}, ["../" + SECRET], [0.5, "x"], [1] * 50,
]  # fmt: skip
ODD_FILES = [
    b"", b"\0", b"{}", b"[]", b"null", b"0", b'"x"', b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\xff\xfe{}",
    b"<!DOCTYPE html><html></html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    b"PK\x03\x04", b"\x80\x04.", b"\xef\xbb\xbf{}", b'{"a": 1, "a": 2}', b"NaN", b"\r\n\r\n", "\u2028\u0085".encode(),
]  # fmt: skip


@dataclasses.dataclass
class Reader:
    """`files` are a valid folder, those in `changed` are fuzzed, and `read` reads the folder.

    `drawn` gives {file: content}, for a reader with changes of its own.
    """

    files: dict[str, bytes]
    changed: tuple[str, ...]
    read: Callable[[pathlib.Path], Any]
    drawn: st.SearchStrategy[dict[str, bytes]] | None = None


def changes(valid: bytes) -> st.SearchStrategy[bytes]:
    """Contents of a file that are similar to valid ones, or entirely different."""
    kinds = [st.sampled_from(ODD_FILES), changed_bytes(valid)]
    with contextlib.suppress(ValueError):
        kinds += 3 * [changed_json(json.loads(valid)).map(lambda value: json.dumps(value).encode())]
    if len(valid) > 8 and int.from_bytes(valid[:8], "little") < len(valid):
        kinds += 3 * [changed_header(valid)]
    return st.one_of(kinds)


@st.composite
def changed_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 20))
        kind = draw(st.sampled_from(["flip", "cut", "drop", "insert", "repeat", "overwrite"]))
        if kind == "flip" and position < len(content):
            content[position] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del content[position:]
        elif kind == "drop":
            del content[position : position + length]
        elif kind == "repeat":
            content[position:position] = content[position : position + length] * draw(st.integers(1, 50))
        else:
            text = draw(st.binary(max_size=20) | st.sampled_from([b'"', b"{", b"]", b",", b"\n", b"-", b"e9", b"\0"]))
            content[position : position + (len(text) if kind == "overwrite" else 0)] = text
    return bytes(content)


@st.composite
def changed_json(draw: st.DrawFn, valid: Any) -> Any:
    """A document with one to three nodes replaced, removed, renamed, copied from elsewhere or changed by a number."""
    root = [copy.deepcopy(valid)]
    for _ in range(draw(st.integers(1, 3))):
        places = list(nodes(root))
        holder, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(["replace", "replace", "remove", "rename", "exchange", "nudge"]))
        if action == "replace" or holder is root:
            holder[key] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
        elif action == "remove":
            del holder[key]
        elif action == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["", "x", "../" + SECRET, "a\0", "\ud800", str(key) + "_"]))] = holder.pop(key)
        elif action == "exchange":
            other, other_key = draw(st.sampled_from(places))
            if other_key in other if isinstance(other, dict) else other_key < len(other):
                holder[key] = copy.deepcopy(other[other_key])
        elif isinstance(holder[key], int | float):
            holder[key] += draw(st.integers(-10, 10))
    return root[0]


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields (container, key) of every node of a document."""
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(item, dict | list):
            yield from nodes(item)


@st.composite
def changed_header(draw: st.DrawFn, valid: bytes) -> bytes:
    """A safetensors file with a changed header, whose length is given correctly."""
    size = int.from_bytes(valid[:8], "little")
    text = json.dumps(draw(changed_json(json.loads(valid[8 : 8 + size])))).encode()
    return len(text).to_bytes(8, "little") + text + valid[8 + size :]


_watched: list[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None and event == "open" and isinstance(arguments[0], str | bytes):
        _watched.append(os.fsdecode(arguments[0]))


sys.addaudithook(_hook)


@contextlib.contextmanager
def watch(folder: pathlib.Path) -> Iterator[None]:
    """Fails if the body takes too long, or opens a file outside of `folder` that belongs to no library."""
    global _watched

    def stop(*_: Any) -> None:
        raise AssertionError(f"took longer than {PATIENCE} s")

    before = {alarm: signal.signal(alarm, stop) for alarm in (signal.SIGVTALRM, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE)  # not ITIMER_PROF, whose signal libtpu sends as well
    signal.alarm(20 * PATIENCE)  # wall-clock time, for a busy machine
    _watched = opened = []
    try:
        yield
    finally:
        _watched = None
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        for alarm, handler in before.items():
            signal.signal(alarm, handler)
    ours = str(pathlib.Path(__file__).parents[2])
    compiled = str(default_folder())
    code = (
        sys.prefix,
        sys.base_prefix,
        os.path.dirname(os.__file__),
        ours,
        "/proc",
        "/sys",
        "/dev",
        str(folder),
        compiled,  # and the folder of the tests beside it, whose name is longer
        os.environ.get("JAX_COMPILATION_CACHE_DIR", compiled),
    )
    for path in map(os.path.abspath, opened):
        assert path.startswith(code), f"opened {path}"


def tree(folder: pathlib.Path) -> dict[str, str]:
    """{path: sha256} of every file in a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def outcome(reader: Reader, folder: pathlib.Path) -> str:
    """Reads the folder; returns "taken" or "refused"."""
    before = tree(folder.parent)
    with watch(folder):
        try:
            reader.read(folder)
            result = "taken"
        except InputError as refusal:
            assert str(refusal).strip(), "the refusal has no message"
            result = "refused"
    assert tree(folder.parent) == before, "files changed"
    return result


def write_folder(reader: Reader, parent: pathlib.Path) -> pathlib.Path:
    """Writes the valid folder, and beside it the file SECRET."""
    folder = parent / "folder"
    for name, content in reader.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (parent / SECRET).write_bytes(safetensors_file())
    return folder


def try_contents(reader: Reader, folder: pathlib.Path, changed: dict[str, bytes]) -> str:
    for name, content in changed.items():
        (folder / name).write_bytes(content)
    return outcome(reader, folder)


def contents(reader: Reader) -> st.SearchStrategy[dict[str, bytes]]:
    """{file: content} of the fuzzed files; if there are several, some may be unchanged."""
    valid = {file: reader.files[file] for file in reader.changed}
    if len(valid) == 1:
        return st.fixed_dictionaries({file: changes(content) for file, content in valid.items()})
    return st.fixed_dictionaries({file: st.just(content) | changes(content) for file, content in valid.items()})


def safetensors_file(scale: float = 1.0) -> bytes:
    import safetensors.numpy

    rng = np.random.default_rng(0)
    tensors = {"a.weight": rng.normal(size=(3, 4)), "a.bias": np.zeros(4, np.float16), "empty": np.zeros((0, 2))}
    return safetensors.numpy.save({name: tensor * scale for name, tensor in tensors.items()}, {"format": "pt"})


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def tensors_of(folder: pathlib.Path) -> Any:
    from jsurgery.io.safetensors import read_tensors

    return read_tensors(folder)


def readers() -> dict[str, Callable[[], Reader]]:
    """{name: function that makes a reader}; some make a model folder first."""
    return {
        "safetensors": lambda: Reader({"w.safetensors": safetensors_file()}, ("w.safetensors",), tensors_of),
        "index": index_reader,
        "transformer": lambda: component("transformer"),
        "hybrid": lambda: component("hybrid"),
        "vae": lambda: component("vae"),
        "text_encoder": lambda: component("text_encoder"),
        "tokenizer": tokenizer_reader,
        "hashes": hashes_reader,
        "manifest": manifest_reader,
        "plan": plan_reader,
        "errors": errors_reader,
        "costs": costs_reader,
        "marker": marker_reader,
        "scheduler": scheduler_reader,
        "prompts": prompts_reader,
        "captions_jsonl": lambda: captions_reader("jsonl"),
        "captions_csv": lambda: captions_reader("csv"),
        "captions_json": lambda: captions_reader("json"),
        "vbench_info": vbench_info_reader,
        "vbench_results": vbench_results_reader,
        "study": study_reader,
    }


def index_reader() -> Reader:
    import safetensors.numpy

    shard = lambda name: safetensors.numpy.save({name: np.ones((2, 3), np.float32)})
    names = {f"t{i}": f"m-0000{i}-of-00002.safetensors" for i in (1, 2)}
    files = {file: shard(name) for name, file in names.items()}
    index = "m.safetensors.index.json"
    files[index] = as_json({"metadata": {"total_size": 48}, "weight_map": names})
    return Reader(files, (index,), tensors_of)


def model_folder() -> pathlib.Path:
    """A folder with a tiny transformer, hybrid transformer, VAE, text encoder and tokenizer."""
    from flax import nnx

    from jsurgery.attention.hybrid import HybridConfig
    from jsurgery.data import sprites
    from jsurgery.wan.checkpoint import save_text_encoder, save_transformer, save_vae
    from jsurgery.wan.text_encoder import TextEncoder
    from jsurgery.wan.tokenizer import train_tokenizer
    from jsurgery.wan.transformer import WanTransformer
    from jsurgery.wan.vae import WanVae
    from tests.conftest import TINY_TEXT_ENCODER, TINY_TRANSFORMER, TINY_VAE, random_module

    folder, rng = pathlib.Path(tempfile.mkdtemp()), np.random.default_rng(0)
    hybrid = dataclasses.replace(TINY_TRANSFORMER, hybrid=HybridConfig(rates=(2, "linear")))
    for name, sizes in (("transformer", TINY_TRANSFORMER), ("hybrid", hybrid)):
        make = lambda sizes=sizes: WanTransformer(sizes, rngs=nnx.Rngs(0))
        save_transformer(random_module(make, rng), folder / name)
    save_vae(random_module(lambda: WanVae(TINY_VAE, rngs=nnx.Rngs(0)), rng), folder / "vae")
    encoder = random_module(lambda: TextEncoder(TINY_TEXT_ENCODER, rngs=nnx.Rngs(0)), rng)
    save_text_encoder(encoder, folder / "text_encoder")
    train_tokenizer(sprites.all_captions(), folder / "tokenizer", vocab_size=64)
    return folder


@functools.cache
def model_files() -> dict[str, dict[str, bytes]]:
    folder = model_folder()
    found = {part.name: {path.name: path.read_bytes() for path in part.iterdir()} for part in folder.iterdir()}
    shutil.rmtree(folder)
    return found


def files_of(name: str) -> dict[str, bytes]:
    return dict(model_files()[name])


def component(name: str) -> Reader:
    """Reads a component with a fuzzed config.json, without hashes, which would refuse every change."""
    from jsurgery.wan.checkpoint import load_text_encoder, load_transformer, load_vae

    load = {"vae": load_vae, "text_encoder": load_text_encoder}.get(name, load_transformer)
    files = files_of(name)
    del files["hashes.json"]
    return Reader(files, ("config.json",), lambda folder: load(folder))


def tokenizer_reader() -> Reader:
    from jsurgery.wan.tokenizer import Tokenizer

    files = {"spiece.model": files_of("tokenizer")["spiece.model"]}
    return Reader(files, ("spiece.model",), lambda folder: Tokenizer(folder)(["a red circle", "\0 é 漢", ""], 16))


def hashes_reader() -> Reader:
    from jsurgery.wan.folder_hashes import check_hashes

    return Reader(files_of("tokenizer"), ("hashes.json",), check_hashes)


def manifest_reader() -> Reader:
    from jsurgery.io.hashes import MANIFEST, find_damage, write_manifest

    folder = pathlib.Path(tempfile.mkdtemp())
    files = {"a/one": b"1" * 100, "two": b"2" * 10}
    write_folder(Reader(files, (), lambda _: None), folder)
    write_manifest(epath.Path(folder / "folder"))
    files[MANIFEST] = (folder / "folder" / MANIFEST).read_bytes()
    shutil.rmtree(folder)

    def read(folder: pathlib.Path) -> None:
        if found := find_damage(epath.Path(folder)):
            raise InputError(found[0])

    return Reader(files, (MANIFEST, "two"), read)


PLAN = {
    "rates": [2, 8, "linear"], "selection": "heterogeneous", "budget": "1R8", "budget_flops": 2e9, "cost_flops": 1.9e9,
    "teacher_flops": 9e9, "share_of_teacher": 0.2, "error": 0.3, "error_bound": None,
}  # fmt: skip
ERRORS = {
    "rates": [2, 4, 8, "linear"], "errors": [[0.1, 0.2, 0.3, 0.4]] * 3, "blocks": [0, 1, 2],
    "initial_errors": [[0.2, 0.3, 0.4, 0.5]] * 3, "samples": 4, "velocity_errors": [[0.01, 0.02, 0.03, 0.04]] * 3,
}  # fmt: skip


def three_blocks() -> Any:
    from jsurgery.wan.model_config import WanConfig

    return WanConfig(num_layers=3)


def plan_reader() -> Reader:
    from jsurgery.attention.hybrid import HybridConfig
    from jsurgery.surgery.plan import read_plan

    read = lambda folder: HybridConfig.of(base(), read_plan(epath.Path(folder))["rates"])
    return Reader({"plan.json": as_json(PLAN)}, ("plan.json",), read)


def errors_reader() -> Reader:
    """Reads errors.json and makes a plan from it."""
    from jsurgery.surgery.knapsack import solve
    from jsurgery.surgery.plan import budget_cost, read_problem

    settings = base()

    def read(folder: pathlib.Path) -> Any:
        given = read_problem(settings, three_blocks(), epath.Path(folder))
        return solve(given.errors, given.candidate_costs, budget_cost(0.6, given.costs))

    return Reader({"errors.json": as_json(ERRORS)}, ("errors.json",), read)


def costs_reader() -> Reader:
    from jsurgery.surgery.plan import read_costs

    costs = {"unit": "ms", "rates": [1, 2, 8], "blocks": [[30.5, 16, 6], [30, 15, 5], [29, 16, 6]]}
    return Reader({"costs.json": as_json(costs)}, ("costs.json",), lambda folder: read_costs(folder / "costs.json", 3))


def marker_reader() -> Reader:
    from jsurgery.runtime.stage_folder import StageFolder

    settings = base()
    made = StageFolder("", "stage", settings, fields=("seed", "video"))
    marker = {"stage": "stage", "format_version": 1, "complete": True, "made_with": made.made_with}
    files = {"stage/stage.json": as_json(marker)}
    return Reader(files, tuple(files), lambda folder: StageFolder(folder, "stage", settings, ("seed", "video")).done())


def scheduler_reader() -> Reader:
    from jsurgery.wan.schedulers import say_replaced, scheduler_settings

    file = "scheduler/scheduler_config.json"
    content = as_json({"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0})

    def read(folder: pathlib.Path) -> None:
        settings, remarks = scheduler_settings(epath.Path(folder))
        config = load_config("tiny", settings)
        with contextlib.redirect_stderr(io.StringIO()):
            say_replaced(epath.Path(folder), remarks, config.sampler.solver, config.sampler.shift)

    return Reader({file: content}, (file,), read)


def prompts_reader() -> Reader:
    from jsurgery.data.prompts import load_prompts, read_prompts

    def read(folder: pathlib.Path) -> Any:
        settings = base()
        settings.prompts = str(folder / "prompts.txt")
        return read_prompts(str(folder / "prompts.txt")), load_prompts(settings, 1)

    content = "a red circle\n\n“ein Kreis”\r\n<b>x</b>\n".encode()
    return Reader({"prompts.txt": content}, ("prompts.txt",), read)


def captions_reader(kind: str) -> Reader:
    """Reads captions and does what `encode` does with each clip before decoding."""
    from jsurgery.data.clip_index import find_clips
    from jsurgery.data.shards import text_array
    from jsurgery.data.video_reader import Bucket, ClipLimits, Skipped, read_clip

    rows = [
        {"path": f"{name}.mp4", "cap": caption} for name, caption in (("a", "one"), ("b", ["two", "2"]), ("c", "é"))
    ]
    content = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "json": json.dumps(rows),
        "csv": 'path,caption\na.mp4,"one, two"\nb.mp4,two\n',
    }[kind]

    def read(folder: pathlib.Path) -> Any:
        clips = find_clips(str(folder / f"clips.{kind}"))
        json.dumps(clips).encode()
        for clip in clips:
            with contextlib.suppress(Skipped):
                read_clip(clip, ClipLimits([Bucket(1, 16, 16)], 16, 0.4, 1.5))
                text_array(clip.caption)
        return clips

    return Reader({f"clips.{kind}": content.encode(), "a.mp4": b"no video"}, (f"clips.{kind}",), read)


def vbench_info_reader() -> Reader:
    from jsurgery.evaluate.vbench import plan_videos, read_suite

    entries = [
        {"prompt_en": "a person swims", "dimension": ["human_action"]},
        {
            "prompt_en": "a cat",
            "dimension": ["temporal flickering", "object_class"],
            "auxiliary_info": {"object": "cat"},
        },
    ]

    def read(folder: pathlib.Path) -> Any:
        suite, prompts = read_suite(str(folder / "info.json"))
        return plan_videos(base(), suite, prompts, folder / "videos", rule="video", seeds=None)

    return Reader({"info.json": as_json(entries)}, ("info.json",), read)


def vbench_results_reader() -> Reader:
    from jsurgery.evaluate.vbench_scores import read_results, report

    content = as_json({"human_action": [0.9, [{"video_path": "x", "video_results": 1}]], "color": [0.5, []]})
    read = lambda folder: report("model", *read_results([str(folder)]))
    return Reader({"x_eval_results.json": content}, ("x_eval_results.json",), read)


def study_reader() -> Reader:
    from jsurgery.evaluate.study import read_key, table, tally

    pair = {"prompt": "a cat", "dimensions": ["color"], "file": "a.mp4", "first": "b"}
    key = {"study": "s", "a": "one", "b": "two", "pairs": {"p": pair, "q": pair | {"first": "a"}}}
    answers = [{"pair": "p", "answer": "first"}, {"pair": "q", "answer": "none"}]
    export = {"study": "s", "participant": "me", "answers": answers}

    def read(folder: pathlib.Path) -> Any:
        key = read_key(folder / "study.key.json")
        rows, _ = tally([str(folder / "answers.json")], key)
        return table(rows, key)

    files = {"study.key.json": as_json(key), "answers.json": as_json(export)}
    return Reader(files, tuple(files), read)


# Contents on which a reader once failed, found by fuzzing.
DEEP = b"[" * 100_000  # nested deeper than Python's recursion limit
REGRESSIONS: dict[str, list[dict[str, bytes]]] = {
    "captions_json": [{"clips.json": DEEP}],
    "captions_jsonl": [{"clips.jsonl": DEEP}],
    "manifest": [{"manifest.json": DEEP}],
    "scheduler": [
        {"scheduler/scheduler_config.json": as_json({"_class_name": "UniPCMultistepScheduler", "flow_shift": 10**400})}
    ],
    "study": [{"answers.json": DEEP}],
    "vbench_results": [{"x_eval_results.json": DEEP}],
}


def configs() -> st.SearchStrategy[dict[str, str]]:
    """Overrides of one to four fields, most of them with values of a valid type and size."""
    known = flatten(base())
    texts = st.text(max_size=20) | st.sampled_from([*map(repr, ODD_VALUES), "1e999", "-0.0"])
    near = st.integers(-2, 40).map(str) | st.floats().map(repr) | st.lists(st.integers(-1, 20), max_size=4).map(repr)
    values = texts | near | st.sampled_from([value for allowed in config.CHOICES.values() for value in allowed])
    names = st.text(max_size=12) | st.sampled_from(["video", "seed.x"])
    own = st.sampled_from(known).flatmap(lambda field: st.tuples(st.just(field[0]), values | st.just(str(field[1]))))
    return st.lists(own | own | own | st.tuples(names, values), min_size=1, max_size=4).map(dict)


def check_config(overrides: dict[str, str]) -> str:
    """Loads the config and, if it is valid, does what a run derives from its config alone."""
    from jsurgery.attention.hybrid import HybridConfig
    from jsurgery.attention.kinds.registry import parse_block_budget
    from jsurgery.surgery.plan import check_budget
    from jsurgery.wan.model_config import WanConfig

    try:
        loaded = load_config("tiny", overrides)
        HybridConfig.of(loaded, [1])
        parse_block_budget(str(loaded.plan.budget))
        check_budget(loaded, WanConfig(num_layers=6))
    except InputError as refusal:
        assert "config." in str(refusal), refusal
        return "refused"
    return "taken"


def shapes() -> st.SearchStrategy[tuple[Any, ...]]:
    valid_side = st.integers(1, 20).map(lambda k: 16 * k)
    side = valid_side | valid_side | st.integers(-16, 2**40)
    valid_frames = st.integers(0, 8).map(lambda k: 4 * k + 1)
    frames = valid_frames | valid_frames | st.integers(-4, 2**40)
    chains = st.sampled_from([(2,), (1, 2, 4, 8), (2, 8, "linear"), (3, 9), ("linear",), (5,)])
    rate = st.sampled_from([-1, 0, 1, 2, 3, 4, 8, "linear", "x", 2.0, None])
    lattices = st.sampled_from(["strided", "staggered", "staggered_rows", "strided", "staggered", "x"])
    return st.tuples(frames, side, side, chains | chains | st.lists(rate, max_size=4), lattices)


def check_shape(shape: tuple[Any, ...]) -> str:
    """Checks that the token order is a permutation in which the softmax tokens of every rate are a prefix."""
    from jsurgery.attention.token_order import TokenOrder
    from jsurgery.wan.model_config import WanConfig
    from jsurgery.wan.video_size import check_size, latent_grid

    frames, height, width, rates, lattice = shape
    try:
        check_video(frames, height, width)
        check_size(WanConfig(), frames, height, width)
        check_rates("rates", rates)
        t, h, w = WanConfig().token_grid(latent_grid(frames, height, width))
        if t * h * w > 100_000:
            return "large"
        order = TokenOrder(t * h * w, tuple(rates), lattice=lattice, tokens_per_frame=h * w, tokens_per_row=w)
    except InputError:
        return "refused"
    np.testing.assert_array_equal(np.sort(order.permutation), np.arange(t * h * w))
    group = {"strided": t * h * w, "staggered": h * w, "staggered_rows": w}[lattice]
    lattice_position = np.arange(t * h * w) + np.arange(t * h * w) // group
    for rate in rates:
        kept = [] if rate == "linear" else np.flatnonzero(lattice_position % rate == 0)
        np.testing.assert_array_equal(np.sort(order.permutation[: order.num_softmax(rate)]), kept)
    return "taken"


@dataclasses.dataclass
class Effort:
    """How long a reader is fuzzed: until so many minutes are over, or so many examples were tried."""

    minutes: float = math.inf
    examples: float = math.inf


def endless(strategy: st.SearchStrategy, check: Callable[[Any], str], effort: Effort) -> dict[str, int]:
    """Draws and checks until the effort is made; returns how often each outcome occurred."""
    counts: dict[str, int] = {}
    until = time.monotonic() + 60 * effort.minutes
    going = lambda: time.monotonic() < until and sum(counts.values()) < effort.examples
    while going():

        @settings(
            max_examples=500,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def run_example(drawn: Any) -> None:
            if going():
                result = check(drawn)
                counts[result] = counts.get(result, 0) + 1

        run_example()
    return counts


def fuzz(name: str, effort: Effort) -> dict[str, int]:
    from tests.faults import fuzz_commands

    if name in ("outputs", "video_rates"):
        strategy = fuzz_commands.output_names() if name == "outputs" else fuzz_commands.video_rates()
        check = fuzz_commands.check_output if name == "outputs" else fuzz_commands.check_video_rate
        with tempfile.TemporaryDirectory() as folder:
            return endless(strategy, lambda drawn: check(drawn, pathlib.Path(folder)), effort)
    if name == "clip_folders":
        return endless(fuzz_commands.clip_folders(), fuzz_commands.check_clips, effort)
    if name == "rates":
        return endless(fuzz_commands.rates(), fuzz_commands.check_rate, effort)
    if name == "config":
        return endless(configs(), check_config, effort)
    if name == "shapes":
        return endless(shapes(), check_shape, effort)
    gentle = name in fuzz_commands.READERS
    reader = (fuzz_commands.READERS if gentle else readers())[name]()
    with tempfile.TemporaryDirectory() as parent:
        folder = write_folder(reader, pathlib.Path(parent))
        reader.read(folder)  # which imports what it needs
        assert outcome(reader, folder) == "taken", "the valid folder is refused"
        strategy = (fuzz_commands.contents if gentle else contents)(reader)
        return endless(strategy, lambda changed: try_contents(reader, folder, changed), effort)


def main() -> None:
    from tests.faults import fuzz_commands

    names = [*readers(), *fuzz_commands.READERS, "config", "shapes", "outputs", "rates", "video_rates", "clip_folders"]
    parser = argparse.ArgumentParser(description="Readers on files that were changed at random.")
    parser.add_argument("reader", choices=[*names, "all"])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=10.0)
    length.add_argument("--examples", type=int)
    options = parser.parse_args()
    cli.make_parser = functools.cache(cli.make_parser)  # a fifth of what a refused command takes
    effort = Effort(options.minutes) if options.examples is None else Effort(examples=options.examples)
    for name in names if options.reader == "all" else [options.reader]:
        start = time.monotonic()
        counts = fuzz(name, effort)
        runs, seconds = sum(counts.values()), time.monotonic() - start
        share = counts.get("taken", 0) / runs
        print(f"{name}: {runs} runs in {seconds:.0f} s, {share:.0%} taken: {counts}", flush=True)


if __name__ == "__main__":
    main()
