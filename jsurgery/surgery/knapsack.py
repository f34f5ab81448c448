"""Which rate each block gets: the paper's eq. 9, a multiple-choice knapsack, solved to optimality.

Partial plans are (cost, error) pairs. Blocks are added one at a time. Dominated pairs are dropped, and so are pairs
that cannot beat the best plan known: the linear relaxation of the blocks still to come bounds them from below, and its
corners complete them to plans. Sums are taken in 64-bit fixed point, so that ties are exact in any order of addition.
"""

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from jsurgery.errors import InputError

COST_TOLERANCE = 1e-9
MAX_PARTIAL_PLANS = 1_000_000
_FIXED_POINT_BITS = 61
_BOUND_SLACK = 2.0**21  # far above the rounding of a float64 bound on 61-bit sums, far below what tells two plans apart


@dataclass(frozen=True)
class Solution:
    """An optimal plan.

    Attributes:
      indices: int [blocks], the chosen rate of each block.
      cost: the plan's total cost, in the unit of the costs.
      error: the plan's total error, the optimum.
      lower_bound: the optimum of the linear relaxation: no plan within the budget, mixed or not, has a smaller error.
    """

    indices: np.ndarray
    cost: float
    error: float
    lower_bound: float


@dataclass(frozen=True)
class ParetoFront:
    """The plans that no other plan beats in both cost and error, by rising cost and falling error.

    Attributes:
      costs, errors: [plans].
      indices: int [plans, blocks].
    """

    costs: np.ndarray
    errors: np.ndarray
    indices: np.ndarray


def solve_block_rates(errors: ArrayLike, costs: ArrayLike, budget: float) -> np.ndarray:
    """The rate of every block that minimises the total error within the budget (eq. 9).

    Args:
      errors: non-negative [blocks, rates]; inf forbids that rate in that block.
      costs: non-negative [blocks, rates], in any unit; inf forbids as well.
      budget: the most that the plan may cost, in the same unit; met if exceeded by rounding alone (1e-9 of it).

    Returns:
      int [blocks], the index of each block's rate. Of equally good plans the cheapest; of those the one with the lowest
      index in the first block in which they differ.

    Raises:
      InputError: a budget below the cheapest plan; NaN or negative numbers; shapes that differ; costs and errors so
        tightly correlated that more than MAX_PARTIAL_PLANS partial plans stay open (the problem is NP-hard).
    """
    return solve(errors, costs, budget).indices


def solve(errors: ArrayLike, costs: ArrayLike, budget: float) -> Solution:
    """`solve_block_rates`, with the plan's cost and error and the bound."""
    errors_BxR, costs_BxR, allowed_BxR = _validated(errors, costs)
    if not budget >= 0:
        raise InputError(f"budget: expected a number of at least 0, found {budget}")

    cheapest = math.fsum(np.min(costs_BxR, axis=1, where=allowed_BxR, initial=np.inf))
    dearest = math.fsum(np.max(costs_BxR, axis=1, where=allowed_BxR, initial=0.0))
    limit = min(budget, dearest) * (1 + COST_TOLERANCE)
    if cheapest > limit:
        raise InputError(f"budget: {budget:.10g} is below the cheapest plan, which costs {cheapest:.10g}")

    allowed_BxR &= (costs_BxR <= limit) & (errors_BxR <= _worst_choice(errors_BxR, costs_BxR, allowed_BxR, limit))
    fixed_costs_BxR, cost_shift = _fixed_point(costs_BxR, allowed_BxR, limit)
    fixed_errors_BxR, error_shift = _fixed_point(errors_BxR, allowed_BxR, errors_BxR[allowed_BxR].max())
    relaxations = list(_relaxations(fixed_errors_BxR, fixed_costs_BxR, allowed_BxR))
    # The cheapest plan fits, whatever rounding to the grid has done.
    fixed_limit = max(round(math.ldexp(limit, cost_shift)), int(relaxations[-1].costs[0]))

    layers: list[_Layer] = []
    known = np.iinfo(np.int64).max  # the error of the best whole plan so far
    front = _Layer.empty_plan()
    for block, relaxation in zip(reversed(range(len(errors_BxR))), reversed(relaxations[:-1]), strict=True):
        grown = _grow(front, fixed_errors_BxR[block], fixed_costs_BxR[block], allowed_BxR[block])
        grown = grown[fixed_limit - grown.cost >= relaxation.costs[0]]
        lower, upper = relaxation.bounds(fixed_limit - grown.cost)
        known = min(known, int((grown.error + upper).min()))
        front = _undominated(grown[grown.error + lower <= known + _BOUND_SLACK])
        layers.append(front)

    indices = _trace_back(layers, np.array([len(front.cost) - 1]))[0]
    blocks = np.arange(len(indices))
    error = math.fsum(errors_BxR[blocks, indices])
    relaxed, _ = relaxations[-1].bounds(np.array([fixed_limit]))
    return Solution(
        indices=indices,
        cost=math.fsum(costs_BxR[blocks, indices]),
        error=error,
        lower_bound=min(math.ldexp(float(relaxed[0]), -error_shift), error),
    )


