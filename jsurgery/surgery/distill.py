"""distill: the feature maps of every block at every rate, in one pass of the teacher over its traces, or as it samples.

Each step runs the teacher once. In every block, the softmax over the nested token zones is computed once and merged
into the softmax branch of every rate (and into the teacher's own output); the feature maps get their gradients on the
spot from the queries, keys and values that pass by. Nothing but gradients leaves a block.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from jsurgery.attention.hybrid import (
    FeatureMapConfig,
    LearnedMap,
    Rate,
    feature_map,
    init_feature_maps,
    token_order,
)
from jsurgery.attention.token_order import TokenOrder
from jsurgery.config import block_numbers, check_rates
from jsurgery.data.latents import Rows
from jsurgery.diffusion import solver_step
from jsurgery.errors import InputError
from jsurgery.files import read_object, shown
from jsurgery.runtime import processes
from jsurgery.runtime.guard import kept, rows_with_faults
from jsurgery.runtime.loop import run_steps
from jsurgery.runtime.mesh import LOGICAL, batch_pieces, fetched, local_rows, make_mesh, put_rows, put_state, sharding
from jsurgery.runtime.progress import Progress
from jsurgery.runtime.stages import write_json
from jsurgery.surgery.interleaved import Trajectories, answer, question, turns
from jsurgery.surgery.trace import TraceSteps
from jsurgery.wan.pipeline import latent_grid
from jsurgery.wan.rope import apply_rope, rope_tables
from jsurgery.wan.safetensors_files import read_tensors, write_tensors
from jsurgery.wan.transformer import WanTransformer
from pallas_kernels.reference import EPSILON

CALIBRATION_BATCHES = 8
LARGEST_LOG_SCALE = 20.0
INITIAL, TRAINED = "initial.safetensors", "feature_maps.safetensors"
# Of queries and of keys, leaves [blocks, rates, heads, ...]; blocks are those of `Setup.blocks`.
Maps = tuple[LearnedMap, LearnedMap]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Branch:
    """Softmax over a set of keys: output [B, N, H, D], log-sum-exp [B, N, H] and largest score [B, N, H]."""

    output: jax.Array
    lse: jax.Array
    largest: jax.Array

    def merge(self, other: "Branch") -> "Branch":
        """Softmax over the union of two disjoint sets of keys."""
        lse = jnp.logaddexp(self.lse, other.lse)
        mine, theirs = jnp.exp(self.lse - lse)[..., None], jnp.exp(other.lse - lse)[..., None]
        return Branch(mine * self.output + theirs * other.output, lse, jnp.maximum(self.largest, other.largest))


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Where the tokens of a computation lie: in `order`, whole, or in as many pieces as a mesh axis is long.

    q, k and v are a device's own piece; sums over tokens are then of its own, until `total` adds up all pieces. The
    batch may lie in `batch_pieces`, too.
    """

    order: TokenOrder
    axis: str | None = None
    batch_pieces: int = 1

    @property
    def valid(self) -> jax.Array | None:
        """bool [N], False at this piece's padding."""
        if self.axis is None or self.order.valid is None:
            return None
        return jnp.asarray(self.order.valid).reshape(self.order.shards, -1)[jax.lax.axis_index(self.axis)]

    def own(self, x_PxF: np.ndarray) -> jax.Array:
        """This piece's tokens [N, F] of all places."""
        if self.axis is None:
            return jnp.asarray(x_PxF)
        return jnp.asarray(x_PxF).reshape(self.order.shards, -1, x_PxF.shape[-1])[jax.lax.axis_index(self.axis)]

    def masked(self, x: jax.Array, start: int = 0) -> jax.Array:
        """[..., N - start, F] of the tokens from `start` on, zero at padding."""
        return x if self.valid is None else jnp.where(self.valid[start:, None], x, 0)

    def total(self, x: Any) -> Any:
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def zone(self, x_NxF: jax.Array, start: int, stop: int) -> jax.Array:
        """Tokens `start` to `stop` of every piece."""
        own = x_NxF[start:stop]
        return own if self.axis is None else jax.lax.all_gather(own, self.axis, tiled=True)

    def zone_valid(self, start: int, stop: int) -> np.ndarray | None:
        """bool, False at the padding of `zone`."""
        if self.order.valid is None:
            return None
        return self.order.valid.reshape(self.order.shards, -1)[:, start:stop].reshape(-1)

    def mean(self, x_BxN: jax.Array) -> jax.Array:
        """This piece's contribution to the mean over the batch and all tokens."""
        return jnp.sum(self.masked(x_BxN[..., None])) / (x_BxN.shape[0] * self.batch_pieces * self.order.num_tokens)


