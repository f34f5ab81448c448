"""Sampling of a video chunk after chunk, by a network whose blocks are all causal chunked hybrids (ReHyAt).

In such a network the tokens of a chunk depend on no later ones (arXiv 2601.04342). So the sampler takes all its steps
on one chunk before it begins the next, if for every step it keeps what the next chunk's attention reads of the chunks
before: in every block, the linear state and the last To frames' keys and values.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jsurgery.attention.kinds.chunked import Chunked
from jsurgery.attention.kinds.registry import kind_of
from jsurgery.attention.map_sizes import num_features
from jsurgery.attention.rope import rope_tables
from jsurgery.diffusion import (
    State,
    initial_noise,
    initial_state,
    schedule,
    solver_step,
    step_keys,
    velocities_per_step,
)
from jsurgery.errors import InputError
from jsurgery.runtime.finite import all_finite, describe_weights
from jsurgery.runtime.mesh import LOGICAL, replicate, sharding
from jsurgery.wan.guidance import guidance_batch, guide, with_given_frames
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.transformer import WanTransformer
from jsurgery.wan.video_size import latent_grid
from pallas_kernels import chunk_step, hybrid_attention

KeysValues = tuple[jax.Array, jax.Array]


class Carried(NamedTuple):
    """What one forward at one step of the sampler leaves to the same step of the next chunk, of all blocks.

    Attributes:
      states: the `linear_state` of the keys that have left the softmax window, S [L, B, H, F, D] and z [L, B, H, F],
        float32; zeros before any has left it. None in a network without linear branches.
      overlaps: for every To in ascending order, the keys and values of the window before the next chunk, [l, B, O, H,
        D], of the l blocks with this To in order; O are the tokens of To frames, or of as many as there are.
    """

    states: KeysValues | None
    overlaps: tuple[KeysValues, ...]


def streamed_kinds(network: WanConfig, source: str) -> tuple[Chunked, ...]:
    """The kind of every block of a network that can be streamed.

    Raises InputError, which calls it `source` and names the first block that does not allow it.
    """
    found: list[Chunked] = []
    for number, rate in enumerate(network.rates):
        kind = kind_of(rate)
        if isinstance(kind, Chunked) and kind.causal and kind.chunk == (found or [kind])[0].chunk:
            found.append(kind)
            continue
        others = f", block 0 is {found[0].name}" if found else ""
        raise InputError(
            f"{source}: block {number} is {kind.name}{others}; "
            "--stream needs causal chunks of one length in all blocks, such as 'C3O1'"
        )
    return tuple(found)


def latent_chunks(network: WanConfig, kinds: tuple[Chunked, ...], frames: int) -> list[tuple[int, int]]:
    """(first, one past the last) of the latent frames of every chunk of a video of `frames` pixel frames."""
    latent_frames = latent_grid(frames, 0, 0, network.strides)[0]
    size = kinds[0].chunk * network.patch_size[0]
    return [(first, min(first + size, latent_frames)) for first in range(0, latent_frames, size)]


def settled_after(kinds: tuple[Chunked, ...]) -> int:
    """The frames before a chunk from which on all chunks do the same: in every block To frames, and a linear one."""
    return max(kind.overlap for kind in kinds) + 1


def carried_shapes(
    network: WanConfig, kinds: tuple[Chunked, ...], frame_tokens: int, batch: int, dtype: Any, frames_before: int
) -> Carried:
    """The shapes of what a forward of a `batch` finds before a chunk that follows `frames_before` of tokens.

    `frame_tokens` are the tokens of a frame.
    """
    heads, dim, hybrid = network.num_attention_heads, network.attention_head_dim, network.hybrid
    assert hybrid is not None
    states = None
    if hybrid.linear_branch:
        shape = len(kinds), batch, heads, num_features(hybrid.feature_map, dim)
        states = jax.ShapeDtypeStruct((*shape, dim), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.float32)
    overlaps = []
    for overlap in sorted({kind.overlap for kind in kinds}):
        blocks = sum(kind.overlap == overlap for kind in kinds)
        tokens = min(overlap, frames_before) * frame_tokens
        overlaps.append((jax.ShapeDtypeStruct((blocks, batch, tokens, heads, dim), dtype),) * 2)
    return Carried(states, tuple(overlaps))  # type: ignore[arg-type]


def carried_shardings(mesh: Mesh, shapes: Carried) -> Carried:
    """Shardings of what is carried: by heads."""
    by_heads = lambda axis: lambda _: NamedSharding(mesh, P(*(None,) * axis, LOGICAL["heads"]))
    return Carried(jax.tree.map(by_heads(2), shapes.states), jax.tree.map(by_heads(3), shapes.overlaps))


def chunk_velocity(
    transformer: WanTransformer,
    latents_BxTxHxWxC: jax.Array,
    timesteps_B: jax.Array,
    text_BxMxE: jax.Array,
    angles: KeysValues,
    carried: Carried,
    *,
    kinds: tuple[Chunked, ...],
    frames_before: int,
    given_frames: int = 0,
) -> tuple[jax.Array, Carried]:
    """The network's velocity [B, T, H, W, C] at a chunk of a video's latents, and what the next chunk needs.

    Args:
        transformer: a network of `streamed_kinds`.
        latents_BxTxHxWxC, timesteps_B, text_BxMxE: as of the whole network.
        angles: the `rope_tables` of the chunk's tokens.
        carried: what the chunk before left; zeros of `carried_shapes` before the first.
        kinds: of the blocks.
        frames_before: the frames of tokens before the chunk; any from `settled_after` on are the same.
        given_frames: as of the whole network, in a video's first chunk.
    """
    hybrid = transformer.config.hybrid
    assert hybrid is not None
    frames, height, width = transformer.config.token_grid(latents_BxTxHxWxC.shape[1:4])
    tokens = height * width
    sizes = sorted({kind.overlap for kind in kinds})
    window, following = (min(sizes[-1], number) * tokens for number in (frames_before, frames_before + frames))

    def step_of(overlap: int) -> Callable[..., Any]:
        """A chunk's step in a block with this To. All blocks get `window` tokens, and leave `following`."""
        before = min(overlap, frames_before) * tokens

        def step(q, k, v, maps, states, k_before, v_before):
            k_before, v_before = (x[:, window - before :] for x in (k_before, v_before))
            if maps is None:
                keys, values = (jnp.concatenate(pair, axis=1) for pair in ((k_before, k), (v_before, v)))
                y = hybrid_attention(q, keys, values, None, None, num_softmax=keys.shape[1])
                first = max(keys.shape[1] - overlap * tokens, 0)
                left = keys[:, first:], values[:, first:]
            else:
                past = states if frames_before > overlap else None
                options = {"overlap": overlap * tokens, "stabilizer": hybrid.stabilizer}
                y, left, new = chunk_step(q, k, v, k_before, v_before, past, *maps, **options)
                states = states if new is None else new
            padding = lambda x: ((0, 0), (following - x.shape[1], 0), (0, 0), (0, 0))
            return y, states, tuple(jnp.pad(x, padding(x)) for x in left)

        return step

    def attention(q, k, v, layer):
        number, maps, states, (k_before, v_before) = layer
        step = lambda number, *inputs: lax.switch(number, [step_of(size) for size in sizes], *inputs)
        if transformer.attention_mesh is not None:
            axis = LOGICAL["heads"]
            heads, state = P(None, None, axis), P(None, axis)
            specs = (P(), heads, heads, heads, P(axis), state, heads, heads)
            options = {"in_specs": specs, "out_specs": (heads, state, heads), "check_vma": False}
            step = jax.shard_map(step, mesh=transformer.attention_mesh, **options)
        y, states, left = step(number, q, k, v, maps, states, k_before, v_before)
        return y, (states, left)

    maps = (transformer.query_maps.maps, transformer.key_maps.maps) if hybrid.linear_branch else None
    number_L = jnp.array([sizes.index(kind.overlap) for kind in kinds])
    layers = number_L, maps, carried.states, _of_all_blocks(carried.overlaps, kinds, window)
    velocity, (states, left) = transformer.apply_blocks(
        *(latents_BxTxHxWxC, timesteps_B, text_BxMxE, attention, layers),
        order=None,
        given_frames=given_frames,
        angles=angles,
    )
    return velocity, Carried(states, _of_each_overlap(left, kinds, frames_before + frames, tokens))


