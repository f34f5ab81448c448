"""Draws the pictures of the docs: from the package's own token order, costs and planner, and from tables of results.

python docs/draw_pictures.py

writes docs/pictures/*.svg. A test compares the files with what these functions draw.
"""

import html
import itertools
import math
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from jsurgery import solve_block_rates
from jsurgery.ablate.family_bakeoff import MIX
from jsurgery.attention.kinds.registry import rate_name
from jsurgery.attention.token_order import TokenOrder
from jsurgery.load_config import load_config
from jsurgery.rates import Rate
from jsurgery.wan.checkpoint import read_config
from jsurgery.wan.cost import Workload, block_flops, core_flops, workload
from jsurgery.wan.model_folder import model_path
from jsurgery.wan.model_sizes import PUBLISHED
from jsurgery.wan.video_size import num_tokens

HERE = pathlib.Path(__file__).parent
INK, MUTED, LINE = "#1b1d22", "#5d636e", "#c9ccd2"
ZONES = ("#2450b8", "#6f93e0", "#b9ccf3", "#f0d2b8")  # kept by softmax at rates 8, 4, 2; linear at all of them
SOFTMAX, LINEAR = "#2450b8", "#f0d2b8"
PARTS = {"core": "#2450b8", "projections": "#10805b", "cross_attention": "#a37900", "ffn": "#8a909b"}
PART_NAMES = {"core": "attention", "projections": "projections", "cross_attention": "cross-attention", "ffn": "MLP"}
RATES: tuple[Rate, ...] = (1, 2, 4, 8, "linear")
HEIGHT, WIDTH = 480, 832
FAMILIES = {
    "hybrid": "#2450b8",
    "chunked hybrid": "#10805b",
    "sparse + linear": "#c2510c",
    "linear": "#8a909b",
    MIX: "#1b1d22",
}


def text(x: float, y: float, words: object, size: int = 13, anchor: str = "start", colour: str = INK) -> str:
    words = html.escape(str(words))
    return f'<text x="{x:.4g}" y="{y:.4g}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{words}</text>'


def box(x: float, y: float, width: float, height: float, colour: str, more: str = "") -> str:
    return f'<rect x="{x:.5g}" y="{y:.5g}" width="{width:.4g}" height="{height:.4g}" fill="{colour}"{more}/>'