def softmax_over(q_NxD: jax.Array, k_MxD: jax.Array, v_MxD: jax.Array, valid_M: np.ndarray | None = None) -> Branch:
    """One head of one example: output [N, D], the rest [N]."""
    s_NxM = q_NxD @ k_MxD.T * q_NxD.shape[-1] ** -0.5
    if valid_M is not None:
        s_NxM = jnp.where(valid_M, s_NxM, jnp.finfo(s_NxM.dtype).min)
    largest_N = s_NxM.max(axis=-1)
    p_NxM = jnp.exp(s_NxM - largest_N[:, None])
    mass_N = p_NxM.sum(axis=-1)
    return Branch(p_NxM @ v_MxD / mass_N[:, None], largest_N + jnp.log(mass_N), largest_N)


def nested_softmax(q_NxD, k_NxD, v_NxD, tokens: Tokens, rates: Sequence[Rate]) -> tuple[dict[Rate, Branch], Branch]:
    """The softmax branch of every rate but "linear", and full softmax, each key visited once."""
    sizes = {rate: tokens.order.num_softmax(rate) for rate in rates if rate != "linear"}

    def zone(start: int, stop: int) -> Branch:
        keys, values = (tokens.zone(x, start, stop) for x in (k_NxD, v_NxD))
        return softmax_over(q_NxD, keys, values, tokens.zone_valid(start, stop))

    branches, merged, start = {}, None, 0
    for rate, size in sorted(sizes.items(), key=lambda item: item[1]):
        merged = zone(start, size) if merged is None else merged.merge(zone(start, size))
        branches[rate], start = merged, size
    rest = zone(start, len(k_NxD))
    return branches, rest if merged is None else merged.merge(rest)


@dataclasses.dataclass(frozen=True)
class Visit:
    """One head of one block as it passes by: q, k, v [B, N, D], softmax over a rate's keys (None at "linear") and over
    all of them."""

    rate: Rate
    q: jax.Array
    k: jax.Array
    v: jax.Array
    branch: Branch | None
    full: Branch
    tokens: Tokens
    stabilizer: str
    turn_back: tuple[jax.Array, jax.Array] | None = None  # RoPE's angles [N, D/2], negated, if phi sees what was before

    @property
    def start(self) -> int:
        """The first linear key."""
        return self.tokens.order.num_softmax(self.rate)

    @property
    def inputs(self) -> tuple[jax.Array, jax.Array]:
        """The queries, and the linear keys, as phi sees them."""
        q, k = self.q, self.k
        if (angles := self.turn_back) is not None:
            q, k = (apply_rope(x[:, :, None], *angles)[:, :, 0] for x in (q, k))
        return q, k[:, self.start :]

    def features(self, maps: Maps) -> tuple[jax.Array, jax.Array]:
        """phi_q [B, N, F] of the queries and phi_k [B, M, F] of the linear keys, zero at padding."""
        phi_q, phi_k = (phi(x[:, :, None])[:, :, 0] for phi, x in zip(maps, self.inputs, strict=True))
        return self.tokens.masked(phi_q), self.tokens.masked(phi_k, self.start)


def hybrid_output(maps: Maps, at: Visit) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Eq. 5 of one head from its finished softmax branch: y [B, N, D], n_S [B, N], n_L [B, N]."""
    phi_q_BxNxF, phi_k_BxMxF = at.features(maps)
    state = phi_k_BxMxF.swapaxes(1, 2) @ at.v[:, at.start :], phi_k_BxMxF.sum(axis=1)
    state_BxFxD, z_BxF = at.tokens.total(state)
    o_L_BxNxD, n_L_BxN = phi_q_BxNxF @ state_BxFxD, jnp.einsum("bnf,bf->bn", phi_q_BxNxF, z_BxF)
    branch = at.branch
    if branch is None:
        return o_L_BxNxD / (n_L_BxN + EPSILON)[..., None], jnp.zeros_like(n_L_BxN), n_L_BxN
    n_S_BxN = jnp.exp(branch.lse - branch.largest) if at.stabilizer == "max" else jnp.ones_like(branch.lse)
    y = (n_S_BxN[..., None] * branch.output + o_L_BxNxD) / (n_S_BxN + n_L_BxN)[..., None]
    return y, n_S_BxN, n_L_BxN


def value_loss(maps: Maps, at: Visit) -> jax.Array:
    """Eq. 7: the mean absolute difference of the block's attention output."""
    return at.tokens.mean(jnp.abs(hybrid_output(maps, at)[0] - at.full.output).mean(axis=-1))


