"""Two pages about cost: `cost.html` (one block over duration and rate) and `front.html` (the Pareto front of plans)."""

from collections.abc import Sequence
from typing import Any

from etils import epath

from jsurgery.attention.kinds.registry import rate_name
from jsurgery.io.files import replacing
from jsurgery.io.results import si_prefix
from jsurgery.report.charts import POINTS, Chart, line_chart
from jsurgery.report.templates import percent, render
from jsurgery.wan.cost import PARTS

PAGE = "cost.html"
SIDES = {
    "core": "Core attention, TFLOP over frames",
    "attention": "Attention with projections",
    "block": "Whole block",
}


def write_cost_page(folder: epath.Path, result: dict[str, Any], front: dict[str, Any] | None) -> epath.Path:
    """Writes `cost.html`: the result of `jsurgery cost` (the paper's Fig. 2) and, if given, the front (Fig. 6)."""
    video = result["video"]
    prefix, scale = si_prefix(result["block"]["1"]["flops"]["total"] / 100)
    sections = [
        {
            "title": "One block by duration",
            "text": "TFLOP of one block over frames at 320 × 480, as in the paper’s Fig. 2: the attention core, which "
            "surgery changes; the attention layer with its projections; and the whole block.",
            "charts": duration_charts(result["durations"]),
        },
        {
            "title": "One block by part",
            "text": f"{prefix}FLOP at {video['frames']} frames of {video['height']} × {video['width']}, "
            f"{result['tokens']:,} tokens. One multiply-add is two FLOPs.",
            "table": {
                "head": ["rate", *(part.replace("_", " ") for part in PARTS)],
                "rows": [
                    [rate_name(rate), *(f"{row['flops'][part] / scale:,.1f}" for part in PARTS)]
                    for rate, row in result["block"].items()
                ],
            },
        },
        {
            "title": "The network by number of converted blocks",
            "text": "Percent of the teacher’s FLOPs in one forward pass: the cost axis of the paper’s Fig. 6.",
            "charts": [conversion_chart(result["conversions"])],
        },
    ]
    if front is not None:
        sections.append(front_section(front))
    sections.append(
        {
            "title": "Beside the paper",
            "text": "Counted for Wan2.1 1.3B, whichever model this page is about. Differences are explained: Table 7’s "
            "70 GFLOP contradicts its own 3.9 M parameters, which give 99.4.",
            "table": {
                "head": ["claim", "printed", "counted", ""],
                "rows": [list(row.values()) for row in result["paper"]],
            },
        }
    )
    lead = (
        f"Work and memory of {result['model']} with and without attention surgery, counted from its architecture for "
        f"{video['frames']} frames of {video['height']} × {video['width']}, which are {result['tokens']:,} tokens. "
        "Nothing here is measured."
    )
    return write_page(folder / PAGE, f"What {result['model']} costs", lead, headlines(result), sections)


def headlines(result: dict[str, Any]) -> list[dict[str, str]]:
    """The numbers at the top of the page: a value, what it is, and a note."""
    softmax, blocks = result["block"]["1"]["flops"], result["blocks"]
    prefix, scale = si_prefix(softmax["total"])
    found = [
        {
            "value": percent(result["self_attention_share"]),
            "title": "of a block’s work is self-attention",
            "note": f"{(softmax['core'] + softmax['projections']) / scale:.2f} of {softmax['total'] / scale:.2f} "
            f"{prefix}FLOP. Surgery changes its core alone: {softmax['core'] / softmax['total']:.0%} of the block.",
        }
    ]
    if "8" in result["block"]:
        eighth = result["block"]["8"]["flops"]
        found.append(
            {
                **saving(1 - eighth["total"] / softmax["total"], "work in a block at rate 8"),
                "note": f"{eighth['total'] / scale:.2f} {prefix}FLOP, of which its attention core "
                f"{eighth['core'] / scale:.2f}; one token in eight keeps exact attention.",
            }
        )
    sampling = result["sampling"]
    prefix, scale = si_prefix(sampling["flops"])
    whole = f"{sampling['flops'] / scale:.1f} {prefix}FLOP for a video: {sampling['velocities']} passes, text and VAE"
    if plan := result.get("plan"):
        converted = sum(rate != 1 for rate in plan["rates"])
        found.append(
            {
                **saving(
                    1 - plan["sampling"]["flops"] / sampling["flops"],
                    f"work for a video, with {converted} of {blocks} blocks rebuilt",
                ),
                "note": f"{plan['sampling']['flops'] / scale:.1f} of {whole}.",
            }
        )
    else:
        found.append(
            {
                "value": f"{sampling['flops'] / scale:.1f} {prefix}FLOP",
                "title": "for one video",
                "note": f"{sampling['velocities']} passes through {blocks} blocks, the text encoder and the VAE.",
            }
        )
    return found


