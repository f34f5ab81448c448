"""cost: parameters, FLOPs and bytes of a config's model, as a table, as JSON and as a page of figures."""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from jsurgery.attention.hybrid import FeatureMapConfig, Rate
from jsurgery.config import split_topology
from jsurgery.cost import (
    BlockCost,
    Cost,
    Hedgehog,
    Workload,
    added_parameters,
    block_bytes,
    block_flops,
    block_parameters,
    core_flops,
    embeddings_cost,
    feature_map_cost,
    map_parameters,
    model_bytes,
    model_flops,
    num_tokens,
    parameters,
    text_encoder_cost,
    vae_cost,
)
from jsurgery.diffusion import velocities_per_step
from jsurgery.errors import InputError
from jsurgery.files import read_object
from jsurgery.report.cost_figures import PARTS, scaled, write_cost_page
from jsurgery.report.costs import PUBLISHED
from jsurgery.report.templates import rate_key, rate_name
from jsurgery.runtime.stages import write_json
from jsurgery.surgery.plan import named_budget, workload
from jsurgery.wan.pipeline import model_path, pipeline_folder, transformer_folder
from jsurgery.wan.text_encoder import TextEncoderConfig, read_text_encoder_config
from jsurgery.wan.transformer import WanConfig, read_config
from jsurgery.wan.vae import VaeConfig, read_vae_config