def attention_loss(maps: Maps, at: Visit) -> jax.Array:
    """Eq. 6 over the linear keys: log(1 + sum_j (exp(s_ij - c_i) - phi_q(q_i) phi_k(k_j))^2), averaged over queries.

    The average is inside the logarithm. c_i is the stabiliser's (for "linear": the full log-sum-exp), so that the
    features learn the mass that eq. 5 asks for. A linear key may still score far above all softmax keys: a factor
    exp(2 top) is taken out of the sum. Expanded as sum E^2 - 2 sum phi_q . (E phi_k) + tr(Gram_q Gram_k): the squared
    difference is never formed, and E has no gradient.
    """
    tokens, branch = at.tokens, at.branch
    shift = at.full.lse if branch is None else branch.largest if at.stabilizer == "max" else branch.lse
    valid_M = tokens.zone_valid(at.start, at.k.shape[1])

    @jax.checkpoint
    def example(q_NxD, k_NxD, shift_N, phi_q_NxF, phi_k_MxF):
        k_MxD = tokens.zone(k_NxD, at.start, len(k_NxD))
        s_NxM = q_NxD @ k_MxD.T * q_NxD.shape[-1] ** -0.5 - shift_N[:, None]
        if valid_M is not None:
            s_NxM = jnp.where(valid_M, s_NxM, -jnp.inf)
        top = jnp.maximum(tokens.masked(s_NxM).max(), 0.0)
        if tokens.axis is not None:
            top = jax.lax.pmax(top, tokens.axis)
        e_NxM, phi_k_MxF = tokens.masked(jnp.exp(s_NxM - top)), phi_k_MxF * jnp.exp(-top)
        grams = jnp.sum(tokens.total(phi_q_NxF.T @ phi_q_NxF) * tokens.total(phi_k_MxF.T @ phi_k_MxF))
        learned_NxF = e_NxM @ tokens.zone(phi_k_MxF, 0, len(phi_k_MxF))
        own = jnp.sum(e_NxM**2) - 2 * jnp.sum(phi_q_NxF * learned_NxF)
        squares = tokens.total(own) + grams
        return 2 * top + jnp.log1p(jnp.expm1(-2 * top) + squares / tokens.order.num_tokens)

    # Every piece of the sequence arrives at the same loss, of which it contributes its share.
    losses_B = jax.vmap(example)(at.q, at.k, shift, *at.features(maps))
    return jnp.mean(losses_B) / (tokens.order.shards * tokens.batch_pieces)


LOSSES = {"value": value_loss, "attention": attention_loss}


