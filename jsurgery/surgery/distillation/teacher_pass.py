"""One forward of the teacher that distils the feature maps of all heads, blocks and rates at once.

In every block, one pass over the keys gives the softmax branch of every R-hybrid and the teacher's own output. The
gradients of the feature maps are computed right there from the block's queries, keys and values, so that nothing but
gradients leaves a block.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jsurgery.attention.feature_maps import LearnedMaps
from jsurgery.attention.hybrid import token_order
from jsurgery.attention.kinds.base import TeacherBlock
from jsurgery.attention.kinds.candidates import for_all_heads, for_every_head, maps_of, of_every_block, together
from jsurgery.attention.kinds.prefix_losses import nested_softmax
from jsurgery.attention.kinds.registry import kind_of
from jsurgery.attention.rope import rope_tables
from jsurgery.attention.token_shards import TokenShards
from jsurgery.config import block_numbers
from jsurgery.rates import Rate, rate_chain
from jsurgery.runtime.mesh import LOGICAL, batch_shards, sharding
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


def stacked(records: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *records)


def visit_blocks(
    teacher: WanTransformer,
    batch: dict[str, jax.Array],
    sets: Sequence[LearnedMaps],
    spec: DistillSpec,
    visit: Callable[[list[Any], Any], Any],
    combine: Callable[[Sequence[Any]], Any] = stacked,
    all_blocks: bool = False,
) -> tuple[jax.Array, Any]:
    """Runs the teacher over a batch and `visit(maps, at)` for every candidate kind in the spec's blocks.

    `maps` are the kind's in each of the `sets`, with a copy of a projection for each head. `at` is what the kind
    observes of the block (`Kind.observe`), and `at.rate` the kind's spelling. `visit` returns leaves [heads, ...], and
    `combine` makes one record of those of all kinds, with leaves [rates, heads, ...]. Returns (velocity, records), with
    leaves [blocks, rates, heads, ...]. Without `all_blocks` the forward stops after the last distilled block, and the
    velocity is then not the teacher's.
    On a mesh each device calls `visit` with its piece of the batch, and records are the sums over all devices.
    """
    num_blocks = teacher.config.num_layers
    spread_sets = [for_every_head(maps, teacher.config.num_attention_heads) for maps in sets]
    mesh, axis = teacher.attention_mesh, LOGICAL["sequence"]
    grid = teacher.config.token_grid(batch["latents"].shape[1:4])
    order = token_order(grid, spec.chain, spec.lattice, teacher.shards)
    tokens = TokenShards(order, axis if teacher.shards > 1 else None, 1 if mesh is None else batch_shards(mesh))

    cos, sin = rope_tables(grid, teacher.config.attention_head_dim, teacher.config.rope_max_seq_len)
    angles = cos[order.permutation], -sin[order.permutation]

    def attention(q, k, v, layer):
        chosen, sets_RxH = layer
        inverse_rope = (tokens.own(angles[0]), tokens.own(angles[1])) if spec.rope == "before" else None
        branches, full = nested_softmax(q, k, v, tokens, spec.rates)
        block = TeacherBlock(q, k, v, grid, tokens, spec.stabilizer, branches, full, inverse_rope)
        records = []
        for index, rate in enumerate(spec.rates):
            maps_H = [maps_of(maps_RxH, spec.rates, index) for maps_RxH in sets_RxH]
            work = lambda maps_H=maps_H, rate=rate: visit(maps_H, kind_of(rate).observe(block))
            records.append(compute_or_zeros(chosen, work))
        return full.output.astype(v.dtype), combine(records)

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
        return teacher.apply_blocks(*inputs, visiting, (None, spread_sets), order=order)
    blocks = np.array(spec.blocks)
    chosen = jnp.asarray(np.isin(np.arange(num_blocks), blocks))
    layers = chosen, of_every_block(spread_sets, spec.blocks, num_blocks)
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
def measure_heads(teacher, batch, sets: Sequence[LearnedMaps], spec: DistillSpec) -> Sequence[dict[str, jax.Array]]:
    """`Kind.statistics` of all heads with each of several sets of maps, leaves [blocks, rates, heads]."""
    visit = lambda sets, at: [kind_of(at.rate).statistics(maps, at) for maps in sets]
    return visit_blocks(teacher, batch, sets, spec, visit)[1]


def loss_gradients(
    teacher, batch, maps: LearnedMaps, spec: DistillSpec, all_blocks: bool = False
) -> tuple[jax.Array, jax.Array, LearnedMaps]:
    """The velocity (see `visit_blocks`), the losses [blocks, rates] and the gradients of `maps`.

    Each map's gradient comes from its own block, rate and head alone, a projection's from all heads of its block.
    """

    def visit(sets, at: Any):
        def loss(maps):
            losses_H = kind_of(at.rate).loss(spec.loss, maps, at)
            return losses_H.sum(), losses_H

        gradients, losses_H = jax.grad(loss, has_aux=True)(sets[0])
        return losses_H, gradients

    def combine(records):
        losses_H, gradients = zip(*records, strict=True)
        return jnp.stack(losses_H), together(gradients, spec.rates)

    velocity, (losses, gradients) = visit_blocks(teacher, batch, [maps], spec, visit, combine, all_blocks)
    return velocity, losses.mean(axis=2), for_all_heads(gradients)


@functools.partial(jax.jit, static_argnames="spec")
def losses_and_gradients(teacher, batch, maps, spec: DistillSpec) -> tuple[jax.Array, LearnedMaps]:
    """The losses and gradients of `loss_gradients`, compiled."""
    return loss_gradients(teacher, batch, maps, spec)[1:]