SIZES = {"wan_1_3b": "Wan2.1 1.3B", "wan_1_3b_lowres": "Wan2.1 1.3B", "wan_14b": "Wan2.1 14B"}
RATES: tuple[Rate, ...] = (1, 2, 4, 8, "linear")
DURATIONS = (81, 101, 121, 141)  # frames, of the paper's Fig. 2
FIG_2_SIZE = (320, 480)
TABLE_7 = ((2, 2, 1.2, 30), (3, 2, 2.4, 60), (4, 2, 3.9, 70), (6, 3, 15.4, 387))  # degree, layers, M, GFLOP as printed
VALUE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, by its sizes alone."""

    name: str
    transformer: WanConfig
    text_encoder: TextEncoderConfig
    vae: VaeConfig


def cost(
    config: ConfigDict, config_name: str, *, plan: str | None, feature_map: str, report: str | None, figure: str | None
) -> None:
    """Prints what a block and the network cost; `report` is a JSON file, `figure` a folder for `cost.html`.

    `plan` is "15R2" or a plan.json; without it, an operated model's own. No weights are read.
    """
    subject = find_subject(config, config_name)
    work = dataclasses.replace(workload(config, subject.transformer), config=subject.transformer)
    if (hybrid := subject.transformer.hybrid) is not None:
        work = dataclasses.replace(work, feature_map=hybrid.feature_map if hybrid.linear_branch else None)
    if feature_map == "hedgehog":
        work = dataclasses.replace(work, feature_map=Hedgehog())
    result = measure(config, subject, work, read_rates(plan, subject.transformer))
    print(as_text(result), flush=True)
    if report is not None:
        write_json(epath.Path(report), result)
    if figure is not None:
        beside = None if plan is None or named_budget(plan) else epath.Path(plan).parent / "front.json"
        front = read_object(beside) if beside is not None and beside.exists() else None
        print(write_cost_page(epath.Path(figure), result, front))


def find_subject(config: ConfigDict, config_name: str) -> Subject:
    """The sizes in the model's folder; without a model, those published for the config's name."""
    path = config.model.path
    if not path:
        published = SIZES.get(pathlib.PurePath(split_topology(config_name)[0]).stem)
        if published is None:
            expected = f"a model folder, for sizes are published for {', '.join(SIZES)} only"
            raise InputError(f"config.model.path: (empty): expected {expected}; found --config={config_name}")
        return Subject(published, PUBLISHED[published], TextEncoderConfig(), VaeConfig())
    folder = model_path(path)
    transformer = read_config(transformer_folder(folder))
    name = next((name for name, sizes in PUBLISHED.items() if sizes == transformer), pathlib.PurePath(path).name)
    base = pipeline_folder(folder)
    text_encoder = read_text_encoder_config(base / "text_encoder")
    return Subject(name, transformer, text_encoder, read_vae_config(base / "vae"))


def read_rates(plan: str | None, model: WanConfig) -> list[Rate] | None:
    """One rate for each block. Of "15R2" it does not matter which blocks: the first."""
    if plan is None:
        return list(model.hybrid.rates) if model.hybrid else None
    if named := named_budget(plan):
        count, rate = named
        if count > model.num_layers:
            raise InputError(f"--plan={plan}: converts {count} blocks, the model has {model.num_layers}")
        if rate == 0:
            raise InputError(f"--plan={plan}: expected a rate of at least 1 or 'linear', found 0")
        return [rate] * count + [1] * (model.num_layers - count)
    if not epath.Path(plan).is_file():
        raise InputError(f"--plan={plan}: expected a name like '15R2' or a plan.json, found no such file")
    rates = read_object(plan).get("rates")
    if not isinstance(rates, list) or len(rates) != model.num_layers:
        raise InputError(f"{plan}: rates: expected one for each of the model's {model.num_layers} blocks")
    for block, rate in enumerate(rates):
        if rate != "linear" and (type(rate) is not int or rate < 1):
            raise InputError(f"{plan}: rates[{block}]: expected an integer from 1 or 'linear', found {rate!r}")
    return rates


def measure(config: ConfigDict, subject: Subject, work: Workload, plan: Sequence[Rate] | None) -> dict[str, Any]:
    """All that the command tells, in FLOPs, bytes and parameters; keys of rates are text, as in JSON."""
    video, sampler, model = config.video, config.sampler, dataclasses.replace(subject.transformer, hybrid=None)
    size = VALUE_BYTES[config.model.dtype]
    blocks, shown = model.num_layers, list(RATES if work.feature_map else RATES[:-1])
    shown += [rate for rate in dict.fromkeys(plan or ()) if rate not in shown]
    shown.sort(key=rate_key)
    encode, decode = vae_cost(subject.vae, video.frames, video.height, video.width)
    text = text_encoder_cost(subject.text_encoder, config.text_length)
    velocities = sampler.steps * velocities_per_step(sampler.guidance)

    def network(rates: Sequence[Rate]) -> Cost:
        added = added_parameters(model, work.feature_map, rates)
        return Cost(parameters(model) + added, model_flops(work, rates), model_bytes(work, rates, size))

    def whole_video(rates: Sequence[Rate]) -> int:
        return velocities * network(rates).flops + (velocities // sampler.steps) * text.flops + decode.flops

    teacher: list[Rate] = [1] * blocks
    result: dict[str, Any] = {
        "model": subject.name,
        "video": video.to_dict(),
        "tokens": work.tokens,
        "text_tokens": work.text_len,
        "blocks": blocks,
        "parameters": parameters(model),
        "bytes_per_value": size,
        "feature_map": describe_map(work),
        "block": {
            str(rate): {
                "parameters": block_parameters(model) + added_parameters(model, work.feature_map, [rate]),
                "flops": parts(block_flops(work, rate)),
                "bytes": parts(block_bytes(work, rate, size)),
            }
            for rate in shown
        },
        "self_attention_share": share(block_flops(work, 1)),
        "embeddings_and_head": vars(embeddings_cost(work, size)),
        "forward": vars(network(teacher)),
        "text_encoder": vars(text),
        "vae_encode": vars(encode),
        "vae_decode": vars(decode),
        "sampling": {"velocities": velocities, "flops": whole_video(teacher)},
        "durations": durations(work, shown),
        "conversions": conversions(work, shown),
        "paper": paper_claims(),
    }
    if plan is not None:
        result["plan"] = {
            "rates": list(plan),
            "forward": vars(network(plan)),
            "sampling": {"velocities": velocities, "flops": whole_video(plan)},
            "saved": savings(work, plan),
        }
    return result


def parts(found: BlockCost) -> dict[str, int]:
    return {**vars(found), "total": found.total}


def share(found: BlockCost) -> float:
    """Of self-attention with its projections in a block."""
    return (found.core + found.projections) / found.total


def describe_map(work: Workload) -> dict[str, Any] | None:
    """One map phi; a hybrid block has two."""
    phi, heads, head_dim = work.feature_map, work.config.num_attention_heads, work.config.attention_head_dim
    if phi is None:
        return None
    polynomial = isinstance(phi, FeatureMapConfig)
    kind = {"kind": "polynomial", "degree": phi.degree, "layers": phi.layers} if polynomial else {"kind": "hedgehog"}
    one = map_parameters(phi, heads, head_dim)
    return {**kind, "parameters": one, "flops": 2 * one * work.tokens}


def durations(work: Workload, rates: Iterable[Rate]) -> list[dict[str, Any]]:
    """FLOPs of one block by duration at the size of Fig. 2: the core, with projections, and all of it."""
    rows = []
    for frames in DURATIONS:
        tokens = num_tokens(frames, *FIG_2_SIZE)
        row: dict[str, Any] = {"frames": frames, "tokens": tokens, "core": {}, "attention": {}, "block": {}}
        for rate in rates:
            found = block_flops(dataclasses.replace(work, tokens=tokens), rate)
            row["core"][str(rate)] = found.core
            row["attention"][str(rate)] = found.core + found.projections
            row["block"][str(rate)] = found.total
        rows.append(row)
    return rows


def conversions(work: Workload, rates: Iterable[Rate]) -> dict[str, list[float]]:
    """By rate: the network's share of the teacher's FLOPs with 0, 1, ..., all blocks converted."""
    blocks = work.config.num_layers
    teacher, softmax = model_flops(work, [1] * blocks), block_flops(work, 1).total
    less = {rate: softmax - block_flops(work, rate).total for rate in rates if rate != 1}
    return {str(rate): [1 - n * one / teacher for n in range(blocks + 1)] for rate, one in less.items()}


def savings(work: Workload, rates: Sequence[Rate]) -> dict[str, float]:
    """Shares of the teacher's FLOPs that a plan saves: of attention cores, of blocks, of the whole network."""
    blocks = len(rates)
    core = sum(core_flops(work, rate) for rate in rates) / (blocks * core_flops(work, 1))
    block = sum(block_flops(work, rate).total for rate in rates) / (blocks * block_flops(work, 1).total)
    return {
        "core": 1 - core,
        "blocks": 1 - block,
        "network": 1 - model_flops(work, rates) / model_flops(work, [1] * blocks),
    }