def statistics(maps: Maps, at: Visit) -> dict[str, jax.Array]:
    """Sums and means of one head: error and size of the output; the softmax keys' share of the denominator, and in the
    teacher; the linear keys' mass, and what the teacher's would be."""
    tokens, branch, full = at.tokens, at.branch, at.full
    y, n_S_BxN, n_L_BxN = hybrid_output(maps, at)
    if branch is None:
        wanted_BxN = n_L_BxN  # a ratio alone is left of n_L: any scale does
        teacher_share_BxN = jnp.zeros_like(n_L_BxN)
    else:
        teacher_share_BxN = jnp.exp(branch.lse - full.lse)
        # exp(lse) over the linear keys, in units of the stabiliser.
        shift = branch.largest if at.stabilizer == "max" else branch.lse
        wanted_BxN = jnp.exp(full.lse - shift) - jnp.exp(branch.lse - shift)
    return {
        "error": jnp.sum(tokens.masked(jnp.abs(y - full.output))),
        "size": jnp.sum(tokens.masked(jnp.abs(full.output))),
        "share": tokens.mean(n_S_BxN / (n_S_BxN + n_L_BxN + EPSILON)),
        "teacher_share": tokens.mean(teacher_share_BxN),
        "mass": tokens.mean(n_L_BxN),
        "wanted_mass": tokens.mean(wanted_BxN),
    }


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is distilled: static, hence hashable."""

    rates: tuple[Rate, ...]
    chain: tuple[int, ...]
    lattice: str
    stabilizer: str
    loss: str
    blocks: tuple[int, ...] | None = None  # None: all
    rope: str = "after"  # what phi sees: queries and keys "before" RoPE or after it

    @classmethod
    def of(cls, config: ConfigDict) -> "Setup":
        hybrid, settings = config.hybrid, config.distill
        rates, blocks = tuple(hybrid.rates), block_numbers(settings.blocks)
        return cls(rates, rate_chain(rates), hybrid.lattice, hybrid.stabilizer, settings.loss, blocks)


def rate_chain(rates: Sequence[Rate]) -> tuple[int, ...]:
    """The nested zones that the token order needs for these rates."""
    return tuple(sorted({1, *(rate for rate in rates if isinstance(rate, int))}))


def visit_heads(
    teacher: WanTransformer, batch: dict[str, jax.Array], maps: Maps, setup: Setup, visit, whole: bool = False
) -> tuple[jax.Array, Any]:
    """Runs the teacher over a batch and `visit(maps, Visit)` in every head of the setup's blocks.

    Returns the teacher's velocity, which blocks after the setup's last are part of only if it is asked for `whole`, and
    the records, leaves [blocks, rates, heads, ...]: sums over the batch's pieces where a mesh has several, so `visit`
    returns what its piece contributes. Heads are looped over: a head's scores stay in cache.
    """
    mesh, axis = teacher.mesh, LOGICAL["sequence"]
    grid = teacher.config.token_grid(batch["latents"].shape[1:4])
    order = token_order(grid, setup.chain, setup.lattice, teacher.shards)
    tokens = Tokens(order, axis if teacher.shards > 1 else None, 1 if mesh is None else batch_pieces(mesh))

    cos, sin = rope_tables(grid, teacher.config.attention_head_dim, teacher.config.rope_max_seq_len)
    angles = cos[order.permutation], -sin[order.permutation]

    def head(inputs, chosen):
        (q, k, v), maps_R = inputs
        turn_back = (tokens.own(angles[0]), tokens.own(angles[1])) if setup.rope == "before" else None
        branches, full = jax.vmap(lambda q, k, v: nested_softmax(q, k, v, tokens, setup.rates))(q, k, v)
        records = []
        for index, rate in enumerate(setup.rates):
            one_head = jax.tree.map(lambda leaf, index=index: leaf[index][None], maps_R)
            at = Visit(rate, q, k, v, branches.get(rate), full, tokens, setup.stabilizer, turn_back)
            records.append(if_chosen(chosen, functools.partial(visit, one_head, at)))
        return full.output, jax.tree.map(lambda *leaves: jnp.stack(leaves), *records)

    def attention(q, k, v, layer):
        chosen, maps_RxH = layer
        heads_first = tuple(x.transpose(2, 0, 1, 3).astype(jnp.float32) for x in (q, k, v))
        inputs = heads_first, jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), maps_RxH)
        y, records = jax.lax.map(lambda inputs: head(inputs, chosen), inputs)
        return y.transpose(1, 2, 0, 3).astype(v.dtype), jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), records)

    def added_up(q, k, v, layer):
        y, records = attention(q, k, v, layer)
        return y, jax.lax.psum(records, (*LOGICAL["batch"], axis))

    visiting = attention
    if mesh is not None:
        spread, by_head = sharding(mesh, "batch", "sequence", "heads").spec, sharding(mesh, None, "heads").spec
        layer = sharding(mesh).spec, by_head
        specs = {"in_specs": (spread, spread, spread, layer), "out_specs": (spread, by_head)}
        visiting = jax.shard_map(added_up, mesh=mesh, check_vma=False, **specs)
    inputs = batch["latents"], batch["timestep"], batch["text"]
    if setup.blocks is None:
        return teacher.apply_blocks(*inputs, visiting, (None, maps), order=order)
    blocks, every = np.array(setup.blocks), np.arange(teacher.config.num_layers)
    # A block that is not chosen reads the maps of some other, to no effect.
    slots = np.searchsorted(blocks, every).clip(max=len(blocks) - 1)
    layers = jnp.asarray(np.isin(every, blocks)), jax.tree.map(lambda leaf: leaf[slots], maps)
    until = None if whole else blocks[-1] + 1
    velocity, records = teacher.apply_blocks(*inputs, visiting, layers, order=order, until=until)
    return velocity, jax.tree.map(lambda leaf: leaf[blocks], records)


def if_chosen(chosen: jax.Array | None, work: Callable[[], Any]) -> Any:
    """What `work` returns, or zeros where it is not `chosen` and not done; None: always."""
    if chosen is None:
        return work()
    zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(work))
    return jax.lax.cond(chosen, work, zeros)


@functools.partial(nnx.jit, static_argnames="setup")
def measure(teacher, batch, maps, setup: Setup) -> dict[str, jax.Array]:
    """`statistics`, leaves [blocks, rates, heads]."""
    return visit_heads(teacher, batch, maps, setup, statistics)[1]


def learn(teacher, batch, maps, setup: Setup, whole: bool = False) -> tuple[jax.Array, jax.Array, Maps]:
    """The velocity (see `visit_heads`), losses [blocks, rates] and the gradients of `maps`, each from its own block,
    rate and head alone."""

    def visit(maps, at: Visit):
        loss, gradients = jax.value_and_grad(LOSSES[setup.loss])(maps, at)
        return loss, jax.tree.map(lambda leaf: leaf[0], gradients)

    velocity, (losses, gradients) = visit_heads(teacher, batch, maps, setup, visit, whole)
    return velocity, losses.mean(axis=2), gradients


@functools.partial(nnx.jit, static_argnames="setup")
def losses_and_gradients(teacher, batch, maps, setup: Setup) -> tuple[jax.Array, Maps]:
    """Those of `learn`."""
    return learn(teacher, batch, maps, setup)[1:]


def initial_maps(config: ConfigDict, teacher: WanTransformer) -> Maps:
    """Fresh maps for every rate and block of `config.distill.blocks`: the same, whichever these are."""
    hybrid, model = config.hybrid, teacher.config
    phi = FeatureMapConfig(hybrid.degree, hybrid.layers, hybrid.activation)
    count, chosen = model.num_layers * len(hybrid.rates), block_numbers(config.distill.blocks)

    def maps(key):
        stacked = init_feature_maps(key, count, model.num_attention_heads, model.attention_head_dim, phi)
        stacked = jax.tree.map(lambda leaf: leaf.reshape(model.num_layers, -1, *leaf.shape[1:]), stacked)
        return stacked if chosen is None else jax.tree.map(lambda leaf: leaf[np.array(chosen)], stacked)

    key_q, key_k = jax.random.split(jax.random.key(config.seed))
    return maps(key_q), maps(key_k)


def calibrate(teacher: WanTransformer, batches: list[dict], maps: Maps, setup: Setup) -> Maps:
    """Scales the key maps so that each head's mean linear mass is what the teacher's own attention gives those keys."""
    found = [measure(teacher, batch, maps, setup) for batch in batches]
    mass, wanted = (sum(stats[name] for stats in found) for name in ("mass", "wanted_mass"))
    log_scale = jnp.log(jnp.maximum(wanted, EPSILON)) - jnp.log(jnp.maximum(mass, EPSILON))
    # A linear key may score 88 above the stabiliser, and its mass is then infinite in float32.
    log_scale = jnp.clip(log_scale, -LARGEST_LOG_SCALE, LARGEST_LOG_SCALE)
    return maps[0], dataclasses.replace(maps[1], log_scale=maps[1].log_scale + log_scale)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    return optax.adamw(config.distill.learning_rate, weight_decay=config.distill.weight_decay)


def make_update(optimizer: optax.GradientTransformation, graph: nnx.GraphDef, setup: Setup) -> Any:
    """The step (state, teacher's parameters, batch) -> (state, losses [blocks, rates]), overwriting the state."""

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: dict[str, Any], teacher_params: Any, batch: dict[str, jax.Array]) -> tuple[Any, jax.Array]:
        _, losses, gradients = learn(nnx.merge(graph, teacher_params), batch, state["maps"], setup)
        return stepped(optimizer, state, losses, gradients)

    return update