def _of_all_blocks(overlaps: tuple[KeysValues, ...], kinds: tuple[Chunked, ...], window: int) -> KeysValues:
    """`Carried.overlaps` as [L, B, window, H, D], after zeros where a block's To is smaller."""
    if len(overlaps) == 1:
        return overlaps[0]
    sizes = sorted({kind.overlap for kind in kinds})
    blocks = np.concatenate([_blocks_with(size, kinds) for size in sizes])
    padding = lambda x: ((0, 0), (0, 0), (window - x.shape[2], 0), (0, 0), (0, 0))
    joined = lambda *parts: jnp.concatenate([jnp.pad(x, padding(x)) for x in parts])[np.argsort(blocks)]
    return jax.tree.map(joined, *overlaps)


def _of_each_overlap(
    left: KeysValues, kinds: tuple[Chunked, ...], frames: int, frame_tokens: int
) -> tuple[KeysValues, ...]:
    """The inverse of `_of_all_blocks`, after so many frames."""
    sizes = sorted({kind.overlap for kind in kinds})
    if len(sizes) == 1:
        return (left,)
    own = lambda size: lambda x: x[_blocks_with(size, kinds), :, x.shape[2] - min(size, frames) * frame_tokens :]
    return tuple(jax.tree.map(own(size), left) for size in sizes)


