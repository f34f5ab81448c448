"""Abstract modules: their parameters are shapes, to be filled from a checkpoint or from another module."""

import functools
from typing import Any, TypeVar

from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)


def abstract_module(kind: type[Module], config: Any, **options: Any) -> Module:
    """A new `kind(config, **options)` with `jax.ShapeDtypeStruct`s for parameters.

    Flax traces every initialiser for this, which takes longer than reading a small model. The result is therefore kept
    for equal arguments.
    """
    return nnx.merge(*_split(kind, config, tuple(sorted(options.items()))), copy=True)


@functools.lru_cache
def _split(kind: Any, config: Any, options: tuple[tuple[str, Any], ...]) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: kind(config, **dict(options), rngs=nnx.Rngs(0))))