def make_sampling_update(
    optimizer: optax.GradientTransformation, graph: nnx.GraphDef, setup: Setup, guidance: float, where: NamedSharding
) -> Any:
    """The same step inside a step of the sampler: (state, teacher's parameters, trajectory, text, negative text, row of
    the schedule, key) -> (state, trajectory, losses). The trajectory's state is kept `where`."""

    @functools.partial(jax.jit, donate_argnums=(0, 2))
    def update(state, teacher_params, trajectory, text, blank, row, key):
        teacher, learnt = nnx.merge(graph, teacher_params), []

        def velocity(x, timesteps_B):
            asked = question(x, timesteps_B, text, blank)
            velocity, *found = learn(teacher, asked, state["maps"], setup, whole=True)
            learnt.append(found)
            return answer(velocity.astype(jnp.float32), guidance)

        trajectory = jax.lax.with_sharding_constraint(solver_step(velocity, trajectory, row, key), where)
        ((losses, gradients),) = learnt
        state, losses = stepped(optimizer, state, losses, gradients)
        return state, trajectory, losses

    return update


def stepped(
    optimizer: optax.GradientTransformation, state: dict[str, Any], losses: jax.Array, gradients: Any
) -> tuple[dict[str, Any], jax.Array]:
    """The state after an update, or as it was if a loss or gradient is not finite; the losses, NaN where either is."""
    finite = [jnp.isfinite(leaf).all(axis=tuple(range(2, leaf.ndim))) for leaf in jax.tree.leaves(gradients)]
    losses = jnp.where(functools.reduce(jnp.logical_and, finite), losses, jnp.nan)
    updates, opt_state = optimizer.update(gradients, state["opt_state"], state["maps"])
    new = {"maps": optax.apply_updates(state["maps"], updates), "opt_state": opt_state}
    return kept(jnp.isfinite(losses).all(), new, state), losses


