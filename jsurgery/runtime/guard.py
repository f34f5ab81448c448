"""Losses and gradients that are not finite: the device skips their update, the host reports them one step later."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsurgery.errors import Diverged
from jsurgery.runtime import processes
from jsurgery.runtime.mesh import leaf_name, to_host
from jsurgery.runtime.progress import say

STACKED = ("blocks/", "query_maps/", "key_maps/", "projections/")  # leaves with a row for every block that has them


def keep_if_finite(finite: jax.Array, new: Any, old: Any) -> Any:
    """`new` if the step's numbers were finite, otherwise `old`: the states after and before the step."""
    return jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)


def non_finite(tree: Any) -> Any:
    """For every leaf, whether it holds numbers that are not finite: bool [], or [rows] for stacked leaves."""

    def has_non_finite(path: tuple, leaf: jax.Array) -> jax.Array:
        stacked = leaf.ndim > 0 and any(part in leaf_name(path) + "/" for part in STACKED)
        return ~jnp.isfinite(leaf).all(axis=tuple(range(int(stacked), leaf.ndim)))

    return jax.tree_util.tree_map_with_path(has_non_finite, tree)


class Guard:
    """Stops training when losses or gradients are not finite.

    The device discards such an update by itself. The host reads the values one step later, so that it never waits. Up
    to `allowed` such steps of a run are reported and skipped. `likely_cause(step, numbers, details)` is the text that
    says where a non-finite number may come from.
    """

    def __init__(self, stage: str, allowed: int, likely_cause: Callable[[int, Any, Any], str]):
        self.stage, self.allowed, self.likely_cause, self.skipped = stage, allowed, likely_cause, 0
        self._last: tuple[int, Any, Any] | None = None

    def record(self, step: int, numbers: Any, details: Any = None) -> None:
        """Takes the losses and norms of a step, with `details` for `likely_cause`, and checks the step before it.

        Raises Diverged if that step was not finite and no further step may be skipped.
        """
        for leaf in jax.tree.leaves(numbers):
            if leaf.is_fully_replicated:
                leaf.copy_to_host_async()
        last, self._last = self._last, (step, numbers, details)
        self._check(last)

    def check_last(self) -> None:
        """Waits for the last recorded step and checks it, so that its state may be saved."""
        last, self._last = self._last, None
        self._check(last)

    @property
    def metrics(self) -> dict[str, int]:
        return {"skipped": self.skipped} if self.allowed else {}

    def _check(self, recorded: tuple[int, Any, Any] | None) -> None:
        if recorded is None:
            return
        step, numbers, details = recorded
        values = to_host(numbers)
        if all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(values)):
            return
        self.skipped += 1
        message = f"{self.stage}: step {step + 1}: {self.likely_cause(step, values, details)}; the update was skipped"
        if self.skipped > self.allowed:
            limit = f"at most {self.allowed} steps may be skipped (config.max_skipped)"
            raise Diverged(f"{message}; stopped: {limit}; all saved checkpoints are finite")
        say(f"{message} ({self.skipped} of at most {self.allowed} skipped steps, config.max_skipped)")


def describe_non_finite(flags: Any) -> str:
    """The names of the leaves that `non_finite` has flagged, with their blocks."""
    names = []
    for path, flag in jax.tree_util.tree_leaves_with_path(to_host(flags)):
        if flag.any():
            rows = ", ".join(map(str, np.flatnonzero(flag))) if flag.ndim else ""
            names.append(f"{leaf_name(path)}" + (f" of block {rows}" if rows else ""))
    total = len(jax.tree.leaves(flags))
    if len(names) > 3:
        return f"{', '.join(names[:3])} and {len(names) - 3} more of {total}"
    return ", ".join(names)


def rows_with_faults(examples: Any, rows: Any) -> list[int]:
    """The rows of a batch whose examples hold numbers that are not finite, on all processes together.

    `examples` are this process's `rows` of the batch. All processes must call it.
    """
    bad = {
        int(row)
        for leaf in jax.tree.leaves(examples)
        for row, values in zip(rows, leaf, strict=True)
        if np.issubdtype(np.asarray(values).dtype, np.floating) and not np.isfinite(values).all()
    }
    return sorted({row for bad_rows in processes.gather_messages(sorted(bad)) for row in bad_rows})


def likely_causes(loss: Any, batch: int, bad_rows: list[int], params: Any, gradients: Any = None) -> str:
    """Where a loss or gradient that is not finite may come from: examples of the batch, weights, or gradients.

    `gradients` are the flags that `non_finite` returns for them.
    """
    causes = [f"loss {float(loss):.4g} and its gradients are not all finite: batch {batch}"]
    if bad_rows:
        causes[0] += f", whose examples {', '.join(map(str, bad_rows))} are not finite"
    if weights := describe_non_finite(jax.jit(non_finite)(params)):
        causes.append(f"weights {weights}")
    if gradients is not None and (names := describe_non_finite(gradients)):
        causes.append(f"gradients of {names}")
    return "; ".join(causes)
