"""Bad input ends with one line on stderr and exit code 2, or 3 for a mesh that does not fit; nothing is written."""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from jsurgery import cli
from jsurgery.errors import DoesNotFit, InputError
from jsurgery.io.safetensors import check_tensors, read_tensors
from jsurgery.load_config import load_config
from jsurgery.run import Run
from jsurgery.runtime.mesh import abstract_mesh
from jsurgery.wan.convert import convert
from jsurgery.wan.memory import on_sampling_mesh, sampling_phases
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.model_sizes import find_sizes

ROOT = pathlib.Path(__file__).parents[2]
SMALL = {
    "video.frames": "5",
    "video.height": "64",
    "video.width": "48",
    "hybrid.rates": "(2, 8)",
    "plan.rates": "(1, 2, 8)",
    "plan.budget": "1R8",
}
T_CONFIG, VAE_CONFIG = "transformer/config.json", "vae/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
MODEL = "--config.model.path=model"  # a copy of `tiny_pipeline`, which `{model}` stands for
SAMPLE = "sample --prompt=x --model=model"
PAGE, POINTER = b"<!DOCTYPE html><html></html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"


@dataclasses.dataclass
class Bad:
    """A command, parts of its error message, a function that prepares the folder, and the exit code."""

    arguments: str
    parts: tuple[str, ...]
    prepare: Callable[[pathlib.Path], object] | None = None
    code: int = 2


def surgery(*overrides: str, model: str = "{model}", command: str = "surgery") -> str:
    fields = SMALL | {"model.path": model}
    given = " ".join(f"--config.{name}={text.replace(' ', '')}" for name, text in fields.items())
    return " ".join([f"{command} --config=tiny --workdir=run", given, *overrides])