class Replay:
    """Learning from what `trace` left, in shuffled batches; the step of a run says which is the next."""

    def __init__(self, config: ConfigDict, teacher: WanTransformer, mesh: Mesh, traces: epath.Path, setup: Setup):
        settings, prompts = config.distill, range(config.trace.prompts - config.trace.holdout)
        self.mesh, self.size, self.repeats = mesh, settings.batch, settings.updates_per_batch
        self.rows = local_rows(mesh, self.size)
        steps = grain.MapDataset.source(TraceSteps(traces, prompts)).shuffle(seed=config.seed).repeat()
        rows = grain.MapDataset.source(Rows(steps, self.size, self.rows))
        self.data = rows.batch(len(self.rows), drop_remainder=True)
        graph, self.teacher_params = nnx.split(teacher)
        self.update = make_update(make_optimizer(config), graph, setup)

    def batch(self, index: int) -> dict[str, jax.Array]:
        return put_rows(self.mesh, self.rows, self.size, self.data[index])

    def calibration(self) -> list[dict[str, jax.Array]]:
        return [self.batch(index) for index in range(CALIBRATION_BATCHES)]

    def under_way(self) -> dict[str, Any]:
        """What a run keeps beside maps and moments."""
        return {}

    def __call__(self, state: dict[str, Any], step: int) -> tuple[dict[str, Any], jax.Array]:
        # Algorithm 1's U updates on a batch run the teacher again: its forward is the cheaper part of a step.
        return self.update(state, self.teacher_params, self.batch(step // self.repeats))

    def source(self, step: int) -> str:
        """What a step learns from, and whether that is finite."""
        batch = step // self.repeats
        bad = rows_with_faults(self.data[batch], self.rows)
        return f"batch {batch}" + (f", whose examples {', '.join(map(str, bad))} are not finite" if bad else "")


class Sampling:
    """Learning inside the forwards by which the teacher samples `distill.trajectories` batches of prompts in turn."""

    def __init__(self, config: ConfigDict, teacher: WanTransformer, mesh: Mesh, traces: epath.Path, setup: Setup):
        settings, sampler, video = config.distill, config.sampler, config.video
        shape = *latent_grid(video.frames, video.height, video.width), teacher.config.in_channels
        prompts = config.trace.prompts - config.trace.holdout
        self.teacher, self.slots = teacher, settings.trajectories
        self.trajectories = Trajectories(config, traces / "text", prompts, shape, mesh)
        self.turns = list(itertools.islice(turns(sampler.steps, self.slots), settings.steps))
        graph, self.teacher_params = nnx.split(teacher)
        self.update = make_sampling_update(make_optimizer(config), graph, setup, sampler.guidance, sharding(mesh))

    def calibration(self) -> list[dict[str, jax.Array]]:
        return self.trajectories.questions(self.teacher, CALIBRATION_BATCHES)

    def under_way(self) -> dict[str, Any]:
        """The trajectories, as far as they have come."""
        return {"trajectories": [self.trajectories.begin(slot) for slot in range(self.slots)]}

    def __call__(self, state: dict[str, Any], step: int) -> tuple[dict[str, Any], jax.Array]:
        slot, number, position = self.turns[step]
        learnt, trajectories = {name: state[name] for name in ("maps", "opt_state")}, list(state["trajectories"])
        trajectory = trajectories[slot] if position else self.trajectories.begin(number)
        asked = *self.trajectories.text(number), *self.trajectories.step(number, position)
        learnt, trajectories[slot], losses = self.update(learnt, self.teacher_params, trajectory, *asked)
        return learnt | {"trajectories": trajectories}, losses

    def source(self, step: int) -> str:
        """What a step learns from."""
        _, number, position = self.turns[step]
        return f"batch {number} of prompts at step {position} of the sampler"


MODES = {"traces": Replay, "sampling": Sampling}


def distill(
    config: ConfigDict,
    teacher: WanTransformer,
    traces: epath.Path,
    folder: epath.Path,
    *,
    rope: str = "after",
    profile: epath.Path | None = None,
) -> None:
    """Leaves `initial.safetensors` (calibrated only), `feature_maps.safetensors` and `errors.json` in `folder`.

    errors.json names their blocks: all, or those of `config.distill.blocks`. With `rope` "before", phi sees queries and
    keys that are not turned by RoPE: to be measured, for no model takes such maps. `profile` gets the trace of
    `config.profile` steps.
    """
    settings, setup = config.distill, dataclasses.replace(Setup.of(config), rope=rope)
    blocks = setup.blocks or range(teacher.config.num_layers)
    mesh = make_mesh(config.mesh)
    teacher.spread(mesh, config.mesh.exchange)
    held_out = TraceSteps(traces, range(config.trace.prompts - config.trace.holdout, config.trace.prompts))
    learner = MODES[settings.mode](config, teacher, mesh, traces, setup)

    maps = put_state(mesh, initial_maps(config, teacher))
    if settings.calibrate:
        maps = calibrate(teacher, learner.calibration(), maps, setup)
    initial = fetched(maps)
    processes.once(lambda: save_maps(folder / INITIAL, initial, setup.rates, blocks))

    def update(state: dict[str, Any], step: int) -> tuple[dict[str, Any], jax.Array, None]:
        return *learner(state, step), None

    def logged(losses: np.ndarray) -> tuple[dict[str, Any], str]:
        by_rate = losses.mean(axis=0)
        return {f"loss_{rate}": by_rate[i] for i, rate in enumerate(setup.rates)}, f"loss {by_rate.mean():.4f}"

    def explain(step: int, losses: np.ndarray, *_: Any) -> str:
        found = [f"block {blocks[i]} at rate {setup.rates[j]}" for i, j in np.argwhere(~np.isfinite(losses))]
        return f"the loss or its gradient is not finite in {found[0]}, {len(found)} in all: {learner.source(step)}"

    opt_state = make_optimizer(config).init(maps)  # type: ignore[arg-type]
    fresh = {"maps": jax.tree.map(jnp.copy, maps), "opt_state": opt_state} | learner.under_way()
    state = run_steps(
        "distill", config, put_state(mesh, fresh), update, steps=settings.steps, checkpoints=folder / "checkpoints",
        metrics=folder, logged=logged, explain=explain, profile=profile,
    )  # fmt: skip
    trained = fetched(state["maps"])
    processes.once(lambda: save_maps(folder / TRAINED, trained, setup.rates, blocks))
    found = held_out_errors(teacher, mesh, held_out, maps, state["maps"], setup)
    processes.once(lambda: write_json(folder / "errors.json", {"blocks": list(blocks)} | found))


def held_out_errors(
    teacher: WanTransformer, mesh: Mesh, held_out: TraceSteps, initial: Maps, trained: Maps, setup: Setup
) -> dict[str, Any]:
    """Relative L1 error of the attention output per block and rate over held-out steps, before and after training.

    Steps are taken in batches of what the mesh holds at once; those that fill no batch are left out.
    """
    size = batch_pieces(mesh)
    rows, batches = local_rows(mesh, size), len(held_out) // size
    if not batches:
        raise InputError(f"config.trace.holdout: {len(held_out)} steps; expected at least {size}, one a batch shard")

    def totals(maps, name):
        found, progress = [], Progress(name, batches)
        for number in progress.over(range(batches)):
            steps = [held_out[number * size + row] for row in rows]
            batch = put_rows(mesh, rows, size, jax.tree.map(lambda *arrays: np.stack(arrays), *steps))
            found.append(fetched(measure(teacher, batch, maps, setup)))
        return jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float64), *found)

    before, after = totals(initial, "errors (initial)"), totals(trained, "errors")
    errors = lambda stats: (stats["error"].sum(axis=(0, 3)) / stats["size"].sum(axis=(0, 3))).tolist()
    return {
        "rates": list(setup.rates),
        "errors": errors(after),
        "initial_errors": errors(before),
        "softmax_share": after["share"].mean(axis=(0, 3)).tolist(),
        "teacher_softmax_share": after["teacher_share"].mean(axis=(0, 3)).tolist(),
        "samples": batches * size,
    }


