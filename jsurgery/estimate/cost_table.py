"""cost: parameters, FLOPs and bytes of a config's model, by the cost model, for a table and for JSON."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from jsurgery.attention.feature_maps import HEDGEHOG, FeatureMapConfig
from jsurgery.attention.kinds.registry import (
    check_rate,
    kind_of,
    parse_block_budget,
    plan_of_budget,
    rate_key,
    rate_name,
)
from jsurgery.attention.map_sizes import map_parameters
from jsurgery.diffusion import velocities_per_step
from jsurgery.errors import InputError
from jsurgery.estimate.paper_claims import paper_claims, percent
from jsurgery.io.files import read_object
from jsurgery.io.results import si_prefix
from jsurgery.rates import Rate
from jsurgery.wan.cost import (
    PARTS,
    BlockCost,
    Cost,
    Workload,
    added_parameters,
    block_bytes,
    block_flops,
    block_parameters,
    embeddings_cost,
    model_bytes,
    model_flops,
    parameters,
    savings,
    share,
    text_encoder_cost,
    workload,
)
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.model_sizes import ModelSizes, find_sizes
from jsurgery.wan.vae_cost import vae_cost

RATES: tuple[Rate, ...] = (1, 2, 4, 8, "linear")
DURATIONS = (81, 101, 121, 141)  # frames, of the paper's Fig. 2
FIG_2_SIZE = (320, 480)
VALUE_BYTES = {"float32": 4, "bfloat16": 2}


def count_cost(config: ConfigDict, config_name: str, plan: str | None, feature_map: str) -> dict[str, Any]:
    """Costs of a block and of the network, for JSON. Weights are not read.

    `plan` is a name like "15R2" or the path of a plan.json; without it an operated model's own plan is counted.
    Raises InputError for a plan that does not fit the model.
    """
    subject = find_sizes(config, config_name)
    work = dataclasses.replace(workload(config, subject.transformer), config=subject.transformer)
    if (hybrid := subject.transformer.hybrid) is not None:
        work = dataclasses.replace(work, feature_map=hybrid.feature_map if hybrid.linear_branch else None)
    if feature_map == HEDGEHOG:
        work = dataclasses.replace(work, feature_map=FeatureMapConfig(1, 1, HEDGEHOG))
    return all_costs(config, subject, work, read_rates(plan, subject.transformer))


def read_rates(plan: str | None, model: WanConfig) -> list[Rate] | None:
    """One kind for each block, or None without a plan. "15R2" converts the first 15: all blocks cost the same."""
    if plan is None:
        return list(model.hybrid.rates) if model.hybrid else None
    if named := parse_block_budget(plan):
        if (rates := plan_of_budget(named, model.num_layers)) is None:
            count = sum(count for count, _ in named)
            raise InputError(f"--plan={plan}: converts {count} blocks, the model has {model.num_layers}")
        return list(rates)
    if not epath.Path(plan).is_file():
        raise InputError(
            f"--plan={plan}: expected a name like '15R2' or a plan.json, found no kind of this name and no such file"
        )
    rates = read_object(plan).get("rates")
    if not isinstance(rates, list) or len(rates) != model.num_layers:
        raise InputError(f"{plan}: rates: expected one for each of the model's {model.num_layers} blocks")
    for block, rate in enumerate(rates):
        check_rate(f"{plan}: rates[{block}]", rate)
    return rates


def all_costs(config: ConfigDict, subject: ModelSizes, work: Workload, plan: Sequence[Rate] | None) -> dict[str, Any]:
    """Everything that the command prints, in FLOPs, bytes and parameters. Rates are keys, as text."""
    video, sampler, model = config.video, config.sampler, dataclasses.replace(subject.transformer, hybrid=None)
    size = VALUE_BYTES[config.model.dtype]
    blocks, shown = model.num_layers, [rate for rate in RATES if work.feature_map or kind_of(rate).has_softmax]
    shown += [rate for rate in dict.fromkeys((*config.plan.rates, *(plan or ()))) if rate not in shown]
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


def parts(cost: BlockCost) -> dict[str, int]:
    return {**vars(cost), "total": cost.total}


def describe_map(work: Workload) -> dict[str, Any] | None:
    """Kind, parameters and FLOPs of one feature map; a hybrid block has two."""
    phi, heads, head_dim = work.feature_map, work.config.num_attention_heads, work.config.attention_head_dim
    if phi is None:
        return None
    polynomial = {"kind": "polynomial", "degree": phi.degree, "layers": phi.layers}
    kind = {"kind": HEDGEHOG} if phi.activation == HEDGEHOG else polynomial
    count = map_parameters(phi, heads, head_dim)
    return {**kind, "parameters": count, "flops": 2 * count * work.tokens}


def durations(work: Workload, rates: Iterable[Rate]) -> list[dict[str, Any]]:
    """FLOPs of one block by duration, at the size of Fig. 2: of the attention core, with projections, of the block."""
    rows = []
    for frames in DURATIONS:
        video = work.of_video(frames, *FIG_2_SIZE)
        row: dict[str, Any] = {"frames": frames, "tokens": video.tokens, "core": {}, "attention": {}, "block": {}}
        for rate in rates:
            flops = block_flops(video, rate)
            row["core"][str(rate)] = flops.core
            row["attention"][str(rate)] = flops.core + flops.projections
            row["block"][str(rate)] = flops.total
        rows.append(row)
    return rows


def conversions(work: Workload, rates: Iterable[Rate]) -> dict[str, list[float]]:
    """By rate: the network's FLOPs as a share of the teacher's with 0, 1, ..., all blocks converted."""
    blocks = work.config.num_layers
    teacher, softmax = model_flops(work, [1] * blocks), block_flops(work, 1).total
    saved = {rate: softmax - block_flops(work, rate).total for rate in rates if rate != 1}
    return {str(rate): [1 - n * flops / teacher for n in range(blocks + 1)] for rate, flops in saved.items()}


def as_text(result: dict[str, Any]) -> str:
    """The tables that the command prints: a block by rate, then the network, the text encoder and the VAE."""
    video = result["video"]
    softmax = result["block"]["1"]
    unit, scale = si_prefix(softmax["flops"]["total"] / 100)
    bytes_unit, bytes_scale = si_prefix(softmax["bytes"]["total"])
    lines = [
        f"{result['model']}, {video['frames']} frames of {video['height']}x{video['width']}: "
        f"{result['tokens']:,} tokens, {result['blocks']} blocks, {result['parameters']:,} parameters",
        f"self-attention with its projections is {percent(result['self_attention_share'])} of a block",
        "",
        f"{f'{unit}FLOP of one block':24}"
        + "".join(f"{name.replace('_', ' '):>17}" for name in PARTS)
        + f"{f'{bytes_unit}B moved':>12}",
    ]
    for rate, cost in result["block"].items():
        cells = "".join(f"{cost['flops'][name] / scale:17,.1f}" for name in PARTS)
        label = rate_name(rate)
        lines.append(f"{label:24}{cells}{cost['bytes']['total'] / bytes_scale:12,.2f}")

    rows = {"embeddings and head": "embeddings_and_head", "transformer, one pass": "forward"}
    rows |= {"text encoder": "text_encoder", "VAE, encoding": "vae_encode", "VAE, decoding": "vae_decode"}
    network = {label: result[key] for label, key in rows.items()}
    if plan := result.get("plan"):
        network = {"with the plan, one pass": plan["forward"], **network}
    (unit, scale), (bytes_unit, bytes_scale) = (si_prefix(result["forward"][key] / 10) for key in ("flops", "bytes"))
    lines += ["", f"{'one video':24}{'parameters':>17}{f'{unit}FLOP':>17}{f'{bytes_unit}B moved':>17}"]
    for label, cost in network.items():
        numbers = f"{cost['flops'] / scale:17,.3f}{cost['bytes'] / bytes_scale:17,.2f}"
        lines.append(f"{label:24}{cost['parameters']:17,}{numbers}")
    sampling = result["sampling"]
    unit, scale = si_prefix(sampling["flops"])
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
