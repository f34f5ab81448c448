"""Seconds of `linear_state`, `attend_with_state` and `softmax_zones`, each in turn with our full-softmax kernel."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jsurgery.attention.map_sizes import num_features
from jsurgery.bench.attention import FORWARDS
from jsurgery.bench.attention_programs import PHI, AttentionShape, arguments, at_rate, compiled
from jsurgery.bench.gpu_evidence.measuring import STABILIZER, measured
from jsurgery.bench.gpu_evidence.rows import Row, Scale
from pallas_kernels import gpu, hybrid_attention, xla

ZONE_RATES = (8, 4, 2, 1)  # whose softmax keys are the prefixes of `softmax_zones`, as in distillation of all rates


def part(row: Row, scale: Scale) -> dict[str, Any]:
    """One function in turn with full softmax by our kernel, or by XLA where there is no GPU."""
    assert row.tokens is not None and row.passes is not None and row.rate is not None and row.function is not None
    size = AttentionShape(row.tokens, scale.heads, scale.head_dim, scale.dtype, STABILIZER)
    if row.implementation == "gpu" and jax.default_backend() != "gpu":
        raise NotImplementedError("without a GPU our kernels are only interpreted, and their time means nothing")
    function, inputs = call(row, size)
    flops = part_flops(row, size)
    contender = timed_program(function, inputs, row.passes) | {
        "name": row.name,
        "flops": FORWARDS[row.passes] * flops,
        "bound": size.flops(1) / flops,
    }
    return measured(full_softmax(size, row.passes), contender, scale.runs)


def call(row: Row, size: AttentionShape) -> tuple[Callable, tuple]:
    """The function of a row and its arrays."""
    module = {"gpu": gpu, "xla": xla}[row.implementation or ""]
    q, k, v, query_map, key_map = arguments(size, row.rate or 1)
    function = getattr(module, row.function or "")
    if row.function == "softmax_zones":
        bounds = tuple(sorted({size.num_softmax(rate) for rate in ZONE_RATES}))
        return functools.partial(function, bounds=bounds), (q, k, v)
    if row.function == "linear_state":
        return function, (k, v, key_map)
    count = size.num_softmax(row.rate or 1)
    state = jax.jit(xla.linear_state)(k[:, count:], v[:, count:], key_map)
    return functools.partial(function, stabilizer=STABILIZER), (q, k[:, :count], v[:, :count], query_map, state)


def part_flops(row: Row, size: AttentionShape) -> int:
    """FLOPs of a row's function, forward, of those of the whole attention: a key's share of the state is its own."""
    features = size.heads * num_features(PHI, size.head_dim)
    per_key = (size.flops("linear") // size.tokens - features) // 2  # reading the state, n_L takes `features` more
    if row.function == "linear_state":
        return size.tokens * per_key
    rate = row.rate or 1
    return size.flops(rate) - (size.tokens - size.num_softmax(rate)) * per_key


def timed_program(function: Callable, inputs: tuple, passes: str) -> dict[str, Any]:
    """The forward as a compiled program, or all gradients of it, with the results for cotangents."""

    def gradients(*inputs: Any) -> tuple:
        results, pullback = jax.vjp(function, *inputs)
        return pullback(results)

    return compiled(jax.jit(function if passes == "forward" else gradients), inputs)


@functools.lru_cache(maxsize=2)
def full_softmax(size: AttentionShape, passes: str) -> dict[str, Any] | None:
    """The baseline, or None where it does not run."""
    implementation = "gpu" if jax.default_backend() == "gpu" else "xla"
    attend = at_rate(hybrid_attention, size, 1, implementation=implementation)
    name = "full softmax, our kernel" if implementation == "gpu" else "full softmax, XLA"
    try:
        return {"name": name, **timed_program(lambda *qkv: attend(*qkv, None, None), arguments(size, 1)[:3], passes)}
    except Exception:
        return None
