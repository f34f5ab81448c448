"""Drawings of what surgery does to attention: the tokens that keep it, and which keys a query looks at."""

from typing import Any

from markupsafe import Markup
from ml_collections import ConfigDict

from jsurgery.attention.hybrid import token_order
from jsurgery.attention.kinds.base import AttentionSize, Kind
from jsurgery.attention.kinds.registry import kind_of, rate_key
from jsurgery.rates import Rate, rate_chain
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.video_size import latent_grid

ROWS, COLUMNS = 12, 14  # of tokens, that are drawn of a frame
SIDE = 120  # of a drawing, in its own units; the page scales it


def attention_diagram(config: ConfigDict, model: WanConfig, rates: list[Rate]) -> dict[str, Any] | None:
    """Drawings (SVG) and their numbers, for the kind that most of a plan's rebuilt blocks have.

    `frame` is None for a kind that keeps no tokens but frames. None if the plan rebuilds no block, or if the kind does
    not tell which keys a query looks at.
    """
    rebuilt = [rate for rate in rates if rate != 1]
    if not rebuilt:
        return None
    rate = max(sorted(set(rebuilt), key=rate_key), key=rebuilt.count)
    video = config.video
    frames, rows, columns = model.token_grid(latent_grid(video.frames, video.height, video.width))
    if not kind_of(rate).needs_prefix:
        return by_frames(kind_of(rate), frames, rows * columns)
    order = token_order((frames, rows, columns), rate_chain((rate,)), config.hybrid.lattice)
    kept = order.num_softmax(rate)
    softmax_tokens = set(order.permutation[:kept].tolist())
    shown = [
        [row * columns + column in softmax_tokens for column in range(min(columns, COLUMNS))]
        for row in range(min(rows, ROWS))
    ]
    return {
        "rate": rate,
        "tokens": order.num_tokens,
        "kept": kept,
        "frame": grid(shown),
        "teacher": square(1.0),
        "hybrid": square(kept / order.num_tokens),
    }


def by_frames(kind: Kind, frames: int, tokens_per_frame: int) -> dict[str, Any] | None:
    """The drawings of a kind that tells which keys each run of queries looks at; None if it does not."""
    areas, tokens = kind.areas(frames, tokens_per_frame), frames * tokens_per_frame
    if areas is None:
        return None
    scale, shapes = SIDE / tokens, []
    for queries, keys, keeps in areas:
        sides = scale * (keys[1] - keys[0]), scale * (queries[1] - queries[0])
        shapes.append(box(scale * keys[0], scale * queries[0], *sides, "kept" if keeps else "summed"))
    counts = kind.counts(AttentionSize(tokens, frames, 1, 1, None))
    return {
        "rate": kind.rate,
        "tokens": tokens,
        "kept": counts.softmax_pairs // tokens,
        "frame": None,
        "description": kind.description,
        "teacher": square(1.0),
        "hybrid": drawing(shapes),
    }


def grid(kept_HxW: list[list[bool]]) -> Markup:
    """A frame's tokens as squares: those that keep softmax, and the others."""
    step = SIDE / max(len(kept_HxW), len(kept_HxW[0]))
    left, top = ((SIDE - step * count) / 2 for count in (len(kept_HxW[0]), len(kept_HxW)))
    cells = [
        box(left + column * step, top + row * step, 0.88 * step, 0.88 * step, "kept" if kept else "summed")
        for row, line in enumerate(kept_HxW)
        for column, kept in enumerate(line)
    ]
    return drawing(cells)


def square(share: float) -> Markup:
    """All queries (down) and all keys (across), of which this share is kept; the others go through one sum."""
    width = share * SIDE
    shapes = [box(0, 0, width, SIDE, "kept")]
    if share < 1:
        shapes.append(box(width, 0, SIDE - width, SIDE, "summed"))
        shapes.append(f'<text x="{(width + SIDE) / 2:.4g}" y="{SIDE / 2 + 12}" text-anchor="middle">Σ</text>')
    return drawing(shapes)


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.4g}" y="{y:.4g}" width="{width:.4g}" height="{height:.4g}"/>'


def drawing(shapes: list[str]) -> Markup:
    return Markup(f'<svg viewBox="0 0 {SIDE} {SIDE}" aria-hidden="true">{"".join(shapes)}</svg>')