def svg(width: int, height: int, title: str, shapes: Sequence[str]) -> str:
    """A picture on white, readable in dark pages too."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif"'
    parts = [f'{head} role="img">', f"<title>{html.escape(title)}</title>", box(0, 0, width, height, "#ffffff")]
    return "\n".join([*parts, *shapes, "</svg>"]) + "\n"


def tokens() -> str:
    """The tokens of two frames by the highest rate at which they keep softmax, in raster order and in prefix order."""
    frames, rows, columns = 2, 4, 6
    order = TokenOrder(frames * rows * columns, rates=(2, 4, 8))
    zone = np.zeros(order.num_tokens, int)
    for number, rate in enumerate((8, 4, 2)):  # the first zone that has the token
        kept = order.permutation[: order.num_softmax(rate)]
        zone[kept] = np.where(zone[kept] == 0, number + 1, zone[kept])
    zone = np.where(zone == 0, 4, zone) - 1
    side, shapes = 30, []
    for frame in range(frames):
        left = 24 + frame * (columns * side + 36)
        shapes.append(text(left, 24, f"frame {frame}"))
        for place in range(rows * columns):
            token = frame * rows * columns + place
            x, y = left + place % columns * side, 34 + place // columns * side
            shapes.append(box(x, y, side - 2, side - 2, ZONES[zone[token]]))
            shapes.append(text(x + 14, y + 19, token, 11, "middle", "#ffffff" if zone[token] == 0 else INK))
    top, narrow = 196, 432 / order.num_tokens
    shapes.append(text(24, top - 10, "the same tokens in prefix order"))
    for place, token in enumerate(order.permutation):
        shapes.append(box(24 + place * narrow, top, narrow - 1, 26, ZONES[zone[token]]))
    for number, rate in enumerate((8, 4, 2)):
        y, end = top + 40 + 22 * number, 24 + order.num_softmax(rate) * narrow - 1
        shapes.append(f'<path d="M24 {y}H{end:.5g}M24 {y - 4}v8M{end:.5g} {y - 4}v8" stroke="{INK}" fill="none"/>')
        shapes.append(
            text(end + 8, y + 4, f"softmax at rate {rate}: {order.num_softmax(rate)} of {order.num_tokens}", 12)
        )
    return svg(480, 312, "Which tokens keep softmax at each rate", shapes)


def attention() -> str:
    """The attention of every query to every key in prefix order: softmax, rates 2 and 8, linear."""
    side, shapes = 100, [text(16, 22, "each square: queries down, keys across, in prefix order")]
    order = TokenOrder(num_tokens(81, HEIGHT, WIDTH), rates=(2, 4, 8))
    for number, rate in enumerate((1, 2, 8, "linear")):
        x, kept = 16 + number * (side + 16), order.num_softmax(rate) / order.num_tokens
        shapes += [text(x + side / 2, 48, rate_name(rate), 13, "middle"), box(x, 58, side, side, LINEAR)]
        if kept:
            shapes.append(box(x, 58, kept * side, side, SOFTMAX))
        words = f"{order.num_softmax(rate):,} keys" if kept else "no softmax key"
        shapes.append(text(x + side / 2, 176, words, 12, "middle", MUTED))
    shapes += [box(16, 196, 12, 12, SOFTMAX), text(34, 207, "softmax: every query with each of these keys", 12)]
    shapes += [box(16, 216, 12, 12, LINEAR), text(34, 227, "linear: these keys are summed once, for all queries", 12)]
    return svg(480, 240, f"The keys of a query, of {order.num_tokens:,} tokens", shapes)


def wan(frames: int) -> Workload:
    """Wan2.1 1.3B at 480x832."""
    return Workload(PUBLISHED["Wan2.1 1.3B"], num_tokens(frames, HEIGHT, WIDTH))


def cost_of_a_block() -> str:
    """FLOPs of one block of Wan2.1 1.3B at 81 frames, by part and rate."""
    shapes = [text(16, 22, "one block of Wan2.1 1.3B at 480x832, 81 frames, TFLOP")]
    scale = 340 / block_flops(wan(81), 1).total
    for number, rate in enumerate(RATES):
        cost, x, y = block_flops(wan(81), rate), 70.0, 36 + 30 * number
        shapes.append(text(62, y + 16, rate_name(rate), 13, "end"))
        for part, colour in PARTS.items():
            width = getattr(cost, part) * scale
            shapes.append(box(x, y, width, 22, colour))
            x += width
        shapes.append(text(x + 6, y + 16, f"{cost.total / 1e12:.1f}", 13))
    x = 70
    for part, colour in PARTS.items():
        shapes += [box(x, 194, 12, 12, colour), text(x + 17, 205, PART_NAMES[part], 12)]
        x += 34 + 7 * len(PART_NAMES[part])
    return svg(480, 220, "FLOPs of a block by rate", shapes)


def cost_by_length() -> str:
    """FLOPs of a block's attention, without projections, over the length of the video."""
    frames = range(1, 162, 4)
    shapes = [text(16, 22, "attention of one block of Wan2.1 1.3B at 480x832, TFLOP")]
    left, bottom, width, height = 44, 226, 340, 190
    top = core_flops(wan(frames[-1]), 1) / 1e12
    place = lambda n, flops: f"{left + width * (n - 1) / 160:.4g} {bottom - height * flops / 1e12 / top:.4g}"
    for value in range(0, int(top) + 1, 5):
        y = bottom - height * value / top
        shapes.append(f'<path d="M{left} {y:.4g}h{width}" stroke="{LINE}"/>')
        shapes.append(text(left - 6, y + 4, value, 12, "end", MUTED))
    for n in (1, 41, 81, 121, 161):
        shapes.append(text(left + width * (n - 1) / 160, bottom + 18, n, 12, "middle", MUTED))
    shapes.append(text(left + width / 2, bottom + 36, "frames", 12, "middle", MUTED))
    last = [core_flops(wan(frames[-1]), rate) / 1e12 for rate in RATES]
    heights = spread([bottom - height * value / top for value in last], 15)
    for rate, colour, y in zip(RATES, ("#1b1d22", *ZONES[:2], "#10805b", "#c2510c"), heights, strict=True):
        points = "L".join(place(n, core_flops(wan(n), rate)) for n in frames)
        shapes.append(f'<path d="M{points}" stroke="{colour}" stroke-width="2" fill="none"/>')
        shapes.append(text(left + width + 6, y + 4, rate_name(rate), 12, colour=colour))
    return svg(480, 272, "FLOPs of attention by the length of the video", shapes)


def spread(heights: Sequence[float], least: float) -> list[float]:
    """Moves labels, from the lowest on the page, upwards until they are `least` apart."""
    placed: list[float] = []
    for y in reversed(heights):
        placed.append(min(y, placed[-1] - least) if placed else y)
    return placed[::-1]


def results(name: str, after: str = "") -> list[dict[str, str]]:
    """The rows of the table `name` in docs/results.md, or of that which follows the words `after` there.

    Each is {column: cell}; "" is the first column.
    """
    part = (HERE / "results.md").read_text().split(f"<!-- begin {name} -->")[1].split(f"<!-- end {name} -->")[0]
    lines = part[part.index(after) :].splitlines()
    table = itertools.takewhile(lambda line: "|" in line, itertools.dropwhile(lambda line: "|" not in line, lines))
    (_, *columns), _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table)
    return [dict(zip(("", *columns), row, strict=True)) for row in rows]


def measured_errors() -> np.ndarray:
    """[blocks, 4]: relative velocity errors with one block converted, from the table of docs/results.md, "errors"."""
    columns = [f"{rate_name(rate)}, velocity" for rate in RATES[1:]]
    rows = [row for row in results("errors") if row[""].startswith("block")]
    return np.array([[float(row[column].split()[0]) for column in columns] for row in rows])