def paper_claims() -> list[dict[str, Any]]:
    """The paper's numbers beside this model's count, for Wan2.1 1.3B: rows of claim, printed, counted, note."""
    wan = PUBLISHED["Wan2.1 1.3B"]
    low, high, long = (Workload(wan, num_tokens(*size)) for size in ((81, 320, 480), (81, 480, 832), (121, 320, 480)))
    rows = []

    def claim(text: str, printed: str, counted: str, note: str = "") -> None:
        rows.append({"claim": text, "printed": printed, "counted": counted, "note": note})

    for degree, layers, millions, giga in TABLE_7:
        found = feature_map_cost(degree, layers, wan.num_attention_heads, wan.attention_head_dim, low.tokens)
        counted = f"{found.parameters / 1e6:.1f} M, {found.flops / 1e9:.1f} GFLOP"
        note = "" if abs(found.flops / 1e9 - giga) < 1 else "a slip of the paper: its own parameter count gives ours"
        claim(f"Table 7: degree {degree}, {layers} layers", f"{millions} M, {giga} GFLOP", counted, note)
    claim("self-attention's share of a block at 480x832", "more than 76 %", percent(share(block_flops(high, 1))))

    def saved(work: Workload, count: int, rate: Rate) -> dict[str, float]:
        return savings(work, [rate] * count + [1] * (wan.num_layers - count))

    claim("“up to 40 %”: 15R8 at 320x480, cores", "up to 40 %", percent(saved(low, 15, 8)["core"]), "three readings")
    claim("“up to 40 %”: 25R2 at 480x832, cores", "up to 40 %", percent(saved(high, 25, 2)["core"]))
    claim("“up to 40 %”: 20R8 at 480x832, network", "up to 40 %", percent(saved(high, 20, 8)["network"]))
    claim("15R2 at 480x832, cores", "not printed", percent(saved(high, 15, 2)["core"]))
    claim("15R2 at 480x832, blocks", "not printed", percent(saved(high, 15, 2)["blocks"]))
    before, after = block_flops(long, 1), block_flops(long, 8)
    ratios = (
        ("core", before.core / after.core),
        ("attention with projections", (before.core + before.projections) / (after.core + after.projections)),
        ("the whole block", before.total / after.total),
    )
    for name, ratio in ratios:
        note = "the core alone comes near the printed number" if name == "core" else ""
        claim(f"“6x faster per block” at 121 frames, R8: {name}", "6x", f"{ratio:.2f}x", note)
    return rows


