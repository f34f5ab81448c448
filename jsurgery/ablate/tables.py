"""The tables of the ablations: their arms, what is measured on each, and the paper's numbers."""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

PAPER_BLOCKS = 30  # of Wan2.1 1.3B; names of arms count these blocks
# An arm is measured after these shares of its fine-tuning steps, as the paper measures after 400 to 1000 of 1000 steps.
STEPS = (0.5, 1.0)
BUDGETS = ("15R4", "20R4", "20R8", "25R4")  # of the paper's Table 5
MAPS = ("feature_maps", "initial", "none")  # distilled, as initialised, without a linear branch


@dataclasses.dataclass(frozen=True)
class Arm:
    """One model of a table.

    Attributes:
      name: the name of its row.
      blocks: the converted blocks, counted as in the paper: "20R8" is two thirds of the blocks at rate 8.
      selection: how the blocks are chosen: "homogeneous" or "heterogeneous".
      maps: which feature maps the model gets, one of `MAPS`.
      finetuned: whether it is fine-tuned before it is measured.
      changes: config fields of distillation or planning with other values, field -> value. Arms with equal changes
        share a distillation.
      paper: the paper's numbers, column -> value.
    """

    name: str
    blocks: str = "20R8"
    selection: str = "homogeneous"
    maps: str = "feature_maps"
    finetuned: bool = True
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ArmTable:
    """A table: its arms, what is measured on each, and which arms are compared item by item.

    Attributes:
      title: its title in the paper, or its question.
      measures: any of "attention" (errors after distillation), "velocity" (errors on held-out traces), "samples"
        (scores of sampled videos) and "shares" (the softmax branch's share of the denominator).
      contrasts: pairs (a, b) of arms; the table shows a - b.
      facts: any of "cost" (attention FLOPs over the teacher's) and "phi" (parameters and FLOPs of one feature map).
    """

    title: str
    arms: tuple[Arm, ...]
    measures: tuple[str, ...]
    contrasts: tuple[tuple[str, str], ...] = ()
    facts: tuple[str, ...] = ("cost",)


def scores(total: float, quality: float, semantic: float) -> dict[str, float]:
    """VBench scores as the paper prints them."""
    return {"Total": total, "Quality": quality, "Semantic": semantic}


def scaled(blocks: str, layers: int) -> str:
    """The paper's budget scaled to a model of another depth: "20R8" of 30 blocks is "4R8" of 6."""
    match = re.fullmatch(r"(\d+)R(\w+)", blocks)
    assert match is not None, blocks
    return f"{max(1, round(int(match[1]) * layers / PAPER_BLOCKS))}R{match[2]}"


def pairs(arms: tuple[Arm, ...]) -> tuple[tuple[str, str], ...]:
    """The second arm of every two against the first."""
    return tuple((b.name, a.name) for a, b in zip(arms[::2], arms[1::2], strict=True))


DISTILLATION = (
    Arm("15 linear, not distilled", "15Rlinear", maps="initial", paper=scores(59.7, 69.7, 20.0)),
    Arm("15 linear, distilled", "15Rlinear", paper=scores(78.9, 82.2, 65.9)),
    Arm("20R8, not distilled", maps="initial", paper=scores(77.3, 80.2, 65.9)),
    Arm("20R8, distilled", paper=scores(80.0, 81.7, 73.2)),
)

TABLE_5 = {
    "15R4": (scores(81.0, 82.4, 75.1), scores(81.9, 83.2, 76.4)),
    "20R4": (scores(80.9, 81.9, 76.61), scores(81.1, 82.5, 75.2)),
    "20R8": (scores(80.0, 81.7, 73.2), scores(80.9, 82.3, 75.4)),
    "25R4": (scores(79.9, 81.1, 75.1), scores(80.2, 82.1, 72.5)),
}
BUDGET_ARMS = tuple(
    Arm(f"{blocks}, {selection}", blocks, selection, paper=paper)
    for blocks in BUDGETS
    for selection, paper in zip(("homogeneous", "heterogeneous"), TABLE_5[blocks], strict=True)
)
PAPER_PLANS = tuple(
    Arm(f"{blocks}, by attention errors", blocks, "heterogeneous", changes={"plan.errors": "attention"})
    for blocks in BUDGETS
)

ATTENTION_LOSS = {"distill.loss": "attention"}
LOSSES = (
    Arm("20R8, attention loss", changes=ATTENTION_LOSS, paper=scores(79.5, 81.5, 71.5) | {"Dynamic degree": 37.5}),
    Arm("20R8, value loss", paper=scores(80.0, 81.7, 73.2) | {"Dynamic degree": 66.1}),
    Arm(
        "15R8, attention loss",
        "15R8",
        changes=ATTENTION_LOSS,
        paper=scores(81.2, 82.8, 74.6) | {"Dynamic degree": 51.8},
    ),
    Arm("15R8, value loss", "15R8", paper=scores(80.1, 81.9, 72.9) | {"Dynamic degree": 66.1}),
)

