"""attention: how concentrated the teacher's attention is, block by block, on any Wan model.

Scores are computed for one chunk of queries at a time, so that memory grows with N, not N².
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsurgery.ablate.seed_run import SeedRun
from jsurgery.attention.hybrid import token_order
from jsurgery.attention.kinds.registry import rate_name
from jsurgery.attention.token_order import TokenOrder
from jsurgery.evaluate.statistics import mean_and_std
from jsurgery.rates import rate_chain
from jsurgery.runtime.progress import Progress
from jsurgery.wan.transformer import WanTransformer

CHUNK = 256  # queries
TOP = (1, 8, 64)  # numbers of keys; one percent of the keys is measured as well


def attention_statistics(seeds: Sequence[SeedRun]) -> dict[str, Any]:
    """Entropy, top-k mass, the mass on the query's own frame, and the mass on the softmax keys of every rate."""
    fields = ("hybrid.rates", "hybrid.lattice")
    per_seed = [
        seed.measured_once(
            seed.stage("attention", seed.config, fields, [seed.run.stages["trace"]]),
            "attention.json",
            functools.partial(of_seed, seed),
        )
        for seed in seeds
    ]
    names, timesteps = per_seed[0]["statistics"], per_seed[0]["timesteps"]
    arrays = [np.array(measured["values"]) for measured in per_seed]  # each [steps, blocks, statistics]
    row = lambda index: {
        name: mean_and_std([float(values[index][..., i].mean()) for values in arrays]) for i, name in enumerate(names)
    }
    rows = {f"block {block}": row((slice(None), block)) for block in range(seeds[0].layers)}
    rows |= {f"timestep {timestep:.0f}": row((step,)) for step, timestep in enumerate(timesteps)}
    rows["all"] = row(())
    entropy = [float(np.mean([values[:, block, 0].mean() for values in arrays])) for block in range(seeds[0].layers)]
    lines = {names[0]: {"x": list(range(seeds[0].layers)), "y": entropy}}
    return {
        "text": f"{per_seed[0]['tokens']} tokens, {len(seeds)} seeds; means over queries, heads and held-out prompts, "
        "the two branches of guidance mixed. Entropy is over its maximum log N; uniform attention has 1, and a mass of "
        "1/R on the softmax keys of rate R.",
        "rows": rows,
        "charts": [{"title": "Entropy of attention over log N, by block", "lines": lines}],
        "per_seed": per_seed,
    }


def of_seed(seed: SeedRun) -> dict[str, Any]:
    """`values` [steps, blocks, statistics] are means over held-out prompts, queries and heads."""
    config, model = seed.config, seed.run.teacher.config
    chain = rate_chain(config.hybrid.rates)
    batches, progress = seed.held_out, Progress("attention", len(seed.held_out))
    grid = model.token_grid(batches[0]["latents"].shape[1:4])
    order = token_order(grid, chain, config.hybrid.lattice)
    softmax_keys = {rate: order.num_softmax(rate) for rate in chain if rate != 1}
    timesteps, values = batches[0]["timestep"], []
    for number in progress.over(range(len(batches))):
        steps = [jax.tree.map(lambda x, i=i: x[i : i + 1], batches[number]) for i in range(len(timesteps))]
        measured = [concentration(seed.run.teacher, batch, order, tuple(softmax_keys.values())) for batch in steps]
        values.append(np.stack(jax.device_get(measured)).mean(axis=-2))
    return {
        "tokens": order.num_tokens,
        "statistics": [*statistic_names(order.num_tokens), *(f"on {rate_name(rate)} keys" for rate in softmax_keys)],
        "timesteps": [float(timestep) for timestep in timesteps],
        "values": np.mean(values, axis=0).tolist(),
    }


def top_sizes(tokens: int) -> tuple[int, ...]:
    """The numbers of largest keys whose mass is measured; the last is one percent of all keys."""
    return (*(min(k, tokens) for k in TOP), -(-tokens // 100))


def statistic_names(tokens: int) -> list[str]:
    *tops, percent = top_sizes(tokens)
    return ["entropy / log N", *(f"top {k}" for k in tops), f"top 1 % ({percent})", "own frame"]


@functools.partial(jax.jit, static_argnames=("order", "sizes"))
def concentration(
    model: WanTransformer, batch: dict[str, jax.Array], order: TokenOrder, sizes: tuple[int, ...]
) -> jax.Array:
    """Means over the batch and all queries, [blocks, heads, statistics].

    `sizes`: the mass on the first keys, in the model's token order, is measured for each of these numbers of keys.
    """
    tops = top_sizes(order.num_tokens)
    frames = model.config.token_grid(batch["latents"].shape[1:4])[0]
    frame_N = jnp.asarray(order.permutation // (order.num_tokens // frames))
    size = min(CHUNK, order.num_tokens)
    chunks = -(-order.num_tokens // size)
    padding = chunks * size - order.num_tokens

    def one_head(qkv_BxNxD):
        def example(q_NxD, k_NxD, v_NxD):
            def chunk(queries):
                q_CxD, frame_C = queries
                s_CxN = jnp.matmul(q_CxD, k_NxD.T, preferred_element_type=jnp.float32) * q_CxD.shape[-1] ** -0.5
                log_p_CxN = jax.nn.log_softmax(s_CxN, axis=-1)
                p_CxN = jnp.exp(log_p_CxN)
                largest = jnp.cumsum(jax.lax.top_k(p_CxN, max(tops))[0], axis=-1)
                entropy = -(p_CxN * log_p_CxN).sum(axis=-1) / jnp.log(order.num_tokens)
                own = jnp.where(frame_C[:, None] == frame_N[None], p_CxN, 0).sum(axis=-1)
                prefixes = (p_CxN[:, :n].sum(axis=-1) for n in sizes)
                columns = [entropy, *(largest[:, k - 1] for k in tops), own, *prefixes]
                return p_CxN @ v_NxD.astype(jnp.float32), jnp.stack(columns, axis=-1)

            q = jnp.pad(q_NxD, ((0, padding), (0, 0))).reshape(chunks, size, -1)
            y, statistics = jax.lax.map(chunk, (q, jnp.pad(frame_N, (0, padding)).reshape(chunks, size)))
            flat = lambda x: x.reshape(chunks * size, -1)[: order.num_tokens]
            return flat(y), flat(statistics).mean(axis=0)

        y, statistics = jax.vmap(example)(*qkv_BxNxD)
        return y, statistics.mean(axis=0)

    def attention(q, k, v, _):
        heads_first = tuple(x.transpose(2, 0, 1, 3) for x in (q, k, v))
        y_HxBxNxD, statistics_HxS = jax.lax.map(one_head, heads_first)
        return y_HxBxNxD.transpose(1, 2, 0, 3).astype(v.dtype), statistics_HxS

    inputs = batch["latents"], batch["timestep"], batch["text"]
    return model.apply_blocks(*inputs, attention, None, order=order)[1]