def pareto_front(errors: ArrayLike, costs: ArrayLike) -> ParetoFront:
    """Every trade-off between cost and error: the optimum of eq. 9 for every budget at once.

    Meant for costs that all blocks share, whose sums coincide often; with arbitrary costs the front can grow
    exponentially in the number of blocks. Costs that differ by rounding alone (1e-9) count as one.

    Args:
      errors, costs: as in `solve_block_rates`.

    Raises:
      InputError: as in `solve_block_rates`; more than MAX_PARTIAL_PLANS points.
    """
    errors_BxR, costs_BxR, allowed_BxR = _validated(errors, costs)
    fixed_costs_BxR, _ = _fixed_point(costs_BxR, allowed_BxR, costs_BxR[allowed_BxR].max())
    fixed_errors_BxR, _ = _fixed_point(errors_BxR, allowed_BxR, errors_BxR[allowed_BxR].max())

    layers: list[_Layer] = []
    front = _Layer.empty_plan()
    for block in reversed(range(len(errors_BxR))):
        front = _undominated(_grow(front, fixed_errors_BxR[block], fixed_costs_BxR[block], allowed_BxR[block]))
        layers.append(front)

    indices_PxB = _trace_back(layers, np.arange(len(front.cost)))
    blocks = np.arange(indices_PxB.shape[1])
    costs_P = costs_BxR[blocks, indices_PxB].sum(1)
    distinct = np.append(costs_P[1:] > costs_P[:-1] * (1 + COST_TOLERANCE), True)
    indices_PxB = indices_PxB[distinct]
    return ParetoFront(costs_P[distinct], errors_BxR[blocks, indices_PxB].sum(1), indices_PxB)


def select_homogeneous(errors: ArrayLike, rate_index: int, num_blocks: int) -> np.ndarray:
    """The paper's homogeneous baseline: the `num_blocks` blocks that one rate harms least.

    Args:
      errors: [blocks, rates]; inf forbids.
      rate_index: the column of the rate.
      num_blocks: how many blocks to convert.

    Returns:
      int [num_blocks], block numbers, ascending. Ties go to the earlier block.

    Raises:
      InputError: fewer allowed blocks than asked for; a rate out of range; NaN or negative errors.
    """
    errors_BxR, _, allowed_BxR = _validated(errors, np.zeros_like(errors, dtype=np.float64))
    if not 0 <= rate_index < errors_BxR.shape[1]:
        raise InputError(f"rate_index: expected 0 to {errors_BxR.shape[1] - 1}, found {rate_index}")
    most = int(allowed_BxR[:, rate_index].sum())
    if not 0 <= num_blocks <= most:
        raise InputError(f"num_blocks: expected 0 to {most}, the blocks that allow this rate, found {num_blocks}")
    return np.sort(np.argsort(errors_BxR[:, rate_index], kind="stable")[:num_blocks])


