"""bench attention --estimate: cycles of attention on a TPU as its compiler estimates them; no TPU is needed."""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from jsurgery.attention.kinds.registry import rate_name
from jsurgery.bench.attention import PASSES, STOCK
from jsurgery.bench.attention_programs import AttentionShape, arguments, at_rate, of_rows, step
from jsurgery.errors import InputError
from jsurgery.io.files import write_json
from jsurgery.io.results import check_report
from jsurgery.rates import Rate
from jsurgery.runtime.progress import say
from pallas_kernels import stock


def estimate_attention(
    *,
    chip: str,
    rates: tuple[Rate, ...],
    tokens: int,
    heads: int,
    head_dim: int,
    stabilizer: str,
    backward: bool,
    report: str | None = None,
) -> None:
    """Prints the TPU compiler's static estimate of each rate's cycles in bfloat16; `report` names a JSON file for it.

    Raises InputError for an unknown chip, or where libtpu is not installed.
    """
    check_report(report)
    check_estimates(chip)
    kernels = importlib.import_module("pallas_kernels.tpu")
    size = AttentionShape(tokens, heads, head_dim, "bfloat16", stabilizer)
    result: dict[str, Any] = {"static_estimate": True, "chip": chip, **dataclasses.asdict(size), "passes": {}}
    flash = partial(stock.hybrid_attention, num_softmax=tokens, platform="tpu")
    contenders: list[tuple[str, Rate, Callable]] = [(STOCK["tpu"], 1, flash)]
    for rate in dict.fromkeys((1, *rates)):
        blocks = kernels.blocks_for(chip, tokens, size.num_softmax(rate))
        contenders.append((rate_name(rate), rate, at_rate(kernels.hybrid_attention, size, rate, block_sizes=blocks)))
    for passes in PASSES if backward else PASSES[:1]:
        rows = []
        for name, rate, attend in contenders:
            say(f"bench: estimating {name}, {passes}")
            estimate = {"name": name, "rate": rate, "bound": size.bound(rate)}
            estimate |= estimated(chip, size, rate, attend, passes)
            if name == STOCK["tpu"]:  # without XLA's transposes, which a model that uses this kernel may avoid
                estimate["cycles"] -= estimate["xla"]
            rows.append(estimate)
        full = rows[1]["cycles"]
        print(f"static estimate, {chip}, {passes}: million cycles, over our softmax, over flash_attention, FLOP bound")
        for each in rows:
            each |= {"speedup": full / each["cycles"], "over_flash_attention": rows[0]["cycles"] / each["cycles"]}
            print(
                f"{each['name']:20}{each['cycles'] / 1e6:10.3f}{each['speedup']:9.2f}x"
                f"{each['over_flash_attention']:9.2f}x{each['bound']:9.2f}x",
                flush=True,
            )
        result["passes"][passes] = rows
    if report is not None:
        write_json(epath.Path(report), result)


def estimated(chip: str, size: AttentionShape, rate: Rate, attend: Callable, passes: str) -> dict[str, Any]:
    """Static cycles of a layer: {"cycles": the total, "kernels": {name: cycles}, "xla": XLA's other operations}."""
    estimates = importlib.import_module("pallas_kernels.estimate")
    rows = jax.ShapeDtypeStruct((1, size.tokens, size.heads * size.head_dim), jnp.dtype(size.dtype))
    maps = jax.eval_shape(lambda: arguments(dataclasses.replace(size, tokens=1), rate)[3:])
    layer = step(partial(of_rows, attend, size.heads), passes)
    kernels, operations = estimates.estimate_cycles(chip, layer, rows, rows, rows, *maps)
    xla = sum(operations.values())
    return {"cycles": sum(kernels.values()) + xla, "kernels": kernels, "xla": xla}


def check_estimates(chip: str) -> None:
    """Raises InputError for an unknown chip, or where libtpu is not installed."""
    estimates = importlib.import_module("pallas_kernels.estimate")
    if chip not in estimates.CHIPS:
        raise InputError(f"--estimate: expected one of {', '.join(estimates.CHIPS)}, found {chip!r}")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError('--estimate: needs libtpu, found none: pip install "jsurgery[tpu]"')