TABLE_7 = {  # (degree, layers): the totals at 10R8, 15R8, 20R8, millions of parameters, GFLOP
    (6, 3): (82.1, 80.8, 80.3, 15.4, 387),
    (4, 2): (82.3, 81.6, 80.3, 3.9, 70),
    (3, 2): (82.3, 81.9, 79.8, 2.4, 60),
    (2, 2): (82.1, 81.5, 80.2, 1.2, 30),
}
TABLE_7_COLUMNS = ("10R8", "15R8", "20R8", "M params", "GFLOP")
FEATURE_MAPS = tuple(
    Arm(
        f"degree {degree}, {layers} layers",
        changes={f"hybrid.{name}": n for name, n in (("degree", degree), ("layers", layers)) if n != 2},
        paper=dict(zip(TABLE_7_COLUMNS, printed, strict=True)),
    )
    for (degree, layers), printed in TABLE_7.items()
)

PHI = tuple(
    Arm(
        f"{activation}, {'calibrated' if calibrate else 'raw'}",
        finetuned=False,
        changes={name: value for name, value, default in changed if value != default},
    )
    for activation, calibrate in itertools.product(("relu", "softplus", "exp", "sigmoid", "elu1"), (True, False))
    for changed in [(("hybrid.activation", activation, "relu"), ("distill.calibrate", calibrate, True))]
)

HEDGEHOG = {"hybrid.activation": "hedgehog", "hybrid.degree": 1, "hybrid.layers": 1}

ARM_TABLES = {
    "distillation": ArmTable(
        "Table 3: attention distillation", DISTILLATION, ("velocity", "samples"), contrasts=pairs(DISTILLATION)
    ),
    "budgets": ArmTable(
        "Table 5: one rate, or a rate for each block",
        BUDGET_ARMS + PAPER_PLANS,
        ("velocity", "samples"),
        contrasts=pairs(BUDGET_ARMS)
        + tuple((f"{blocks}, by attention errors", f"{blocks}, heterogeneous") for blocks in BUDGETS),
    ),
    "loss": ArmTable("Table 6: the loss of distillation", LOSSES, ("velocity", "samples"), contrasts=pairs(LOSSES)),
    "feature_map": ArmTable(
        "Table 7: degree and layers of φ",
        FEATURE_MAPS,
        ("attention", "velocity", "samples"),
        contrasts=tuple((arm.name, FEATURE_MAPS[-1].name) for arm in FEATURE_MAPS[:-1]),
        facts=("cost", "phi"),
    ),
    "front": ArmTable(
        "Fig. 6: how many blocks, at which rate",
        tuple(Arm(f"{count}R{rate}", f"{count}R{rate}") for count in (15, 20, 25) for rate in (2, 4, 8)),
        ("velocity", "samples"),
        contrasts=(("25R4", "20R8"), ("20R4", "15R8")),  # pairs of about the same cost
    ),
    "linear_branch": ArmTable(
        "No linear branch at all",
        tuple(
            Arm(f"{blocks}, {text}", blocks, maps=maps)
            for blocks in ("20R8", "30R8")
            for maps, text in (("none", "softmax tokens alone"), ("feature_maps", "with the linear branch"))
        ),
        ("velocity", "samples"),
        contrasts=tuple(
            (f"{blocks}, with the linear branch", f"{blocks}, softmax tokens alone") for blocks in ("20R8", "30R8")
        ),
    ),
    "stabilizer": ArmTable(
        "The stabiliser: the largest score (the paper) or the log-sum-exp",
        (Arm("max", changes={"hybrid.stabilizer": "max"}), Arm("lse")),
        ("attention", "velocity", "samples"),
        contrasts=(("lse", "max"),),
    ),
    "phi": ArmTable(
        "φ: activation and initialisation",
        PHI,
        ("attention", "velocity"),
        contrasts=tuple((arm.name, PHI[0].name) for arm in PHI[1:]),
    ),
    "lattice": ArmTable(
        "The lattice: every frame's sites alike, or moved by one a frame",
        (Arm("strided"), Arm("staggered", changes={"hybrid.lattice": "staggered"})),
        ("attention", "velocity", "samples"),
        contrasts=(("staggered", "strided"),),
    ),
    "hedgehog": ArmTable(
        "HedgeHog as the feature map",
        (
            Arm("polynomial", finetuned=False),
            Arm("polynomial, 15 linear", "15Rlinear", finetuned=False),
            Arm("HedgeHog", finetuned=False, changes=HEDGEHOG),
            Arm("HedgeHog, 15 linear", "15Rlinear", finetuned=False, changes=HEDGEHOG),
        ),
        ("attention", "velocity"),
        contrasts=(("HedgeHog", "polynomial"), ("HedgeHog, 15 linear", "polynomial, 15 linear")),
        facts=("cost", "phi"),
    ),
    "shares": ArmTable(
        "The softmax branch's share of the denominator",
        tuple(
            Arm(f"30R{rate}, {'fine-tuned' if finetuned else 'distilled'}", f"30R{rate}", finetuned=finetuned)
            for rate in (2, 4, 8)
            for finetuned in (False, True)
        ),
        ("shares", "velocity"),
    ),
}
OTHER_TABLES = {  # tables with code of their own
    "errors": "Fig. 4: the error of every block",
    "objective": "Does the planner’s objective predict anything?",
    "attention": "How concentrated attention is",
    "rope": "φ before or after RoPE",
    "temporal": "Control: no attention between frames",
}
TABLES = (*OTHER_TABLES, *ARM_TABLES)
# Tables with a config of their own, which `--table=all` leaves out.
APART = {"families": "Which family of attention at which budget?"}
