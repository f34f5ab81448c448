"""One forward of the teacher that distils the feature maps of all heads, blocks and rates at once.

In every block, the softmax over each nested zone of keys is computed once and merged into the softmax branch of every
rate and into the teacher's own output. The gradients of the feature maps are computed right there from the block's
queries, keys and values, so that nothing but gradients leaves a block.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jsurgery.attention.hybrid import token_order
from jsurgery.config import block_numbers
from jsurgery.rates import Rate, rate_chain
from jsurgery.runtime.mesh import LOGICAL, batch_shards, sharding
from jsurgery.surgery.distillation.losses import LOSSES, HeadActivations, TokenShards, head_statistics, nested_softmax
from jsurgery.surgery.distillation.saved_maps import FeatureMapPair
from jsurgery.wan.rope import rope_tables
from jsurgery.wan.transformer import WanTransformer


@dataclasses.dataclass(frozen=True)
class DistillSpec:
    """What a distillation trains, and how. Hashable, as it is static to jit."""

    rates: tuple[Rate, ...]
    chain: tuple[int, ...]
    lattice: str
    stabilizer: str
    loss: str
    blocks: tuple[int, ...] | None = None  # None: all
    rope: str = "after"  # what phi sees: queries and keys "before" RoPE or after it

    @classmethod
    def of(cls, config: ConfigDict) -> "DistillSpec":
        hybrid, settings = config.hybrid, config.distill
        rates, blocks = tuple(hybrid.rates), block_numbers(settings.blocks)
        return cls(rates, rate_chain(rates), hybrid.lattice, hybrid.stabilizer, settings.loss, blocks)


def run_heads(
    teacher: WanTransformer,
    batch: dict[str, jax.Array],
    maps: Any,
    spec: DistillSpec,
    visit,
    all_blocks: bool = False,
) -> tuple[jax.Array, Any]:
    """Runs the teacher over a batch and `visit(maps, HeadActivations)` in every head of the spec's blocks.

    Returns (velocity, records). Without `all_blocks` the forward stops after the last distilled block, and the velocity
    is then not the teacher's. Records have leaves [blocks, rates, heads, ...]. On a mesh each device calls `visit` with
    its piece of the batch, and records are the sums over all devices. Heads are looped over, so that one head's scores
    stay in cache.
    """
    mesh, axis = teacher.mesh, LOGICAL["sequence"]
    grid = teacher.config.token_grid(batch["latents"].shape[1:4])
    order = token_order(grid, spec.chain, spec.lattice, teacher.shards)
    tokens = TokenShards(order, axis if teacher.shards > 1 else None, 1 if mesh is None else batch_shards(mesh))

    cos, sin = rope_tables(grid, teacher.config.attention_head_dim, teacher.config.rope_max_seq_len)
    angles = cos[order.permutation], -sin[order.permutation]

    def head(inputs, chosen):
        (q, k, v), maps_R = inputs
        inverse_rope = (tokens.own(angles[0]), tokens.own(angles[1])) if spec.rope == "before" else None
        branches, full = jax.vmap(lambda q, k, v: nested_softmax(q, k, v, tokens, spec.rates))(q, k, v)
        records = []
        for index, rate in enumerate(spec.rates):
            one_head = jax.tree.map(lambda leaf, index=index: leaf[index][None], maps_R)
            at = HeadActivations(rate, q, k, v, branches.get(rate), full, tokens, spec.stabilizer, inverse_rope)
            records.append(compute_or_zeros(chosen, functools.partial(visit, one_head, at)))
        return full.output, jax.tree.map(lambda *leaves: jnp.stack(leaves), *records)

    def attention(q, k, v, layer):
        chosen, maps_RxH = layer
        heads_first = tuple(x.transpose(2, 0, 1, 3).astype(jnp.float32) for x in (q, k, v))
        inputs = heads_first, jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), maps_RxH)
        y, records = jax.lax.map(lambda inputs: head(inputs, chosen), inputs)
        return y.transpose(1, 2, 0, 3).astype(v.dtype), jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), records)

    def over_devices(q, k, v, layer):
        y, records = attention(q, k, v, layer)
        return y, jax.lax.psum(records, (*LOGICAL["batch"], axis))

    visiting = attention
    if mesh is not None:
        spread, by_head = sharding(mesh, "batch", "sequence", "heads").spec, sharding(mesh, None, "heads").spec
        layer = sharding(mesh).spec, by_head
        specs = {"in_specs": (spread, spread, spread, layer), "out_specs": (spread, by_head)}
        visiting = jax.shard_map(over_devices, mesh=mesh, check_vma=False, **specs)
    inputs = batch["latents"], batch["timestep"], batch["text"]
    if spec.blocks is None:
        return teacher.apply_blocks(*inputs, visiting, (None, maps), order=order)
    blocks, every = np.array(spec.blocks), np.arange(teacher.config.num_layers)
    # A block that is not chosen gets the maps of another block and ignores them.
    slots = np.searchsorted(blocks, every).clip(max=len(blocks) - 1)
    layers = jnp.asarray(np.isin(every, blocks)), jax.tree.map(lambda leaf: leaf[slots], maps)
    stop_block = None if all_blocks else blocks[-1] + 1
    velocity, records = teacher.apply_blocks(*inputs, visiting, layers, order=order, stop_block=stop_block)
    return velocity, jax.tree.map(lambda leaf: leaf[blocks], records)


def compute_or_zeros(chosen: jax.Array | None, work: Callable[[], Any]) -> Any:
    """The result of `work`, or zeros, without the work, where `chosen` is False. None: the work is always done."""
    if chosen is None:
        return work()
    zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(work))
    return jax.lax.cond(chosen, work, zeros)


@functools.partial(jax.jit, static_argnames="spec")
def measure_heads(
    teacher, batch, candidates: Sequence[FeatureMapPair], spec: DistillSpec
) -> Sequence[dict[str, jax.Array]]:
    """The `head_statistics` of all heads with each of several sets of maps, leaves [blocks, rates, heads]."""
    visit = lambda candidates, at: [head_statistics(maps, at) for maps in candidates]
    return run_heads(teacher, batch, candidates, spec, visit)[1]


def loss_gradients(
    teacher, batch, maps, spec: DistillSpec, all_blocks: bool = False
) -> tuple[jax.Array, jax.Array, FeatureMapPair]:
    """The velocity (see `run_heads`), the losses [blocks, rates] and the gradients of `maps`. Each map's gradient comes
    from its own block, rate and head alone."""

    def visit(maps, at: HeadActivations):
        loss, gradients = jax.value_and_grad(LOSSES[spec.loss])(maps, at)
        return loss, jax.tree.map(lambda leaf: leaf[0], gradients)

    velocity, (losses, gradients) = run_heads(teacher, batch, maps, spec, visit, all_blocks)
    return velocity, losses.mean(axis=2), gradients


@functools.partial(jax.jit, static_argnames="spec")
def losses_and_gradients(teacher, batch, maps, spec: DistillSpec) -> tuple[jax.Array, FeatureMapPair]:
    """The losses and gradients of `loss_gradients`, compiled."""
    return loss_gradients(teacher, batch, maps, spec)[1:]
