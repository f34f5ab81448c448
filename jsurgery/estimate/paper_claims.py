"""The savings that the Attention Surgery paper claims, beside the counts of our cost model."""

from typing import Any

from jsurgery.rates import Rate
from jsurgery.wan.cost import Workload, block_flops, feature_map_cost, savings, share
from jsurgery.wan.model_sizes import PUBLISHED

# Table 7 as printed: degree, layers, millions of parameters, GFLOP of a feature map.
TABLE_7 = ((2, 2, 1.2, 30), (3, 2, 2.4, 60), (4, 2, 3.9, 70), (6, 3, 15.4, 387))


def paper_claims() -> list[dict[str, Any]]:
    """One row for each claim, for Wan2.1 1.3B: {"claim", "printed": in the paper, "counted": by us, "note"}."""
    wan = PUBLISHED["Wan2.1 1.3B"]
    videos = (81, 320, 480), (81, 480, 832), (121, 320, 480)
    low, high, long = (Workload(wan, 0).of_video(*video) for video in videos)
    rows = []

    def claim(text: str, printed: str, counted: str, note: str = "") -> None:
        rows.append({"claim": text, "printed": printed, "counted": counted, "note": note})

    for degree, layers, millions, giga in TABLE_7:
        cost = feature_map_cost(degree, layers, wan.num_attention_heads, wan.attention_head_dim, low.tokens)
        counted = f"{cost.parameters / 1e6:.1f} M, {cost.flops / 1e9:.1f} GFLOP"
        note = "" if abs(cost.flops / 1e9 - giga) < 1 else "a slip of the paper: its own parameter count gives ours"
        claim(f"Table 7: degree {degree}, {layers} layers", f"{millions} M, {giga} GFLOP", counted, note)
    claim("self-attention's share of a block at 480x832", "more than 76 %", percent(share(block_flops(high, 1))))

    def saved(work: Workload, count: int, rate: Rate) -> dict[str, float]:
        return savings(work, [rate] * count + [1] * (wan.num_layers - count))

    claim("“up to 40 %”: 15R8 at 320x480, cores", "up to 40 %", percent(saved(low, 15, 8)["core"]), "three readings")
    claim("“up to 40 %”: 25R2 at 480x832, cores", "up to 40 %", percent(saved(high, 25, 2)["core"]))
    claim("“up to 40 %”: 20R8 at 480x832, network", "up to 40 %", percent(saved(high, 20, 8)["network"]))
    claim("15R2 at 480x832, cores", "not printed", percent(saved(high, 15, 2)["core"]))
    claim("15R2 at 480x832, blocks", "not printed", percent(saved(high, 15, 2)["blocks"]))
    before, after = block_flops(long, 1), block_flops(long, 8)
    ratios = (
        ("core", before.core / after.core),
        ("attention with projections", (before.core + before.projections) / (after.core + after.projections)),
        ("the whole block", before.total / after.total),
    )
    for name, ratio in ratios:
        note = "the core alone comes near the printed number" if name == "core" else ""
        claim(f"“6x faster per block” at 121 frames, R8: {name}", "6x", f"{ratio:.2f}x", note)
    return rows


def percent(part: float) -> str:
    return f"{100 * part:.1f} %"
