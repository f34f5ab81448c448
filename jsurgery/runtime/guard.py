"""Numbers that are not finite: found on the device in every step, in time for the update; told one step later."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsurgery.errors import Diverged
from jsurgery.runtime import processes
from jsurgery.runtime.mesh import leaf_name, to_host
from jsurgery.runtime.progress import say

STACKED = ("blocks/", "query_maps/", "key_maps/")  # whose leaves have a row for every block (or converted block)


def keep_if_finite(finite: jax.Array, new: Any, old: Any) -> Any:
    """The new state of a step whose numbers are finite, otherwise the old one."""
    return jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)


def non_finite(tree: Any) -> Any:
    """For every leaf whether it holds numbers that are not finite, of stacked leaves by row."""

    def of(path: tuple, leaf: jax.Array) -> jax.Array:
        stacked = leaf.ndim > 0 and any(part in leaf_name(path) + "/" for part in STACKED)
        return ~jnp.isfinite(leaf).all(axis=tuple(range(int(stacked), leaf.ndim)))

    return jax.tree_util.tree_map_with_path(of, tree)


class Guard:
    """What a step's numbers (losses, norms) say is looked at when the next step has begun: the host never waits.

    The update of a step that has one that is not finite was not applied. Up to `allowed` such steps of a run are said
    and passed over. `explain(step, numbers, details)` tells where they may come from.
    """

    def __init__(self, stage: str, allowed: int, explain: Callable[[int, Any, Any], str]):
        self.stage, self.allowed, self.explain, self.skipped = stage, allowed, explain, 0
        self._last: tuple[int, Any, Any] | None = None

    def record(self, step: int, numbers: Any, details: Any = None) -> None:
        """Takes the numbers of a step, and `details` for `explain`; raises Diverged if the step before has failed."""
        for leaf in jax.tree.leaves(numbers):
            if leaf.is_fully_replicated:
                leaf.copy_to_host_async()
        last, self._last = self._last, (step, numbers, details)
        self._look(last)

    def check_last(self) -> None:
        """Waits for the last step; after it, nothing that was saved is in doubt."""
        last, self._last = self._last, None
        self._look(last)

    @property
    def metrics(self) -> dict[str, int]:
        return {"skipped": self.skipped} if self.allowed else {}

    def _look(self, seen: tuple[int, Any, Any] | None) -> None:
        if seen is None:
            return
        step, numbers, details = seen
        values = to_host(numbers)
        if all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(values)):
            return
        self.skipped += 1
        where = self.explain(step, values, details)
        told = f"{self.stage}: step {step + 1}: {where}; its update was not made"
        if self.skipped > self.allowed:
            limit = f"after {self.allowed} such steps passed over" if self.allowed else "see config.max_skipped"
            raise Diverged(f"{told}; stopped, {limit}; what is saved is finite")
        say(f"{told}; passed over, {self.skipped} of at most {self.allowed}")


def describe_non_finite(flags: Any) -> str:
    """Names of the leaves that `faults` found, with their blocks."""
    names = []
    for path, found in jax.tree_util.tree_leaves_with_path(to_host(flags)):
        if found.any():
            rows = ", ".join(map(str, np.flatnonzero(found))) if found.ndim else ""
            names.append(f"{leaf_name(path)}" + (f" of block {rows}" if rows else ""))
    total = len(jax.tree.leaves(flags))
    if len(names) > 3:
        return f"{', '.join(names[:3])} and {len(names) - 3} more of {total}"
    return ", ".join(names)


def rows_with_faults(examples: Any, rows: Any) -> list[int]:
    """Which of a batch's examples, of which this process has `rows`, hold numbers that are not finite; all ask."""
    bad = {
        int(row)
        for leaf in jax.tree.leaves(examples)
        for row, values in zip(rows, leaf, strict=True)
        if np.issubdtype(np.asarray(values).dtype, np.floating) and not np.isfinite(values).all()
    }
    return sorted({row for found in processes.gather_messages(sorted(bad)) for row in found})


def likely_causes(loss: Any, batch: int, bad_rows: list[int], params: Any, gradients: Any = None) -> str:
    """Where a loss or gradient that is not finite may come from: examples, weights; `gradients` are of `faults`."""
    told = [f"loss {float(loss):.4g} and its gradients are not all finite: batch {batch}"]
    if bad_rows:
        told[0] += f", whose examples {', '.join(map(str, bad_rows))} are not finite"
    if weights := describe_non_finite(jax.jit(non_finite)(params)):
        told.append(f"weights {weights}")
    if gradients is not None and (found := describe_non_finite(gradients)):
        told.append(f"gradients of {found}")
    return "; ".join(told)
