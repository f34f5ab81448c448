"""distill: the feature maps of every block at every rate, in one pass of the teacher over its traces.

Each step runs the teacher once. In every block, the softmax over the nested token zones is computed once and merged
into the softmax branch of every rate (and into the teacher's own output); the feature maps get their gradients on the
spot from the queries, keys and values that pass by. Nothing but gradients leaves a block.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from jsurgery.attention.hybrid import FeatureMapConfig, Rate, init_feature_maps, token_order
from jsurgery.attention.token_order import TokenOrder
from jsurgery.errors import InputError
from jsurgery.runtime.checkpoints import Checkpoints
from jsurgery.runtime.mesh import make_mesh, place, put_state, sharding
from jsurgery.runtime.progress import Metrics, Progress
from jsurgery.runtime.stages import write_json
from jsurgery.surgery.trace import TraceSteps
from jsurgery.wan.safetensors_files import read_tensors, write_tensors
from jsurgery.wan.transformer import WanTransformer
from pallas_kernels import PolynomialMap
from pallas_kernels.reference import EPSILON

CALIBRATION_BATCHES = 8
LARGEST_LOG_SCALE = 20.0
Maps = tuple[PolynomialMap, PolynomialMap]  # of queries and of keys, leaves [blocks, rates, heads, ...]


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


def softmax_over(q_NxD: jax.Array, k_MxD: jax.Array, v_MxD: jax.Array) -> Branch:
    """One head of one example: output [N, D], the rest [N]."""
    s_NxM = q_NxD @ k_MxD.T * q_NxD.shape[-1] ** -0.5
    largest_N = s_NxM.max(axis=-1)
    p_NxM = jnp.exp(s_NxM - largest_N[:, None])
    mass_N = p_NxM.sum(axis=-1)
    return Branch(p_NxM @ v_MxD / mass_N[:, None], largest_N + jnp.log(mass_N), largest_N)


def nested_softmax(q_NxD, k_NxD, v_NxD, order: TokenOrder, rates: Sequence[Rate]) -> tuple[dict[Rate, Branch], Branch]:
    """The softmax branch of every rate but "linear", and full softmax, each key visited once."""
    sizes = {rate: order.num_softmax(rate) for rate in rates if rate != "linear"}
    branches, merged, start = {}, None, 0
    for rate, size in sorted(sizes.items(), key=lambda item: item[1]):
        zone = softmax_over(q_NxD, k_NxD[start:size], v_NxD[start:size])
        merged = zone if merged is None else merged.merge(zone)
        branches[rate], start = merged, size
    rest = softmax_over(q_NxD, k_NxD[start:], v_NxD[start:])
    return branches, rest if merged is None else merged.merge(rest)


def hybrid_output(
    maps: Maps,
    rate: Rate,
    q_BxNxD: jax.Array,
    k_BxNxD: jax.Array,
    v_BxNxD: jax.Array,
    branch: Branch | None,
    order: TokenOrder,
    stabilizer: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Eq. 5 of one head from its finished softmax branch: y [B, N, D], n_S [B, N], n_L [B, N]."""
    query_map, key_map = maps
    start = order.num_softmax(rate)
    phi_q_BxNxF = query_map(q_BxNxD[:, :, None])[:, :, 0]
    phi_k_BxMxF = key_map(k_BxNxD[:, start:, None])[:, :, 0]
    o_L_BxNxD = phi_q_BxNxF @ (phi_k_BxMxF.swapaxes(1, 2) @ v_BxNxD[:, start:])
    n_L_BxN = jnp.einsum("bnf,bf->bn", phi_q_BxNxF, phi_k_BxMxF.sum(axis=1))
    if branch is None:
        return o_L_BxNxD / (n_L_BxN + EPSILON)[..., None], jnp.zeros_like(n_L_BxN), n_L_BxN
    n_S_BxN = jnp.exp(branch.lse - branch.largest) if stabilizer == "max" else jnp.ones_like(branch.lse)
    y = (n_S_BxN[..., None] * branch.output + o_L_BxNxD) / (n_S_BxN + n_L_BxN)[..., None]
    return y, n_S_BxN, n_L_BxN


