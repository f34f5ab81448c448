"""Frees models that nothing uses any more."""

import gc

import jax

LARGE = 2**28  # bytes on all devices; below, waiting for Python's own collection costs nothing


def free_dropped_models() -> None:
    """Collects garbage, if devices hold much: flax leaves a model's weights in reference cycles."""
    if sum(array.nbytes for array in jax.live_arrays()) > LARGE:
        gc.collect()
