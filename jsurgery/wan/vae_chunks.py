"""Runs the VAE over clips chunk by chunk: all clips as one batch, or a clip on each of several devices."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# (graph, state, *inputs, kept) -> (result, kept for the next chunk), all with the clips along their first axis.
RunChunk = Callable[..., tuple[jax.Array, Any]]
CLIPS = P("clips")


def mesh_of_clips(devices: Sequence[Any]) -> Mesh | None:
    """A mesh of these devices, each for a clip of its own; None for a single device."""
    return Mesh(np.array(devices), ("clips",)) if len(devices) > 1 else None


def in_chunks(
    run_chunk: RunChunk,
    graph: nnx.GraphDef,
    state: nnx.State,
    chunks: Sequence[Sequence[np.ndarray]],
    devices: Mesh | None,
) -> np.ndarray:
    """The results of all chunks, joined along the second axis: float32 [B, ...] on the host.

    Args:
        graph, state: a split WanVae; with `devices`, its state is whole on each of them.
        chunks: the inputs of every chunk in turn, arrays [B, ...].
        devices: a `mesh_of_clips`. Clips are taken in groups, one for each device; the last group is filled up with
            repeats. None: all clips are one batch.
    """
    if devices is None:
        return _one_group(functools.partial(run_chunk, graph, state), chunks)
    run, where = functools.partial(_a_clip_a_device, run_chunk, graph, devices, state), NamedSharding(devices, CLIPS)
    clips, groups = len(chunks[0][0]), []
    for start in range(0, clips, devices.size):
        count = min(devices.size, clips - start)
        rows = start + np.arange(devices.size) % count
        placed = ([jax.device_put(each[rows], where) for each in inputs] for inputs in chunks)
        groups.append(_one_group(lambda *inputs: run(inputs[:-1], inputs[-1]), placed)[:count])
    return np.concatenate(groups)


def _one_group(run: Callable[..., tuple[jax.Array, Any]], chunks: Iterable[Sequence[Any]]) -> np.ndarray:
    """`run` over the chunks of a group of clips. Results move to the host at once."""
    kept, finished = None, []
    for inputs in chunks:
        y, kept = run(*inputs, kept)
        finished.append(np.array(y, np.float32))
    return np.concatenate(finished, axis=1)


@functools.partial(jax.jit, static_argnames=("run_chunk", "graph", "devices"), donate_argnames="kept")
def _a_clip_a_device(
    run_chunk: RunChunk, graph: nnx.GraphDef, devices: Mesh, state: nnx.State, inputs: Sequence[jax.Array], kept: Any
) -> tuple[jax.Array, Any]:
    """`run_chunk` on every device for its own clip: the program of a single clip, without any exchange."""
    run = lambda state, inputs, kept: run_chunk(graph, state, *inputs, kept)
    mapped = jax.shard_map(run, mesh=devices, in_specs=(P(), CLIPS, CLIPS), out_specs=CLIPS, check_vma=False)
    return mapped(state, inputs, kept)