def value_loss(
    maps: Maps, rate: Rate, q, k, v, branch: Branch | None, full: Branch, order: TokenOrder, stabilizer: str
):
    """Eq. 7: the mean absolute difference of the block's attention output."""
    return jnp.mean(jnp.abs(hybrid_output(maps, rate, q, k, v, branch, order, stabilizer)[0] - full.output))


def attention_loss(
    maps: Maps, rate: Rate, q, k, v, branch: Branch | None, full: Branch, order: TokenOrder, stabilizer: str
):
    """Eq. 6 over the linear keys: log(1 + sum_j (exp(s_ij - c_i) - phi_q(q_i) phi_k(k_j))^2), averaged over queries.

    The average is inside the logarithm. c_i is the stabiliser's (for "linear": the full log-sum-exp), so that the
    features learn the mass that eq. 5 asks for. A linear key may still score far above all softmax keys: a factor
    exp(2 top) is taken out of the sum. Expanded as sum E^2 - 2 sum phi_q . (E phi_k) + tr(Gram_q Gram_k): the squared
    difference is never formed, and E has no gradient.
    """
    query_map, key_map = maps
    start = order.num_softmax(rate)
    shift = full.lse if branch is None else branch.largest if stabilizer == "max" else branch.lse
    phi_q_BxNxF = query_map(q[:, :, None])[:, :, 0]
    phi_k_BxMxF = key_map(k[:, start:, None])[:, :, 0]

    @jax.checkpoint
    def example(q_NxD, k_MxD, shift_N, phi_q_NxF, phi_k_MxF):
        s_NxM = q_NxD @ k_MxD.T * q_NxD.shape[-1] ** -0.5 - shift_N[:, None]
        top = jnp.maximum(s_NxM.max(), 0.0)
        e_NxM, phi_k_MxF = jnp.exp(s_NxM - top), phi_k_MxF * jnp.exp(-top)
        grams = jnp.sum((phi_q_NxF.T @ phi_q_NxF) * (phi_k_MxF.T @ phi_k_MxF))
        squares = jnp.sum(e_NxM**2) - 2 * jnp.sum(phi_q_NxF * (e_NxM @ phi_k_MxF)) + grams
        return 2 * top + jnp.log1p(jnp.expm1(-2 * top) + squares / q_NxD.shape[0])

    return jnp.mean(jax.vmap(example)(q, k[:, start:], shift, phi_q_BxNxF, phi_k_BxMxF))


LOSSES = {"value": value_loss, "attention": attention_loss}