def saving(share: float, of: str) -> dict[str, str]:
    return {"value": percent(abs(share)), "title": f"{'less' if share >= 0 else 'more'} {of}"}


def write_front_page(folder: epath.Path, front: dict[str, Any]) -> epath.Path:
    """Writes `front.html`: the result of `jsurgery plan --front`, with the chosen plan between its neighbours."""
    chosen = front["chosen"]
    lead = (
        f"Every optimal choice of rates for the blocks, by the attention work that it takes ({front['unit']}) and the "
        "error that distillation measured, and the plan that this run chose among them."
    )
    found = [
        {
            "value": percent(chosen["share_of_teacher"]),
            "title": "of the teacher’s attention work",
            "note": f"{sum(rate != 1 for rate in chosen['rates'])} of {len(chosen['rates'])} blocks rebuilt.",
        },
        {
            "value": f"{chosen['error']:.3g}",
            "title": "sum of the blocks’ errors",
            "note": "Proven optimal at this cost."
            if chosen["proven_optimal"]
            else f"A sum of {chosen['optimum']:.3g} is possible at this cost.",
        },
    ]
    return write_page(folder / "front.html", "Cost against error", lead, found, [front_section(front)])


def front_section(front: dict[str, Any]) -> dict[str, Any]:
    chosen = front["chosen"]
    if chosen["proven_optimal"]:
        verdict = "The chosen plan is proven optimal: no plan that costs as little has a smaller error."
    else:
        verdict = f"The chosen plan is not optimal: its cost allows a total error of {chosen['optimum']:.4g}."
    rates = ", ".join(map(str, front["candidates"]))
    head = ["", f"cost, {front['unit']}", "of the teacher", "error", "rates"]
    return {
        "title": "The Pareto front",
        "text": f"The {len(front['plans'])} plans of rates {rates} that no other plan beats in both cost and estimated "
        f"error, as in the paper’s Fig. 6, and the plans that convert blocks at a single rate. {verdict} "
        f"Mixing plans could not go below {chosen['error_bound']:.4g}.",
        "charts": [front_chart(front)],
        "front": True,
        "table": {"head": head, "rows": neighbours(front)},
    }


def neighbours(front: dict[str, Any]) -> list[list[str]]:
    """Rows of a table: the chosen plan between its nearest cheaper and dearer plans on the front."""
    chosen = front["chosen"]
    plans = {"next cheaper": chosen["cheaper"], "chosen": chosen, "next dearer": chosen["dearer"]}
    return [
        [
            name,
            f"{plan['cost']:.4g}",
            f"{100 * plan['share_of_teacher']:.2f} %",
            f"{plan['error']:.5g}",
            " ".join(map(str, plan["rates"])),
        ]
        for name, plan in plans.items()
        if plan is not None
    ]


def duration_charts(rows: Sequence[dict[str, Any]]) -> list[Chart]:
    rates = {rate: rate_name(rate) for rate in rows[0]["core"]}
    charts = []
    for side, title in SIDES.items():
        points = [{"step": row["frames"], **{rate: row[side][rate] / 1e12 for rate in rates}} for row in rows]
        charts.append(line_chart(title, points, rates))
    return charts


def conversion_chart(conversions: dict[str, list[float]]) -> Chart | None:
    blocks = len(next(iter(conversions.values())))
    points = [{"step": n, **{rate: 100 * shares[n] for rate, shares in conversions.items()}} for n in range(blocks)]
    title = "Percent of the teacher’s FLOPs, over converted blocks"
    return line_chart(title, points, {rate: rate_name(rate) for rate in conversions})


def front_chart(front: dict[str, Any]) -> Chart | None:
    """Error over cost in percent of the teacher's. The front is thinned to as many points as a chart draws.

    None if all plans cost the same.
    """

    def point(name: str, plan: dict[str, Any]) -> dict[str, float]:
        return {"step": 100 * plan["share_of_teacher"], name: plan["error"]}

    points = [point("chosen", front["chosen"])]
    for rate, plans in front["homogeneous"].items():
        points += [point(rate, plan) for plan in plans]
    plans, room = front["plans"], max(2, POINTS - len(points))
    kept = sorted({round(i * (len(plans) - 1) / (room - 1)) for i in range(room)})
    points += [point("front", plans[i]) for i in kept]
    names = {rate: f"{rate_name(rate)} alone" for rate in front["homogeneous"]}
    names |= {"front": "the front", "chosen": "the chosen plan"}
    if len({point["step"] for point in points}) == 1:
        return None
    title = "Total error over attention cost, percent of the teacher’s"
    return line_chart(title, sorted(points, key=lambda point: point["step"]), names)


def write_page(
    path: epath.Path, title: str, lead: str, found: Sequence[dict[str, str]], sections: Sequence[dict[str, Any]]
) -> epath.Path:
    """lead: what the page is. found: `headlines`."""
    page = render("cost.html.jinja", title=title, lead=lead, found=found, sections=sections)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(page)
    return path