def save_maps(path: epath.Path, maps: Maps, rates: Sequence[Rate], blocks: Sequence[int]) -> None:
    """Tensors named blocks.I.rate_R.phi_q.LEAF, one map a rate and block of `blocks`."""
    tensors = {}
    for side, stacked in zip(("phi_q", "phi_k"), maps, strict=True):
        for leaf_name, leaf in _leaves(stacked):
            array = np.asarray(leaf)
            for of_block, block in zip(array, blocks, strict=True):
                for of_rate, rate in zip(of_block, rates, strict=True):
                    tensors[f"blocks.{block}.rate_{rate}.{side}.{leaf_name}"] = of_rate
    phi = maps[0]
    write_tensors(
        path,
        tensors,
        metadata={"degree": str(phi.degree), "layers": str(len(phi.kernels)), "activation": phi.activation},
    )


def load_maps(path: epath.Path, plan: Sequence[Rate], config: FeatureMapConfig) -> Maps | None:
    """The maps of the blocks that `plan` converts, leaves [converted, heads, ...]; None when there are none."""
    tensors = read_tensors(path)
    chosen = [(block, rate) for block, rate in enumerate(plan) if rate != 1]
    if not chosen:
        return None

    def stacked(side: str, leaf: str) -> jax.Array:
        names = [f"blocks.{block}.rate_{rate}.{side}.{leaf}" for block, rate in chosen]
        if missing := [name for name in names if name not in tensors]:
            raise InputError(f"{path}: holds no {missing[0]}; was its rate distilled?")
        return jnp.asarray(np.stack([tensors[name] for name in names]))

    query_maps, key_maps = (feature_map(config, functools.partial(stacked, side)) for side in ("phi_q", "phi_k"))
    return query_maps, key_maps


def _leaves(maps: LearnedMap) -> list[tuple[str, jax.Array]]:
    layers = [(f"kernels.{j}", leaf) for j, leaf in enumerate(maps.kernels)]
    layers += [(f"biases.{j}", leaf) for j, leaf in enumerate(maps.biases)]
    return [*layers, ("log_scale", maps.log_scale)]


def read_errors(folder: epath.Path) -> dict[str, Any]:
    path = folder / "errors.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; run `jsurgery distill` first")
    found = read_object(path, "the errors of `jsurgery distill`")
    rates, rows, blocks = found.get("rates"), found.get("errors"), found.get("blocks", [])
    if not isinstance(rates, list):
        raise InputError(f"{path}: rates: expected those distilled, found {shown(rates)}")
    check_rates(f"{path}: rates", rates)
    if not isinstance(rows, list):
        raise InputError(f"{path}: errors: expected a row for each block, found {shown(rows)}")
    if not isinstance(blocks, list) or not all(type(block) is int and block >= 0 for block in blocks):
        raise InputError(f"{path}: blocks: expected their numbers, found {shown(blocks)}")
    return found