def _blocks_with(overlap: int, kinds: tuple[Chunked, ...]) -> np.ndarray:
    return np.array([number for number, kind in enumerate(kinds) if kind.overlap == overlap])


def streaming_step(
    transformer: WanTransformer,
    text: jax.Array,
    negative_text: jax.Array | None,
    state: State,
    row: Any,
    key: jax.Array | None,
    first_frame: jax.Array,
    angles: KeysValues,
    carried: tuple[Carried, ...],
    given: jax.Array | None = None,
    *,
    kinds: tuple[Chunked, ...],
    frames_before: int,
    guidance: float,
    batched: bool,
) -> tuple[State, tuple[Carried, ...]]:
    """The solver's state of a chunk after one step, and what the step leaves to the next chunk, of every forward.

    As `guidance.sampling_step`, with the arguments of `chunk_velocity`; `given` latents begin the first chunk.
    """
    left: list[Carried] = []

    def forward(x, timesteps, text):
        given_frames = 0 if given is None else given.shape[1]
        arguments = x, timesteps, text, angles, carried[len(left)]
        options = {"kinds": kinds, "frames_before": frames_before, "given_frames": given_frames}
        velocity, new = chunk_velocity(transformer, *arguments, **options)
        left.append(new)
        return velocity.astype(jnp.float32)

    def velocity(x, timesteps):
        x = with_given_frames(x, given)
        if negative_text is None:
            return forward(x, timesteps, text)
        if batched:
            both = guidance_batch(x, timesteps, text, negative_text, in_pairs=False)
            return guide(forward(both["latents"], both["timestep"], both["text"]), guidance, in_pairs=False)
        velocities = [forward(x, timesteps, branch) for branch in (text, negative_text)]
        return guide(jnp.concatenate(velocities), guidance, in_pairs=False)

    state = solver_step(velocity, state, row, key, first_frame)
    if (mesh := transformer.device_mesh) is not None:
        constrain = lax.with_sharding_constraint
        state = constrain(state, sharding(mesh))
        left = [constrain(each, carried_shardings(mesh, each)) for each in left]
    return state, tuple(left)


