"""Renders pages from templates, and formats the numbers in them."""

import base64
import hashlib
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from jsurgery.attention.kinds.registry import rate_key, rate_name
from jsurgery.rates import Rate

HERE = pathlib.Path(__file__).parent
MINUS, NOTHING = "\N{MINUS SIGN}", "\N{EN DASH}"


def render(template: str, *, assets: str = "page", **values: Any) -> str:
    """Renders a page that contains the style and script named `assets`.

    Its content security policy allows this script alone, and no requests.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": number, "short": short, "signed": signed, "percent": percent, "rate": rate_name, "count": count,
    }  # fmt: skip
    script = (HERE / f"{assets}.js").read_text("utf-8")
    return environment.get_template(template).render(
        **values,
        player_data=player_data,
        style=Markup((HERE / "palette.css").read_text("utf-8") + (HERE / f"{assets}.css").read_text("utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def player_data(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `video_player.embed` without their videos, which the page holds in elements of their own."""
    return [{field: value for field, value in row.items() if field != "video"} for row in rows]


def depths(rates: Sequence[Rate]) -> dict[Rate, int]:
    """Strength of each rate's colour in percent: 0 for softmax, 100 for the rate with the fewest softmax tokens."""
    ordered = sorted({1, *rates}, key=rate_key)
    last = len(ordered) - 1
    return {rate: 100 if i and i == last else 55 * i // max(1, last - 1) for i, rate in enumerate(ordered)}


def number(value: float | None, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:.{digits}f}".replace("-", MINUS)


def short(value: float | None) -> str:
    """A number of any magnitude with two digits: 1.3e-05."""
    return NOTHING if value is None else f"{value:.1e}".replace("-", MINUS)


def signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value)


def percent(share: float) -> str:
    return f"{100 * share:.1f}%".replace("-", MINUS)


def count(value: int) -> str:
    """A large count in words: 1.42 billion, 2.9 million."""
    for name, scale in (("billion", 1e9), ("million", 1e6)):
        if value >= scale:
            return f"{value / scale:.3g} {name}"
    return f"{value:,}"