def plans() -> Iterator[tuple[str, list[int]]]:
    """(budget, index of the rate of each block) of the tiny model's best plans, by squared errors."""
    config = load_config("tiny")
    work = workload(config, read_config(model_path("tiny_wan") / "transformer"))
    errors = measured_errors()
    errors = np.concatenate([np.zeros((len(errors), 1)), errors**2], axis=1)
    costs = np.array([[float(core_flops(work, rate)) for rate in RATES]] * len(errors))
    teacher = costs[:, 0].sum()
    for share in (0.9, 0.75, 0.6):
        yield f"{100 * share:.0f} %", solve_block_rates(errors, costs, share * teacher).tolist()


def plan() -> str:
    """The tiny model's velocity error by block and rate, and the plans that the knapsack chooses from it."""
    errors = measured_errors()
    shapes = [text(16, 22, "velocity error, one block converted"), text(282, 22, "plan at a budget of")]
    for column, rate in enumerate(RATES[1:]):
        shapes.append(text(90 + 48 * column, 46, rate_name(rate), 12, "middle", MUTED))
    for block, row in enumerate(errors):
        y = 56 + 28 * block
        shapes.append(text(58, y + 18, f"block {block}", 12, "end", MUTED))
        for column, error in enumerate(row):
            share = error / errors.max()
            colour = f"#{''.join(f'{round(255 + share * (channel - 255)):02x}' for channel in (0xC2, 0x51, 0x0C))}"
            shapes.append(box(67 + 48 * column, y, 46, 26, colour))
            shapes.append(text(90 + 48 * column, y + 18, f"{error:.3f}", 12, "middle"))
    for column, (budget, chosen) in enumerate(plans()):
        x = 282 + 64 * column
        shapes.append(text(x + 30, 46, budget, 12, "middle", MUTED))
        for block, index in enumerate(chosen):
            y, colour = 56 + 28 * block, ("#e9eaec", ZONES[2], ZONES[1], ZONES[0], LINEAR)[index]
            shapes.append(box(x, y, 60, 26, colour))
            name = rate_name(RATES[index])
            shapes.append(text(x + 30, y + 18, name, 12, "middle", "#ffffff" if index == 3 else INK))
    return svg(480, 238, "Errors of the tiny model by block and rate, and plans chosen from them", shapes)


def families() -> str:
    """The velocity error of every family's plans over their cost, in FLOPs and in time, from docs/results.md."""
    ticks, x_ticks, height, bottom, least = (0.03, 0.1, 0.3, 1, 3, 10, 30), (50, 60, 70, 80, 90), 210, 246, 0.02
    shapes = [text(16, 22, "velocity error, squared, %; right after distillation, mean of three seeds")]
    panels = (("attention FLOPs", ""), ("attention time", "Budgets of measured"))
    for number, (cost, after) in enumerate(panels):
        left, width = 46 + 352 * number, 310
        across = lambda share, left=left, width=width: left + width * (share - 50) / 45
        down = lambda error: bottom - height * math.log(error / least) / math.log(ticks[-1] / least)
        for tick in ticks:
            shapes.append(f'<path d="M{left} {down(tick):.4g}h{width}" stroke="{LINE}"/>')
            shapes.append(text(left - 6, down(tick) + 4, f"{tick:g}", 12, "end", MUTED))
        shapes += [text(across(tick), bottom + 18, tick, 12, "middle", MUTED) for tick in x_ticks]
        shapes.append(text(left + width / 2, bottom + 36, f"{cost}, % of the teacher’s", 12, "middle", MUTED))
        rows = [row for row in results("families", after) if not row["plan"].startswith("not reached")]
        for family, colour in FAMILIES.items():
            found = [row for row in rows if row[""].endswith(f": {family}")]
            shares = [100 * float(row[f"{cost}, of the teacher's"].split()[0]) for row in found]
            errors = [float(row["velocity error, squared, %"].split()[0]) for row in found]
            points = [(across(share), down(error)) for share, error in sorted(zip(shares, errors, strict=True))]
            line = "L".join(f"{x:.4g} {y:.4g}" for x, y in points)
            shapes.append(f'<path d="M{line}" stroke="{colour}" stroke-width="2" fill="none"/>')
            shapes += [f'<circle cx="{x:.4g}" cy="{y:.4g}" r="3" fill="{colour}"/>' for x, y in points]
    x = 46.0
    for family, colour in FAMILIES.items():
        shapes += [box(x, 302, 12, 12, colour), text(x + 17, 313, family, 12)]
        x += 40 + 7 * len(family)
    return svg(720, 330, "Errors of families of attention by what their plans cost", shapes)


PICTURES = {
    "tokens": tokens,
    "attention": attention,
    "cost_of_a_block": cost_of_a_block,
    "cost_by_length": cost_by_length,
    "plan": plan,
    "families": families,
}


if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (HERE / "pictures" / f"{name}.svg").write_text(draw())
        print(HERE / "pictures" / f"{name}.svg")