def percent(part: float) -> str:
    return f"{100 * part:.1f} %"


def as_text(result: dict[str, Any]) -> str:
    """The table on standard output: a block by rate, then the network and what stands beside it."""
    video = result["video"]
    softmax = result["block"]["1"]
    (unit, scale), (bytes_unit, bytes_scale) = (
        scaled(softmax["flops"]["total"] / 100),
        scaled(softmax["bytes"]["total"]),
    )
    lines = [
        f"{result['model']}, {video['frames']} frames of {video['height']}x{video['width']}: "
        f"{result['tokens']:,} tokens, {result['blocks']} blocks, {result['parameters']:,} parameters",
        f"self-attention with its projections is {percent(result['self_attention_share'])} of a block",
        "",
        f"{f'{unit}FLOP of one block':24}"
        + "".join(f"{name.replace('_', ' '):>17}" for name in PARTS)
        + f"{f'{bytes_unit}B moved':>12}",
    ]
    for rate, found in result["block"].items():
        cells = "".join(f"{found['flops'][name] / scale:17,.1f}" for name in PARTS)
        label = rate_name(int(rate) if rate.isdecimal() else rate)
        lines.append(f"{label:24}{cells}{found['bytes']['total'] / bytes_scale:12,.2f}")

    rows = {"embeddings and head": "embeddings_and_head", "transformer, one pass": "forward"}
    rows |= {"text encoder": "text_encoder", "VAE, encoding": "vae_encode", "VAE, decoding": "vae_decode"}
    network = {label: result[key] for label, key in rows.items()}
    if plan := result.get("plan"):
        network = {"with the plan, one pass": plan["forward"], **network}
    (unit, scale), (bytes_unit, bytes_scale) = (scaled(result["forward"][key] / 10) for key in ("flops", "bytes"))
    lines += ["", f"{'one video':24}{'parameters':>17}{f'{unit}FLOP':>17}{f'{bytes_unit}B moved':>17}"]
    for label, found in network.items():
        numbers = f"{found['flops'] / scale:17,.3f}{found['bytes'] / bytes_scale:17,.2f}"
        lines.append(f"{label:24}{found['parameters']:17,}{numbers}")
    sampling = result["sampling"]
    unit, scale = scaled(sampling["flops"])
    lines.append(
        f"sampling, {sampling['velocities']} passes, text encoder, VAE: {sampling['flops'] / scale:,.2f} {unit}FLOP"
    )
    if plan:
        saved = plan["saved"]
        lines.append(
            f"the plan saves {percent(saved['core'])} of attention cores, {percent(saved['blocks'])} of blocks, "
            f"{percent(saved['network'])} of the network; "
            f"sampling with it: {plan['sampling']['flops'] / scale:,.2f} {unit}FLOP"
        )
    return "\n".join(lines)