def statistics(
    maps: Maps, rate: Rate, q, k, v, branch: Branch | None, full: Branch, order: TokenOrder, stabilizer: str
) -> dict[str, jax.Array]:
    """Sums and means of one head: error and size of the output; the softmax keys' share of the denominator, and in the
    teacher; the linear keys' mass, and what the teacher's would be."""
    y, n_S_BxN, n_L_BxN = hybrid_output(maps, rate, q, k, v, branch, order, stabilizer)
    error, size = jnp.sum(jnp.abs(y - full.output)), jnp.sum(jnp.abs(full.output))
    if branch is None:
        wanted = n_L_BxN  # a ratio alone is left of n_L: any scale does
        teacher_share = jnp.zeros(())
    else:
        teacher_share = jnp.mean(jnp.exp(branch.lse - full.lse))
        # exp(lse) over the linear keys, in units of the stabiliser.
        shift = branch.largest if stabilizer == "max" else branch.lse
        wanted = jnp.exp(full.lse - shift) - jnp.exp(branch.lse - shift)
    share = jnp.mean(n_S_BxN / (n_S_BxN + n_L_BxN + EPSILON))
    mass, wanted_mass = jnp.mean(n_L_BxN), jnp.mean(wanted)
    return {
        "error": error,
        "size": size,
        "share": share,
        "teacher_share": teacher_share,
        "mass": mass,
        "wanted_mass": wanted_mass,
    }


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is distilled: static, hence hashable."""

    rates: tuple[Rate, ...]
    chain: tuple[int, ...]
    lattice: str
    stabilizer: str
    loss: str

    @classmethod
    def of(cls, config: ConfigDict) -> "Setup":
        hybrid = config.hybrid
        return cls(
            tuple(hybrid.rates), rate_chain(hybrid.rates), hybrid.lattice, hybrid.stabilizer, config.distill.loss
        )


def rate_chain(rates: Sequence[Rate]) -> tuple[int, ...]:
    """The nested zones that the token order needs for these rates."""
    return tuple(sorted({1, *(rate for rate in rates if isinstance(rate, int))}))


def visit_heads(teacher: WanTransformer, batch: dict[str, jax.Array], maps: Maps, setup: Setup, visit) -> Any:
    """Runs the teacher over a batch and `visit(maps, rate, q, k, v, branch, full, order, stabilizer)` in every head.

    Returns the records, leaves [blocks, rates, heads, ...]. Heads are looped over: a head's scores stay in cache.
    """
    order = token_order(teacher.config.token_grid(batch["latents"].shape[1:4]), setup.chain, setup.lattice)

    def head(inputs):
        (q, k, v), maps_R = inputs
        branches, full = jax.vmap(lambda q, k, v: nested_softmax(q, k, v, order, setup.rates))(q, k, v)
        records = []
        for index, rate in enumerate(setup.rates):
            one_head = jax.tree.map(lambda leaf, index=index: leaf[index][None], maps_R)
            records.append(visit(one_head, rate, q, k, v, branches.get(rate), full, order, setup.stabilizer))
        return full.output, jax.tree.map(lambda *leaves: jnp.stack(leaves), *records)

    def attention(q, k, v, maps_RxH):
        heads_first = tuple(x.transpose(2, 0, 1, 3).astype(jnp.float32) for x in (q, k, v))
        y, records = jax.lax.map(head, (heads_first, jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), maps_RxH)))
        return y.transpose(1, 2, 0, 3).astype(v.dtype), jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), records)

    return teacher.apply_blocks(batch["latents"], batch["timestep"], batch["text"], attention, maps, order=order)[1]


@functools.partial(nnx.jit, static_argnames="setup")
def measure(teacher, batch, maps, setup: Setup) -> dict[str, jax.Array]:
    """`statistics`, leaves [blocks, rates, heads]."""
    return visit_heads(teacher, batch, maps, setup, statistics)


@functools.partial(nnx.jit, static_argnames="setup")
def losses_and_gradients(teacher, batch, maps, setup: Setup) -> tuple[jax.Array, Maps]:
    """Losses [blocks, rates] and the gradients of `maps`, each from its own block, rate and head alone."""

    def visit(maps, *arguments):
        loss, gradients = jax.value_and_grad(LOSSES[setup.loss])(maps, *arguments)
        return loss, jax.tree.map(lambda leaf: leaf[0], gradients)

    losses, gradients = visit_heads(teacher, batch, maps, setup, visit)
    return losses.mean(axis=2), gradients


def initial_maps(config: ConfigDict, teacher: WanTransformer) -> Maps:
    """Fresh maps for every block and rate, leaves [blocks, rates, heads, ...]."""
    hybrid, model = config.hybrid, teacher.config
    phi = FeatureMapConfig(hybrid.degree, hybrid.layers, hybrid.activation)
    count = model.num_layers * len(hybrid.rates)

    def maps(key):
        stacked = init_feature_maps(key, count, model.num_attention_heads, model.attention_head_dim, phi)
        return jax.tree.map(lambda leaf: leaf.reshape(model.num_layers, len(hybrid.rates), *leaf.shape[1:]), stacked)

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


def distill(config: ConfigDict, teacher: WanTransformer, traces: epath.Path, folder: epath.Path) -> None:
    """Leaves `initial.safetensors` (calibrated only), `feature_maps.safetensors` and `errors.json` in `folder`."""
    settings, setup = config.distill, Setup.of(config)
    mesh = make_mesh(config.mesh)
    place(mesh, teacher)
    split = config.trace.prompts - config.trace.holdout
    data = grain.MapDataset.source(TraceSteps(traces, range(split))).shuffle(seed=config.seed).repeat()
    data = data.batch(settings.batch, drop_remainder=True)
    held_out = TraceSteps(traces, range(split, config.trace.prompts))

    def batch(index: int) -> dict[str, jax.Array]:
        return jax.device_put(data[index], sharding(mesh, "batch"))

    maps = put_state(mesh, initial_maps(config, teacher))
    if settings.calibrate:
        maps = calibrate(teacher, [batch(i) for i in range(CALIBRATION_BATCHES)], maps, setup)
    save_maps(folder / "initial.safetensors", maps, setup.rates)

    optimizer = optax.adamw(settings.learning_rate, weight_decay=settings.weight_decay)
    checkpoints = Checkpoints(folder / "checkpoints", every=config.checkpoint.every, keep=config.checkpoint.keep)
    opt_state = optimizer.init(maps)  # type: ignore[arg-type]
    start, state = checkpoints.restore(put_state(mesh, {"maps": maps, "opt_state": opt_state}))

    @jax.jit
    def apply(state: dict[str, Any], gradients: Any) -> dict[str, Any]:
        updates, opt_state = optimizer.update(gradients, state["opt_state"], state["maps"])
        return {"maps": optax.apply_updates(state["maps"], updates), "opt_state": opt_state}  # type: ignore[arg-type]

    metrics, progress = Metrics(folder, start), Progress("distill", settings.steps, start)
    for step in progress.over(range(start, settings.steps)):
        # Algorithm 1's U updates on a batch run the teacher again: its forward is the cheaper part of a step.
        replayed = batch(step // settings.updates_per_batch)
        losses, gradients = losses_and_gradients(teacher, replayed, state["maps"], setup)
        state = apply(state, gradients)
        if (step + 1) % config.log_every == 0:
            by_rate = losses.mean(axis=0)
            metrics.log(step + 1, **{f"loss_{rate}": by_rate[i] for i, rate in enumerate(setup.rates)})
            metrics.flush()
            progress.note = f"loss {losses.mean():.4f}"
        checkpoints.save(step + 1, state, last=step + 1 == settings.steps)
    checkpoints.close()
    metrics.flush()
    save_maps(folder / "feature_maps.safetensors", state["maps"], setup.rates)
    write_json(folder / "errors.json", held_out_errors(teacher, held_out, maps, state["maps"], setup))


def held_out_errors(
    teacher: WanTransformer, held_out: TraceSteps, initial: Maps, trained: Maps, setup: Setup
) -> dict[str, Any]:
    """Relative L1 error of the attention output per block and rate over held-out steps, before and after training."""

    def totals(maps, name):
        found, progress = [], Progress(name, len(held_out))
        for index in progress.over(range(len(held_out))):
            step = jax.tree.map(lambda array: np.asarray(array)[None], held_out[index])
            found.append(jax.device_get(measure(teacher, step, maps, setup)))
        return jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float64), *found)

    before, after = totals(initial, "errors (initial)"), totals(trained, "errors")
    errors = lambda stats: (stats["error"].sum(axis=(0, 3)) / stats["size"].sum(axis=(0, 3))).tolist()
    return {
        "rates": list(setup.rates),
        "errors": errors(after),
        "initial_errors": errors(before),
        "softmax_share": after["share"].mean(axis=(0, 3)).tolist(),
        "teacher_softmax_share": after["teacher_share"].mean(axis=(0, 3)).tolist(),
        "samples": len(held_out),
    }


def save_maps(path: epath.Path, maps: Maps, rates: Sequence[Rate]) -> None:
    """Tensors named blocks.I.rate_R.phi_q.LEAF, one map a block and rate."""
    tensors = {}
    for side, stacked in zip(("phi_q", "phi_k"), maps, strict=True):
        for leaf_name, leaf in _leaves(stacked):
            array = np.asarray(leaf)
            for block in range(array.shape[0]):
                for index, rate in enumerate(rates):
                    tensors[f"blocks.{block}.rate_{rate}.{side}.{leaf_name}"] = array[block, index]
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

    def maps(side: str) -> PolynomialMap:
        return PolynomialMap(
            kernels=tuple(stacked(side, f"kernels.{j}") for j in range(config.layers)),
            biases=tuple(stacked(side, f"biases.{j}") for j in range(config.layers)),
            log_scale=stacked(side, "log_scale"),
            degree=config.degree,
            activation=config.activation,
        )

    return maps("phi_q"), maps("phi_k")


def _leaves(maps: PolynomialMap) -> list[tuple[str, jax.Array]]:
    layers = [(f"kernels.{j}", leaf) for j, leaf in enumerate(maps.kernels)]
    layers += [(f"biases.{j}", leaf) for j, leaf in enumerate(maps.biases)]
    return [*layers, ("log_scale", maps.log_scale)]


def read_errors(folder: epath.Path) -> dict[str, Any]:
    path = folder / "errors.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; run `jsurgery distill` first")
    return json.loads(path.read_text())