_STATIC = ("kinds", "frames_before", "guidance", "batched")
first_step = jax.jit(streaming_step, static_argnames=_STATIC)
# What is carried has its final size: a step overwrites it.
steady_step = jax.jit(streaming_step, static_argnames=_STATIC, donate_argnames="carried")


def forwards_per_step(config: ConfigDict) -> tuple[int, int]:
    """(forwards, examples of each) of a sampling step of one video."""
    velocities = velocities_per_step(config.sampler.guidance)
    return (1, velocities) if config.sampler.guidance_batched else (velocities, 1)


def stream_latents(
    transformer: WanTransformer,
    config: ConfigDict,
    text: jax.Array,
    negative_text: jax.Array | None,
    *,
    source: tuple[int, int],
    given: np.ndarray | None = None,
    on_step: Callable[[int, int], None] = lambda chunk, done: None,
) -> Iterator[np.ndarray]:
    """Samples a video by `config.sampler` and `config.video`, and yields the latents [1, T, H, W, C] of every chunk.

    They are those of `Pipeline.sample` with `sampler.noise` "frame", but for rounding.

    Args:
        transformer: a network of `streamed_kinds`.
        config: `sampler.noise` is "frame".
        text, negative_text: embeddings [1, M, E]; no negative ones at guidance 1.
        source: the (seed, number) on which the video's noise depends.
        given: latents [1, K, H, W, C] with which the video begins; K is at most the length of a chunk.
        on_step: called after every step with the number of the chunk, from 0, and of the steps done.

    Raises InputError for a network that cannot be streamed, and if latents are not finite.
    """
    network, sampler, video = transformer.config, config.sampler, config.video
    kinds = streamed_kinds(network, "transformer")
    shape = *latent_grid(video.frames, video.height, video.width, network.strides), network.in_channels
    steps = schedule(sampler.solver, sampler.steps, sampler.shift, sampler.timesteps)
    keys = step_keys(steps, jax.random.fold_in(jax.random.key(source[0]), source[1])[None])
    forwards, batch = forwards_per_step(config)
    mesh = transformer.device_mesh
    on_devices = lambda tree: tree if mesh is None else replicate(mesh, tree)

    _, height, width = network.token_grid(shape[:3])
    shapes = carried_shapes(network, kinds, height * width, batch, transformer.dtype, 0)
    where = None if mesh is None else carried_shardings(mesh, shapes)
    zeros = lambda leaf, where=None: jnp.zeros(leaf.shape, leaf.dtype, device=where)
    empty = lambda: jax.tree.map(zeros, shapes, *([] if where is None else [where]))
    carried = [tuple(empty() for _ in range(forwards)) for _ in range(sampler.steps)]

    chunks = latent_chunks(network, kinds, video.frames)
    for number, (first, end) in enumerate(chunks):
        state = on_devices(initial_state(initial_noise(source[0], [source[1]], shape, (first, end))))
        begin = on_devices(jnp.asarray(given, jnp.float32)) if given is not None and first == 0 else None
        start = first // network.patch_size[0]
        grid = network.token_grid((end - first, *shape[1:3]))
        angles = on_devices(rope_tables(grid, network.attention_head_dim, network.rope_max_seq_len, start))
        before = min(start, settled_after(kinds))
        run = steady_step if before == settled_after(kinds) else first_step
        options = {"kinds": kinds, "frames_before": before}
        options |= {"guidance": sampler.guidance, "batched": sampler.guidance_batched}
        for i in range(sampler.steps):
            key = None if keys is None else keys[i]
            inputs = text, negative_text, state, steps.row(i), key, first, angles, carried[i], begin
            state, carried[i] = run(transformer, *inputs, **options)
            if not all_finite(state.x):  # waits for the step
                place = f"chunk {number + 1} of {len(chunks)}, step {i + 1} of {sampler.steps}"
                weights = describe_weights(nnx.state(transformer))
                raise InputError(f"sampling: {place}: the latents are not finite: the transformer's {weights}")
            on_step(number, i + 1)
        yield np.array(with_given_frames(state.x, begin))  # a copy, which holds no array of the device