def _validated(errors: ArrayLike, costs: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    errors_BxR, costs_BxR = np.asarray(errors, np.float64), np.asarray(costs, np.float64)
    if errors_BxR.ndim != 2 or errors_BxR.size == 0 or errors_BxR.shape != costs_BxR.shape:
        shapes = f"{errors_BxR.shape} and {costs_BxR.shape}"
        raise InputError(f"errors, costs: expected the same [blocks, rates], found {shapes}")
    for name, values_BxR in (("errors", errors_BxR), ("costs", costs_BxR)):
        bad = np.argwhere(~(values_BxR >= 0))
        if bad.size:
            block, rate = bad[0]
            found = f"{values_BxR[block, rate]} at block {block}, rate index {rate}"
            raise InputError(f"{name}: expected non-negative numbers, found {found}")
    allowed_BxR = np.isfinite(errors_BxR) & np.isfinite(costs_BxR)
    usable_B = allowed_BxR.any(axis=1)
    if not usable_B.all():
        raise InputError(f"errors, costs: block {np.argmin(usable_B)} has no rate that is finite in both")
    return errors_BxR, costs_BxR, allowed_BxR


def _worst_choice(errors_BxR: np.ndarray, costs_BxR: np.ndarray, allowed_BxR: np.ndarray, limit: float) -> float:
    """An error that no single choice of an optimal plan exceeds, at most blocks times that plan's total error.

    One huge entry that no good plan would choose must not take the fixed point's resolution from all others.
    """

    def fits(worst: float) -> bool:
        usable_BxR = allowed_BxR & (errors_BxR <= worst)
        return math.fsum(np.min(costs_BxR, axis=1, where=usable_BxR, initial=np.inf)) <= limit

    thresholds = np.unique(errors_BxR[allowed_BxR])
    return len(errors_BxR) * thresholds[bisect.bisect_left(thresholds, True, key=fits)]


def _fixed_point(values_BxR: np.ndarray, allowed_BxR: np.ndarray, largest: float) -> tuple[np.ndarray, int]:
    """Integers value * 2**shift, as fine as a sum over the blocks of values up to `largest` leaves room for."""
    shift = _FIXED_POINT_BITS - math.frexp(largest)[1] - (len(values_BxR) - 1).bit_length()
    return np.rint(np.ldexp(np.where(allowed_BxR, values_BxR, 0.0), shift)).astype(np.int64), shift


@dataclass(frozen=True)
class _Layer:
    """Partial plans [S] over the last blocks: sums, the newest block's choice, the rest's row in the layer before."""

    cost: np.ndarray
    error: np.ndarray
    choice: np.ndarray
    parent: np.ndarray

    @classmethod
    def empty_plan(cls) -> "_Layer":
        return cls(*(np.zeros(1, np.int64) for _ in range(4)))

    def __getitem__(self, rows: np.ndarray) -> "_Layer":
        return _Layer(self.cost[rows], self.error[rows], self.choice[rows], self.parent[rows])


def _grow(front: _Layer, errors_R: np.ndarray, costs_R: np.ndarray, allowed_R: np.ndarray) -> _Layer:
    choices = np.flatnonzero(allowed_R)
    return _Layer(
        cost=np.add.outer(costs_R[choices], front.cost).ravel(),
        error=np.add.outer(errors_R[choices], front.error).ravel(),
        choice=np.repeat(choices, len(front.cost)),
        parent=np.tile(np.arange(len(front.cost)), len(choices)),
    )


def _undominated(layer: _Layer) -> _Layer:
    # Blocks are added last to first and candidates come by rising choice: of equal pairs a stable sort leaves the
    # lowest indices first.
    ordered = layer[np.lexsort((layer.error, layer.cost))]
    least_before = np.minimum.accumulate(ordered.error)[:-1]
    front = ordered[np.flatnonzero(np.append(True, ordered.error[1:] < least_before))]
    if len(front.cost) > MAX_PARTIAL_PLANS:
        raise InputError(
            f"costs: more than {MAX_PARTIAL_PLANS} partial plans, none better than another; "
            "round the costs so that their sums coincide"
        )
    return front


def _trace_back(layers: list[_Layer], rows: np.ndarray) -> np.ndarray:
    indices = []
    for layer in reversed(layers):
        indices.append(layer.choice[rows])
        rows = layer.parent[rows]
    return np.stack(indices, axis=1)


@dataclass(frozen=True)
class _Relaxation:
    """The least error of the first blocks as a convex function of what they may cost.

    Its corners (costs, errors) are plans; slopes are what it gains per cost after each corner.
    """

    costs: np.ndarray
    errors: np.ndarray
    slopes: np.ndarray

    def bounds(self, budgets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """At each budget of at least costs[0]: the relaxed optimum (float), the error of the last corner that fits."""
        corner = np.searchsorted(self.costs, budgets, side="right") - 1
        upper = self.errors[corner]
        return upper - (budgets - self.costs[corner]) * self.slopes[corner], upper


def _relaxations(errors_BxR: np.ndarray, costs_BxR: np.ndarray, allowed_BxR: np.ndarray) -> Iterator[_Relaxation]:
    """The relaxation of the first 0, 1, ..., blocks blocks."""
    starts, steps = [], []  # steps: block, added cost, error gained, error gained per cost
    for block, allowed_R in enumerate(allowed_BxR):
        hull = _lower_hull(errors_BxR[block, allowed_R], costs_BxR[block, allowed_R])
        starts.append(hull[0])
        steepest = math.inf
        for (cost, error), (next_cost, next_error) in itertools.pairwise(hull):
            # A block's steps must stay in order, also when rounding makes the later one look better.
            steepest = min(steepest, (error - next_error) / (next_cost - cost))
            steps.append((block, next_cost - cost, error - next_error, steepest))
    steps.sort(key=lambda step: -step[3])
    block_S = np.array([step[0] for step in steps], np.int64)
    added_S = np.array([step[1] for step in steps], np.int64)
    gained_S = np.array([step[2] for step in steps], np.int64)
    for num_blocks in range(len(starts) + 1):
        taken = block_S < num_blocks
        start_cost, start_error = (sum(start[axis] for start in starts[:num_blocks]) for axis in (0, 1))
        yield _Relaxation(
            costs=start_cost + np.append(0, np.cumsum(added_S[taken])),
            errors=start_error - np.append(0, np.cumsum(gained_S[taken])),
            slopes=np.append(gained_S[taken] / added_S[taken], 0.0),
        )


def _lower_hull(errors_R: np.ndarray, costs_R: np.ndarray) -> list[tuple[int, int]]:
    """The (cost, error) corners of the lower convex hull, from the cheapest choice to the most accurate one."""
    points = sorted(zip(costs_R.tolist(), errors_R.tolist(), strict=True))
    hull = [points[0]]
    while better := [point for point in points if point[0] > hull[-1][0] and point[1] < hull[-1][1]]:
        cost, error = hull[-1]
        hull.append(max(better, key=lambda point: ((error - point[1]) / (point[0] - cost), point[0])))
    return hull