def written(name: str, content: bytes | str | object) -> Callable[[pathlib.Path], object]:
    """Writes one file; content that is neither bytes nor text is written as JSON."""
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()

    def prepare(folder: pathlib.Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return prepare


def config_file(*lines: str) -> Callable[[pathlib.Path], object]:
    head = "from jsurgery.config import base\n\ndef get_config():\n    c = base()\n"
    return written("mine.py", head + "".join(f"    {line}\n" for line in lines) + "    return c\n")


def changed(name: str, change: Callable[[bytes], bytes], *, hashes: bool = True) -> Callable[[pathlib.Path], object]:
    """Changes a file of the model in `model/`."""

    def prepare(folder: pathlib.Path) -> None:
        file = folder / "model" / name
        file.write_bytes(change(file.read_bytes()))
        if not hashes:
            (file.parent / "hashes.json").unlink()

    return prepare


def edited(name: str, **fields: object) -> Callable[[pathlib.Path], object]:
    """Changes fields of a config.json of the model in `model/` and removes the hashes, which would differ."""
    return changed(name, lambda content: json.dumps(json.loads(content) | fields).encode(), hashes=False)


def png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def configs_of_2_2(image: bytes | None = None, channels: int = 48) -> Callable[[pathlib.Path], object]:
    """Writes `i.png`, and to `m/` the config of a Wan2.2 5B, by its channels: no weights, which nothing may miss."""

    def prepare(folder: pathlib.Path) -> None:
        network = WanConfig(num_attention_heads=1, attention_head_dim=12, in_channels=channels, out_channels=channels)
        written("m/transformer/config.json", network.to_json())(folder)
        (folder / "m" / "vae").mkdir()
        if image is not None:
            (folder / "i.png").write_bytes(image)

    return prepare


def without_index(name: str) -> Callable[[pathlib.Path], object]:
    """Copies the transformer to another part of the pipeline, and removes the list of the pipeline's parts."""

    def prepare(folder: pathlib.Path) -> None:
        shutil.copytree(folder / "model" / "transformer", folder / "model" / name)
        for file in ("model_index.json", "hashes.json"):
            (folder / "model" / file).unlink()

    return prepare


def tensors(*names: str, dtype: str = "U8") -> bytes:
    """A safetensors file with a number under each name."""
    places = {name: {"dtype": dtype, "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate(names)}
    header = json.dumps(places).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * len(names)


def original_folder(folder: pathlib.Path, transformer: bool = True) -> None:
    """The names of the files of the original repository."""
    names = ("config.json", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "google/umt5-xxl/spiece.model")
    for name in names[not transformer :]:
        written(f"m/{name}", b"{}")(folder)


def write_index(weight_map: dict[str, str]) -> Callable[[pathlib.Path], object]:
    def prepare(folder: pathlib.Path) -> None:
        transformer = folder / "model" / "transformer"
        (transformer / "hashes.json").unlink()
        shutil.copy(folder / "model" / TRANSFORMER, folder / "outside.safetensors")
        index = {"metadata": {}, "weight_map": weight_map}
        (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))

    return prepare


def begin_trace(**overrides: str) -> Callable[[pathlib.Path], object]:
    """A workdir in which `trace` has begun with these settings."""

    def prepare(folder: pathlib.Path) -> None:
        fields = SMALL | {"model.path": "model"} | {name.replace("__", "."): text for name, text in overrides.items()}
        with contextlib.chdir(folder):
            Run(load_config("tiny", fields), "run").stages["trace"].begin()

    return prepare


def two_runs(folder: pathlib.Path) -> None:
    """Workdirs `a` and `b` of runs that have begun."""
    for name in "ab":
        written(f"{name}/config.json", {})(folder)


def write_marker(content: object) -> Callable[[pathlib.Path], object]:
    return written("run/trace/stage.json", content)


def linked_to_nothing(name: str) -> Callable[[pathlib.Path], object]:
    """A file of the model in `model/` as a copy of the Hub's cache has it if it keeps links: it leads nowhere."""

    def prepare(folder: pathlib.Path) -> None:
        file = folder / "model" / name
        for hashes in (file.parent / "hashes.json", folder / "model" / "hashes.json"):
            hashes.unlink(missing_ok=True)
        file.unlink()
        file.symlink_to("../../blobs/" + 64 * "a")

    return prepare


def without_tensor(name: str) -> Callable[[bytes], bytes]:
    """Removes a tensor from a safetensors file; its numbers become those of a tensor with another name."""

    def change(content: bytes) -> bytes:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        header["x"] = header.pop(name)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + size :]

    return change


def damaged_original_folder(folder: pathlib.Path) -> None:
    """The original repository's folder, whose VAE is damaged and whose transformer is sound."""
    convert(str(folder / "model"), folder / "m", "original")
    original_folder(folder, transformer=False)


def write_pickle(folder: pathlib.Path) -> None:
    """A pickle that would write a file if it were executed."""
    payload = b"cos\nsystem\n(S'touch executed'\ntR."
    (folder / "weights.pth").write_bytes(b"\x80\x02" + payload)


def write_broken_zip(folder: pathlib.Path) -> None:
    (folder / "weights.pth").write_bytes(b"PK\x03\x04" + b"\0" * 100)


FLAGS = [
    Bad("--modle=x", ("--modle", "did you mean `jsurgery sample --model`?")),
    Bad("surgeri --workdir=run", ("surgeri", "did you mean surgery?", "--help")),
    Bad("surgery --config=tiny", ("--workdir",)),
    Bad("surgery --config=tiny --workdir=run --wokdir=run", ("--wokdir", "did you mean --workdir?")),
    Bad("surgery --config=tiny --workdir=run --config.finetune.steps", ("config.finetune.steps", "VALUE")),
    Bad("sample", ("--prompt",)),
    Bad("sample --prompt=x --prompts_file=y", ("not allowed with",)),
    Bad("ablate --table=evidence --workdir=run --seeds=0", ("--seeds", "positive whole number", "'0'")),
    Bad("evaluate vbench --prompts=p.txt --output=o --shard=4/4", ("--shard", "I/N", "'4/4'")),
    Bad("export --workdir=run --formats=tflit", ("--formats", "tflite", "'tflit'")),
    Bad("convert --model=x --output=y --config.seed=1", ("config.seed", "takes no config")),
    Bad("surgery --workdir=run --num_processes=2", ("--num_processes", "--coordinator")),
    Bad(
        "trace --workdir=run --coordinator=h:1 --num_processes=2 --process_id=2", ("--process_id", "0 to 1", "found 2")
    ),
    Bad("bench attention --rates=1,x", ("--rates", "'x'")),
    Bad("report --compare a b --config=tiny", ("--compare", "--config")),
]
FIELDS = [
    Bad(surgery("--config.finetune.learning_rte=1"), ("did you mean config.finetune.learning_rate?",)),
    Bad(surgery("--config.finetun.steps=1"), ("config.finetun.steps", "did you mean config.finetune.steps?")),
    Bad(surgery("--config.finetune.steps=many"), ("config.finetune.steps", "int", "'many'")),
    Bad(surgery("--config.finetune.batch=-8"), ("config.finetune.batch", "positive", "-8")),
    Bad(surgery("--config.sampler.shift=1e999"), ("config.sampler.shift", "inf")),
    Bad(surgery("--config.distill.steps=9999999999999"), ("config.distill.steps", "at most")),
    Bad(surgery("--config.finetune.teacher_weight=1.5"), ("config.finetune.teacher_weight", "between 0 and 1")),
    Bad(surgery("--config.sampler.solver=heun"), ("config.sampler.solver", "euler_ancestral", "'heun'")),
    Bad(surgery("--config.seed=4294967296"), ("config.seed", "2^32")),
    Bad(surgery("--config.video.frames=16"), ("config.video.frames", "4k + 1", "13 and 17")),
    Bad(surgery("--config.video.height=200"), ("config.video.height", "192 and 208")),
    Bad(surgery("--config.video.width=32768"), ("width axis", "2048", "1024")),
    Bad(surgery("--config.train.vae_crop=(8,80,80)"), ("config.train.vae_crop", "4k + 1")),
    Bad(surgery("--config.hybrid.rates=(2,3)"), ("config.hybrid.rates", "2 does not divide 3")),
    Bad(surgery("--config.plan.rates=(1,16)"), ("config.plan.rates", "rate 16")),
    Bad(surgery("--config.plan.budget=cheap"), ("config.plan.budget", "'cheap'", "15R2")),
    Bad(surgery("--config.plan.budget=0.001"), ("config.plan.budget", "cheapest")),
    Bad(surgery("--config.plan.budget=1R4"), ("config.plan.budget", "'1R4'")),
    Bad(surgery("--config.plan.budget=9R8"), ("config.plan.budget", "9 blocks", "2")),
    Bad(surgery("--config.distill.blocks=1-5"), ("config.distill.blocks", "0 to 1", "5")),
    Bad(surgery("--config.finetune.accumulate=3"), ("config.finetune.accumulate", "divisor")),
    Bad(surgery("--config.trace.holdout=12"), ("config.trace.holdout", "12 of 12")),
    Bad("surgery --config=nowhere.py --workdir=run", ("--config=nowhere.py", "no such file")),
    Bad("surgery --config=tinny --workdir=run", ("--config=tinny", "tiny")),
    Bad("surgery --config=mine.py --workdir=run", ("mine.py", "SyntaxError"), written("mine.py", "def get_config(:\n")),
    Bad("surgery --config=mine.py --workdir=run", ("mine.py", "get_config"), written("mine.py", "x = 1\n")),
    Bad("surgery --config=mine.py --workdir=run", ("mine.py", '"frame"', "frames"), config_file("c.video.frame = 17")),
    Bad("surgery --config=mine.py --workdir=run", ("mine.py", "SystemExit"), config_file("raise SystemExit(0)")),
    Bad("surgery --config=mine.py --workdir=run", ("config.prompts", "null byte"), config_file("c.prompts = 'a\\0b'")),
]
MESHES = [
    Bad(surgery("--config.mesh.tensor=3"), ("tensor 3", "2 heads"), code=3),
    Bad(surgery("--config.mesh.context=4", "--config.mesh.exchange=all_to_all"), ("context 4", "2 heads"), code=3),
    Bad(surgery("--config.mesh.data=3"), ("data 3 x fsdp 1",), code=3),
    Bad(surgery("--config.mesh.fsdp=-1"), ("config.mesh.fsdp", "positive", "-1")),
    Bad(surgery("--config.mesh.exchange=ring"), ("config.mesh.exchange", "gather, all_to_all", "'ring'")),
]
MODELS = [
    Bad(surgery(model="no/such/model"), ("config.model.path", "no/such/model", "no such folder")),
    Bad(surgery(model=""), ("config.model.path", "(empty)", "tiny_wan")),
    Bad(surgery(model="model"), (TRANSFORMER, "truncated"), changed(TRANSFORMER, lambda b: b[:-100])),
    Bad(surgery(model="model"), (TRANSFORMER, "empty"), changed(TRANSFORMER, lambda b: b"")),
    Bad(surgery(model="model"), (TRANSFORMER, "HTML"), changed(TRANSFORMER, lambda b: PAGE)),
    Bad(surgery(model="model"), (TRANSFORMER, "git-LFS", "git lfs pull"), changed(TRANSFORMER, lambda b: POINTER)),
    Bad(surgery(model="model"), (TRANSFORMER, "hash"), changed(TRANSFORMER, lambda b: b[:-1] + bytes([b[-1] ^ 1]))),
    Bad(
        surgery(model="model"),
        (TRANSFORMER, "cut short"),
        changed(TRANSFORMER, lambda b: struct.pack("<Q", 2**62) + b[8:], hashes=False),
    ),
    Bad(surgery(model="model"), ("vae", "missing"), lambda f: [w.unlink() for w in f.glob("model/vae/*.safe*")]),
    Bad(surgery(model="model"), ("spiece.model",), changed("tokenizer/spiece.model", lambda b: PAGE, hashes=False)),
    Bad(
        surgery(model="model"),
        ("text_encoder/config.json", "empty"),
        changed("text_encoder/config.json", lambda b: b""),
    ),
    Bad(
        surgery(model="model"),
        ("transformer/config.json", "truncated or changed"),
        changed("transformer/config.json", lambda b: b"{"),
    ),
    Bad(surgery(model="model"), ("_class_name", "'Flux'"), edited("transformer/config.json", _class_name="Flux")),
    Bad(surgery(model="model"), ("num_layers", "-1"), edited("transformer/config.json", num_layers=-1)),
    Bad(surgery(model="model"), ("vae/config.json", "num_res_blocks"), edited("vae/config.json", num_res_blocks="two")),
    Bad(
        surgery(model="model"),
        ("hybrid.format_version", "9"),
        edited("transformer/config.json", _class_name="HybridWanTransformer3DModel", hybrid={"format_version": 9}),
    ),
    Bad(surgery(model="model"), ("index.json", "b.safetensors", "not there"), write_index({"a": "b.safetensors"})),
    Bad(surgery(model="model"), ("index.json", "in this folder"), write_index({"a": "../../outside.safetensors"})),
    Bad("convert --model=weights.pth --output=out", ("weights.pth", "refused", "os.system"), write_pickle),
    Bad("convert --model=weights.pth --output=out", ("weights.pth", "truncated or damaged"), write_broken_zip),
    Bad("convert --model=model --output=model", ("--output=model", "already")),
    Bad("convert --model=m --output=model/o", ("Wan2.1_VAE.pth", "not a file of torch.save"), damaged_original_folder),
    Bad(
        SAMPLE,
        ("2 tensors do not fit", "missing proj_out.bias", "unexpected x"),
        changed(TRANSFORMER, without_tensor("proj_out.bias"), hashes=False),
    ),
    Bad(SAMPLE, (TRANSFORMER, "a link to ../../blobs/aa", "cp -rL"), linked_to_nothing(TRANSFORMER)),
    Bad(SAMPLE, (T_CONFIG, "a link to ../../blobs/aa"), linked_to_nothing(T_CONFIG)),
    Bad(SAMPLE, (SCHEDULER, "a link to ../../blobs/aa"), linked_to_nothing(SCHEDULER)),
    Bad("push --model=nowhere --repo=a/b", ("--model=nowhere", "no such folder")),
    Bad("push --model=model --repo=a/b", ("pickles", "x.bin"), written("model/x.bin", b"\x80")),
]
MODEL_INDEX, OURS = "model_index.json", "text-to-video Wan2.1"
EXPERT = ["diffusers", "WanTransformer3DModel"]
# Parts of other pipelines of the Wan family, and parts whose sizes do not fit each other.
PARTS = [
    Bad(SAMPLE, ("transformer_2", "Wan2.2 A14B", OURS), edited(MODEL_INDEX, transformer_2=EXPERT)),
    Bad(surgery(model="model"), ("transformer_2", "Wan2.2 A14B"), edited(MODEL_INDEX, transformer_2=EXPERT)),
    Bad(SAMPLE, ("transformer_2", "Wan2.2 A14B"), without_index("transformer_2")),
    Bad(SAMPLE, ("boundary_ratio", "Wan2.2 A14B"), edited(MODEL_INDEX, boundary_ratio=0.875)),
    Bad(SAMPLE, ("image_encoder", "image to video"), edited(MODEL_INDEX, image_encoder=["t", "CLIPVisionModel"])),
    Bad(SAMPLE, ("audio_encoder", "does not know"), edited(MODEL_INDEX, audio_encoder=["t", "Wav2Vec2Model"])),
    *(
        Bad(SAMPLE, (MODEL_INDEX, "WanPipeline", name), edited(MODEL_INDEX, _class_name=name))
        for name in ("WanImageToVideoPipeline", "WanVACEPipeline", "WanAnimatePipeline")
    ),
    Bad(SAMPLE, (MODEL_INDEX, "JSON", "HTML"), changed(MODEL_INDEX, lambda b: PAGE, hashes=False)),
    *(
        Bad(SAMPLE, ("_class_name", task), edited(T_CONFIG, _class_name=f"Wan{name}Transformer3DModel"))
        for name, task in (("VACE", "which is VACE"), ("Animate", "which is Wan Animate"), ("S2V", "which is speech"))
    ),
    Bad(SAMPLE, ("model_type", "'t2v'", "'ti2v'"), edited(T_CONFIG, _class_name="WanModel", model_type="ti2v")),
    Bad(SAMPLE, ("takes 36 channels", "image to video", "VAE has 4"), edited(T_CONFIG, in_channels=36)),
    Bad(f"encode --videos=c --workdir=run {MODEL}", ("takes 36", "VAE has 4"), edited(T_CONFIG, in_channels=36)),
    Bad("cost --config.model.path=model", ("takes 48", "has 4"), edited(T_CONFIG, in_channels=48)),
    Bad(SAMPLE, ("takes 4 channels and leaves 8",), edited(T_CONFIG, out_channels=8)),
    Bad(SAMPLE, ("VAE has 2",), edited(VAE_CONFIG, z_dim=2, latents_mean=[0, 0], latents_std=[1, 1])),
    Bad(SAMPLE, ("text of width 32", "encoder's is 16"), edited(T_CONFIG, text_dim=32)),
    Bad(SAMPLE, ("tokens", "embeddings for 8"), edited("text_encoder/config.json", vocab_size=8)),
    Bad(
        SAMPLE, ("vae/config.json", "AutoencoderKLQwenImage"), edited(VAE_CONFIG, _class_name="AutoencoderKLQwenImage")
    ),
    *(
        Bad(SAMPLE, (name, "new_scale: 2", "may change results"), edited(name, new_scale=2))
        for name in (T_CONFIG, VAE_CONFIG, "text_encoder/config.json")
    ),
    Bad(SAMPLE, ("quantization_config", "in bfloat16"), edited(T_CONFIG, quantization_config={"load_in_4bit": True})),
]
GGUF = b"GGUF\x03\0\0\0" + b"\0" * 500
BFLOAT16 = "bfloat16"
# Formats that are not read, under the names that they have when people try them: each is named, with the way out.
FORMATS = [
    *(
        Bad(SAMPLE, (TRANSFORMER, *parts), changed(TRANSFORMER, lambda b, content=content: content, hashes=False))
        for content, parts in (
            (GGUF, ("a GGUF file", BFLOAT16)),
            (b"\x80\x02}q\0." + b"\0" * 50, ("a pickle", "jsurgery convert")),
            (b"PK\x03\x04" + b"\0" * 50, ("it is a pickle", "jsurgery convert")),
            (b"\x1f\x8b\x08" + b"\0" * 50, ("gzip",)),
            (b"Entry not found", ("the text 'Entry not found'", "server's answer")),
            (POINTER, ("git-LFS", "git lfs pull")),
            (PAGE, ("HTML", "login")),
            (tensors("blocks.0.self_attn.q.lora_down.weight"), ("a LoRA", "--lora", "lora_down")),
            (tensors("diffusion_model.blocks.0.self_attn.q.lora_A.weight"), ("a LoRA", "--lora", "lora_A")),
            (tensors("blocks.0.ffn.0.weight", "blocks.0.ffn.0.scale_weight", "scaled_fp8"), ("fp8_scaled", BFLOAT16)),
            (tensors("a.weight", "a.weight.quant_state.bitsandbytes__nf4"), ("bitsandbytes", "NF4", BFLOAT16)),
            (tensors("a.qweight", "a.qzeros"), ("GPTQ", BFLOAT16)),
            (tensors("a.weight", "a.weight_scale_inv"), ("fp8_scaled", "weight_scale_inv", BFLOAT16)),
            (tensors("blocks.0._checkpoint_wrapped_module.ffn.0.int8_weight"), ("int8", BFLOAT16)),
            (tensors("a.weight._data", "a.weight._scale"), ("quanto", BFLOAT16)),
            (tensors("a.weight", dtype="F8_E4M3"), ("F8_E4M3", BFLOAT16)),
        )
    ),
    Bad("convert --model=m.gguf --output=out", ("m.gguf", "a GGUF file", BFLOAT16), written("m.gguf", GGUF)),
    Bad("convert --model=m --output=out", ("m.gguf", "GGUF is not read", BFLOAT16), written("m/m.gguf", GGUF)),
    Bad("convert --model=m --output=out", ("m.bin", "pickles are not read", "convert"), written("m/m.bin", b"\x80")),
    Bad("convert --model=m.bin --output=out", ("m.bin", "truncated or damaged"), written("m.bin", b"\x80\x02garbage")),
    Bad("sample --prompt=x --model=m", ("m", "`jsurgery convert --model=m --output=m-Diffusers`"), original_folder),
    Bad("sample --prompt=x --model=m", ("alone", "-Diffusers"), written("m/config.json", {"_class_name": "WanModel"})),
]
WIDTH = 24  # of `tiny_pipeline`'s transformer
LAYER, OTHER = "diffusion_model.blocks.0.self_attn.q", "lora_unet_blocks_35_ffn_0"


def lora(name: str = "l.safetensors", /, **tensors: tuple[int, ...]) -> Callable[[pathlib.Path], object]:
    """Writes a LoRA of zeros; `__` stands for a dot in the tensors' names."""
    header, end = {}, 0
    for tensor, shape in tensors.items():
        size = 4 * math.prod(shape)
        header[tensor.replace("__", ".")] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return written(name, struct.pack("<Q", len(text)) + text + bytes(end))


def pair(layer: str = LAYER, rank: int = 2, out: int = WIDTH, into: int = WIDTH, up_rank: int | None = None) -> dict:
    name = layer.replace(".", "__")
    return {f"{name}__lora_down__weight": (rank, into), f"{name}__lora_up__weight": (out, up_rank or rank)}


WITH_LORA = f"{SAMPLE} --lora l.safetensors"
LORAS = [
    Bad(f"{SAMPLE} --lora nowhere.safetensors", ("--lora=nowhere.safetensors", "no such file")),
    Bad(surgery("--config.model.lora=nowhere.safetensors"), ("--lora=nowhere.safetensors", "no such file")),
    Bad("convert --model=model --output=out --lora nowhere.safetensors", ("--lora=nowhere", "no such file")),
    Bad(WITH_LORA, ("l.safetensors", "another base", "as for Wan2.1 1.3B"), lora(**pair(out=1536, into=1536))),
    Bad(surgery("--config.model.lora=l.safetensors"), ("another base", "(48, 24)"), lora(**pair(out=48))),
    Bad(WITH_LORA, ("another base", "block 35", "blocks of width"), lora(**pair(OTHER))),
    Bad(WITH_LORA, (LAYER.removeprefix("diffusion_model."), "of one rank", "(2, 24)"), lora(**pair(up_rank=4))),
    Bad(WITH_LORA, ("lora_A without lora_B",), lora(**dict(list(pair().items())[:1]))),
    Bad(f"{SAMPLE} --lora a b --lora_scale 1", ("lora_scale", "2 LoRAs", "found 1")),
    Bad(f"{SAMPLE} --lora a --lora_scale much", ("--lora_scale", "'much'")),
    Bad("convert --model=model --output=out --lora a b --lora_scale 1", ("lora_scale", "2 LoRAs", "found 1")),
    Bad(WITH_LORA, ("does not have", "img_emb.proj.1"), lora(**pair() | pair("diffusion_model.img_emb.proj.1"))),
    Bad(WITH_LORA, ("norm_q", "bias"), lora(blocks__0__self_attn__norm_q__diff_b=(WIDTH,))),
    Bad(WITH_LORA, ("a DoRA", "dora_scale"), lora(**pair(), blocks__0__self_attn__q__dora_scale=(WIDTH, 1))),
    Bad(WITH_LORA, ("a LoKr", "lokr_w1"), lora(blocks__0__self_attn__q__lokr_w1=(2, 2))),
    Bad(WITH_LORA, ("a LoHa", "hada_w1_a"), lora(blocks__0__self_attn__q__hada_w1_a=(2, 2))),
    Bad(WITH_LORA, ("expected a LoRA", "attn1.to_q.weight"), lora(blocks__0__attn1__to_q__weight=(WIDTH, WIDTH))),
    Bad(WITH_LORA, ("l.safetensors", "HTML"), written("l.safetensors", PAGE)),
    Bad(surgery("--config.finetune.lora_rank=500"), ("config.finetune.lora_rank", "at most", "found 500")),
    Bad(f"{SAMPLE} --kind=wan2.1-1.4b", ("--kind=wan2.1-1.4b", "did you mean")),
    Bad(f"{SAMPLE} --kind=wan2.2-t2v-a14b", ("--kind", "two experts")),
    Bad(f"{SAMPLE} --kind=lightx2v-14b", ("--kind=lightx2v-14b", "40 blocks of width 5120")),
    Bad(surgery("--config.sampler.timesteps=(500,700)"), ("config.sampler.timesteps", "fall from 1000")),
    Bad(f"{SAMPLE} --config.sampler.timesteps=(1000,700)", ("config.sampler.timesteps", "2 of them")),
]
FILES = [
    Bad(surgery("--config.data.path=nowhere"), ("config.data.path", "nowhere", "no such folder")),
    Bad(surgery("--config.prompts=nowhere.txt"), ("config.prompts", "nowhere.txt", "no such file")),
    Bad(surgery("--config.prompts=p.txt"), ("p.txt", "expected 20 prompts, found 1"), written("p.txt", "one\n")),
    Bad(surgery("--config.prompts=p.txt"), ("p.txt", "found none"), written("p.txt", "")),
    Bad(surgery("--config.prompts=p.txt"), ("p.txt", "UTF-8"), written("p.txt", b"\xff\xfe\x00")),
    Bad(surgery("--config.prompts=model"), ("model", "text file")),
    Bad(
        surgery("--config.plan.costs=c.json"),
        ("c.json", "expected a row"),
        written("c.json", {"unit": "ms", "rates": [1, 2, 8], "blocks": [[3, 2, 1]] * 3}),
    ),
    Bad("sample --prompts_file=nowhere.txt", ("--prompts_file=nowhere.txt", "No such file")),
    Bad("sample --prompt=", ("--prompt", "empty")),
    Bad("sample --prompt=\udcff", ("--prompt", "UTF-8")),
    Bad("sample --prompt=x --output=out.webm", (".mp4", "out.webm")),
    Bad("sample --prompt=x --output=model.mp4", ("folder",), lambda f: (f / "model.mp4").mkdir()),
    Bad("sample --prompt=x --output=file/out.mp4", ("--output=file/out.mp4", "File exists"), written("file", b"")),
    Bad(f"sample --prompt=x --output={'a' * 252}.mp4", ("--output=", "at most 255 bytes, found 256")),
    Bad("sample --prompt=x --output=s3://b/o.mp4", ("--output=s3://b/o.mp4", "local path or gs://")),
    Bad("sample --prompts_file=http://a/b.txt", ("--prompts_file=http://a/b.txt", "found http://")),
    Bad(surgery(model="hf://org/name"), ("--config.model.path=hf://org/name", "found hf://")),
    Bad("sample --prompt=x --output=/proc/o.mp4", ("--output=/proc/o.mp4", "No such file")),
    Bad(
        "evaluate vbench --prompts=p.txt --output=gs://b/o",
        ("--output=gs://b/o", "local folder"),
        written("p.txt", "x"),
    ),
    Bad("evaluate vbench --prompts=p.txt --output=p.txt/o", ("p.txt", "Not a directory"), written("p.txt", "x")),
    Bad(f"cost --config=tiny --json={'a' * 256}", ("--json=", "at most 255 bytes")),
    Bad("cost --config=tiny --json=/proc/c.json", ("--json=/proc/c.json", "No such file")),
    Bad("cost --config=tiny --json=pipe", ("--json=pipe", "a device or a pipe"), lambda f: os.mkfifo(f / "pipe")),
    Bad("sample --prompt=x --output=/dev/o.mp4", ("--output=/dev/o.mp4", "a device or a pipe")),
    Bad("report --compare a b --output=/proc/c.html", ("--output=/proc/c.html", "No such file"), two_runs),
    Bad("sample --prompt=x --frames=4", ("config.video.frames", "4k + 1")),
    Bad(f"encode --videos=nowhere --workdir=run {MODEL}", ("--videos=nowhere", "no such")),
    Bad(f"encode --videos=clips --workdir=run {MODEL}", ("clips", "found none"), lambda f: (f / "clips").mkdir()),
    Bad(
        f"encode --videos=clips --workdir=run {MODEL}",
        ("1 of 1 clips cannot be used", "a.mp4 (no caption)", "metadata.csv"),
        written("clips/a.mp4", b"a video"),
    ),
    Bad(f"encode --videos=c.xlsx --workdir=run {MODEL}", ("c.xlsx", ".jsonl"), written("c.xlsx", b"PK")),
    Bad(f"encode --videos=c.csv --workdir=run {MODEL}", ("c.csv", "path", "found id"), written("c.csv", "id\na.mp4\n")),
    Bad(f"encode --videos=c.csv --workdir=run {MODEL}", ("c.csv", "caption"), written("c.csv", "file\na.mp4\n")),
    Bad(f"encode --videos=c.jsonl --workdir=run {MODEL}", ("c.jsonl", "row 1"), written("c.jsonl", '{"path"')),
    Bad("evaluate vbench --prompts=i.json --output=o", ("i.json", "JSON"), written("i.json", "[")),
    Bad(
        "evaluate vbench --prompts=i.json --output=o", ("i.json", "dimension"), written("i.json", [{"prompt_en": "a"}])
    ),
    Bad("evaluate vbench-results r.json", ("r.json", "0 to 1", "2"), written("r.json", {"color": [2, []]})),
    Bad("evaluate study-results a.json", ("study.key.json",), written("a.json", {})),
    Bad("evaluate study --a=x --b=y", ("x",)),
    Bad("cost --config=wan_1_3b --plan=p.json", ("p.json", "30 blocks"), written("p.json", {"rates": [1, 2]})),
    Bad("cost --config=tiny --json=nowhere/c.json", ("nowhere",)),
    Bad("roofline --topology=v5e:4x4 --compiled c.json", ("c.json", "compile --json"), written("c.json", [1])),
    Bad("roofline --topology=v5e:axb", ("v5e:axb",)),
    Bad("report --workdir=nowhere", ("nowhere", "folder of a run")),
]
WORKDIRS = [
    Bad(surgery(command="distill"), ("trace", "run that stage first")),
    Bad(surgery("--config.seed=1", model="model"), ("trace/stage.json", "seed was 0, is 1"), begin_trace()),
    Bad(surgery(model="model"), ("trace/stage.json", "another version", "99"), write_marker({"format_version": 99})),
    Bad(surgery(model="model"), ("trace/stage.json", "marker"), write_marker("")),
    Bad(surgery(model="model"), ("trace/stage.json", "damaged"), write_marker({"complete": True})),
    Bad(surgery(), ("run", "File exists"), written("run", b"a file")),
    Bad(surgery().replace("--workdir=run", "--workdir=/proc/run"), ("/proc/run", "No such file")),
    Bad("synthesize --prompts_file=p.txt --workdir=/proc/run", ("/proc/run",), written("p.txt", "a cat\n")),
]
IMAGE = "sample --prompt=x --model=m --width=64 --height=32 --frames=5 --image=i.png"
IMAGES = [
    Bad(IMAGE, ("--image=i.png", "no such file"), configs_of_2_2()),
    Bad(IMAGE, ("--image=i.png", "expected an image"), configs_of_2_2(PAGE)),
    Bad(IMAGE, ("--image=i.png", "expected an image", "truncated"), configs_of_2_2(png()[:-30])),
    Bad(f"{IMAGE} --dry_run", ("--image=i.png", "expected an image"), configs_of_2_2(b"")),
    Bad(IMAGE.replace("=32", "=48"), ("height", "a multiple of 32, found 48"), configs_of_2_2(png())),
    Bad(IMAGE, ("--image=i.png", "m makes videos from text alone", "Wan2.2 TI2V 5B"), configs_of_2_2(png(), 16)),
]
TABLE = [*FLAGS, *FIELDS, *MESHES, *MODELS, *PARTS, *FORMATS, *LORAS, *FILES, *WORKDIRS, *IMAGES]
# Also run in a process of their own, as a user would: one of each kind.
PROCESSES = [FLAGS[1], FIELDS[0], MESHES[0], MODELS[2], FILES[2], WORKDIRS[1]]


def label(bad: Bad) -> str:
    return (
        " ".join(word for word in bad.arguments.split() if word.split("=")[0][9:] not in SMALL)[-60:]
        .encode(errors="replace")
        .decode()
    )


def set_up(bad: Bad, folder: pathlib.Path, model: pathlib.Path) -> list[str]:
    if "model" in bad.arguments.replace("{model}", "").replace("config.model", ""):
        shutil.copytree(model, folder / "model")
    if bad.prepare is not None:
        bad.prepare(folder)
    return [word.replace("{model}", str(model)) for word in bad.arguments.split()]


def tree(folder: pathlib.Path) -> dict[str, str]:
    """{path: hash, or "folder"} of everything in a folder."""
    found = sorted(folder.rglob("*"))
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder" for p in found}


def check(bad: Bad, code: int | None, out: str, err: str, before: dict[str, str], folder: pathlib.Path) -> None:
    assert code == bad.code, err
    assert out == ""
    assert len(err.splitlines()) == 1 and err.startswith("jsurgery: ") and err.endswith("\n"), err
    assert "Traceback" not in err and " object at 0x" not in err, err
    for part in bad.parts:
        assert part in err, err
    assert tree(folder) == before


@pytest.mark.parametrize("bad", TABLE, ids=label)
def test_bad_input_is_refused(bad, tmp_path, tiny_pipeline, monkeypatch, capsys):
    arguments = set_up(bad, tmp_path, tiny_pipeline)
    monkeypatch.chdir(tmp_path)
    before, model = tree(tmp_path), tree(tiny_pipeline)
    capsys.readouterr()
    code = cli.main(arguments)
    check(bad, code, *capsys.readouterr(), before, tmp_path)
    assert tree(tiny_pipeline) == model


@pytest.mark.parametrize("bad", PROCESSES, ids=label)
def test_bad_input_of_a_process_is_refused(bad, tmp_path, tiny_pipeline):
    arguments = set_up(bad, tmp_path, tiny_pipeline)
    before = tree(tmp_path)
    process = subprocess.run(
        [sys.executable, "-m", "jsurgery", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    check(bad, process.returncode, process.stdout, process.stderr, before, tmp_path)


def test_the_table_has_at_least_40_different_cases():
    assert len({bad.arguments + str(bad.parts) for bad in TABLE}) == len(TABLE) >= 40


def test_control_valid_input_is_not_refused(tmp_path, tiny_pipeline):
    """The valid settings and model that the table changes are not refused."""
    Run(load_config("tiny", SMALL | {"model.path": str(tiny_pipeline)}), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_control_characters_are_escaped(capsys):
    assert cli.complain("a\x1b[2Jb\nc\x07 é\u202e", 2) == 2
    assert capsys.readouterr().err == "jsurgery: a\\x1b[2Jb c\\x07 é\\u202e\n"


@pytest.mark.parametrize("missing", ["transformer/config.json", "tokenizer/spiece.model", "vae/config.json"])
def test_a_missing_file_is_named(tmp_path, tiny_pipeline, missing):
    model = shutil.copytree(tiny_pipeline, tmp_path / "model")
    (model / missing).unlink()
    with pytest.raises(InputError, match=missing.split("/")[0]):
        Run(load_config("tiny", SMALL | {"model.path": str(model)}), str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (lambda valid: b"", "empty"),
        (lambda valid: b"abc", "truncated"),
        (lambda valid: PAGE + b" " * 500, "HTML"),
        (lambda valid: POINTER, "git-LFS"),
        (lambda valid: b"PK\x03\x04" + valid, "pickle"),
        (lambda valid: valid[:50], "truncated"),
        (lambda valid: valid[:-1], "truncated"),
        (lambda valid: valid + b"\0", "truncated or damaged"),
        (lambda valid: valid[:8] + b"x" * (len(valid) - 8), "truncated or damaged"),
    ],
    ids=["empty", "three bytes", "html", "lfs", "pickle", "half a header", "a byte short", "a byte long", "no json"],
)
def test_the_quick_check_and_the_full_read_refuse_the_same_files(tmp_path, tiny_pipeline, content, cause):
    valid = (tiny_pipeline / TRANSFORMER).read_bytes()
    file = tmp_path / "model.safetensors"
    file.write_bytes(content(valid))
    for read in (check_tensors, read_tensors):
        with pytest.raises(InputError, match=cause):
            read(file)
    file.write_bytes(valid)
    check_tensors(file)


def test_a_decode_too_large_for_the_device_is_said_before_sampling():
    """Sampling alone would fit. Nothing is loaded for this: it is arithmetic."""
    size = {"video.height": "1440", "video.width": "2560"}
    config = load_config("wan_1_3b", size)
    sizes, mesh = find_sizes(config, "wan_1_3b"), abstract_mesh(config.mesh)
    bytes_of = {phase.name: phase.bytes for phase in sampling_phases(config, sizes, mesh, 1, 1)}
    enough = bytes_of["decoding"] * 100 // 95 + 1
    assert bytes_of["sampling"] < bytes_of["decoding"] / 2
    on_sampling_mesh("sample", config, sizes, 1, 1, enough)
    with pytest.raises(DoesNotFit, match=r"sample: expected at most .* a device, found"):
        on_sampling_mesh("sample", config, sizes, 1, 1, enough // 2)
