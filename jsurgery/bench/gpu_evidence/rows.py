"""The rows of the evidence, the most valuable first, at full or at toy sizes. Imports neither JAX nor torch."""

import dataclasses
import itertools
from typing import Any

from jsurgery.attention.kinds.registry import rate_name
from jsurgery.rates import Rate

PASSES = ("forward", "forward + backward")
KERNELS, ATTENTION, PARTS, FORWARD, DISTILLATION = (
    "kernels",
    "attention",
    "part of attention",
    "whole forward",
    "distillation step",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
      seconds: its allowance, compilation included. The row is not begun with less time left.
      tokens: N of an attention layer or kernel test.
      video: frames, height, width of a model's video.
      implementation: of attention: one of `pallas_kernels`, "cudnn", or "torch BACKEND".
      function: of `pallas_kernels`: "linear_state", "attend_with_state" or "softmax_zones". None: `hybrid_attention`. A
        kernel test of "attend_with_state" takes its state from "linear_state".
    """

    group: str
    name: str
    seconds: float
    tokens: int | None = None
    rate: Rate | None = None
    passes: str | None = None
    implementation: str | None = None
    function: str | None = None
    video: tuple[int, int, int] | None = None
    head_dim: int | None = None
    stabilizer: str = "lse"
    masked: bool = False

    def shown(self) -> dict[str, Any]:
        """The fields that identify the row, for the JSON file."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        fields.pop("seconds")
        if "passes" in fields:
            fields["pass"] = fields.pop("passes")
        return fields


@dataclasses.dataclass(frozen=True, eq=False)
class Scale:
    """Sizes of all rows: `FULL` or `TOY`.

    Attributes:
      tokens: of attention layers, the most valuable first.
      videos: frames, height and width, the most valuable first.
      model: a size of `jsurgery.bench.transformer`, of random weights.
      allowance: a row's seconds by group; of attention by pass, and "flex" for torch's flex attention, which compiles.
    """

    name: str
    tokens: tuple[int, ...]
    heads: int
    head_dim: int
    dtype: str
    model: str
    videos: tuple[tuple[int, int, int], ...]
    plans: tuple[str, ...]
    text_length: int
    runs: int
    allowance: dict[str, float]

    def shown(self) -> dict[str, Any]:
        """The fields that all rows share."""
        common = ("heads", "head_dim", "dtype", "model", "text_length", "runs")
        return {"sizes": self.name, "batch": 1} | {name: getattr(self, name) for name in common}


# Most of an allowance is compilation: XLA and Triton take seconds for a layer and less than a minute for a model.
FULL = Scale(
    name="full",
    tokens=(32_760, 12_600, 75_600),  # 81 frames of 480x832 and of 320x480; of 720x1280
    heads=12,
    head_dim=128,
    dtype="bfloat16",
    model="1.3b",
    videos=((81, 480, 832), (81, 320, 480)),
    plans=("15R2", "20R8", "30R8"),
    text_length=512,
    runs=5,
    allowance={KERNELS: 20, "forward": 8, "forward + backward": 15, "flex": 30, FORWARD: 40, DISTILLATION: 75},
)
TOY = Scale(
    name="toy",
    tokens=(48,),
    heads=2,
    head_dim=16,
    dtype="float32",
    model="tiny",
    videos=((5, 32, 48),),
    plans=("1R2", "1R8", "2R8"),
    text_length=8,
    runs=2,
    allowance={KERNELS: 10, "forward": 2, "forward + backward": 5, "flex": 5, FORWARD: 10, DISTILLATION: 15},
)


def all_rows(scale: Scale) -> list[Row]:
    """Two kernel tests, without which no speed counts; all rows of the first size; the other tests and the parts of
    attention; the other sizes.

    Flex attention is the last row of its size: torch compiles it for half a minute, and cuDNN is a faster baseline.
    """
    tests, video = kernel_tests(scale), scale.videos[0]
    rows = [*tests[:2], *attention(scale, scale.tokens[0]), *forwards(scale, video), distillation(scale, video)]
    rows += [*tests[2:], *parts(scale, scale.tokens[0]), *flex(scale, scale.tokens[0])]
    for tokens, video in itertools.zip_longest(scale.tokens[1:], scale.videos[1:]):
        rows += [*attention(scale, tokens), *([distillation(scale, video)] if video else []), *flex(scale, tokens)]
    return rows


def kernel_tests(scale: Scale) -> list[Row]:
    """Tests with odd numbers of tokens, so that last blocks are partial, and with heads of 64 and of 128 channels.

    The longer ones sum the linear state over several chunks. Those of `hybrid_attention` are left out at toy sizes:
    "attend_with_state" takes the same kernels.
    """
    full = scale.name == "full"
    wide, (short, long) = scale.head_dim, (1001, 5003) if full else (21, 37)
    problems: list[tuple[int, Rate, int, str, bool]] = [
        (short, 8, wide, "lse", False),
        (short, 8, wide, "max", True),
        (short, 1, wide, "lse", True),
        (short, "linear", wide, "max", False),
        (long, 2, wide, "lse", True),
        (long, 4, 64, "max", False),
    ]
    rows = [problem_row(scale, "gpu", *problem) for problem in problems if full]
    rows += [problem_row(scale, "gpu", long, 4, wide, "max", True, "attend_with_state")]
    rows += [problem_row(scale, "gpu", long, 1, wide, "lse", True, "softmax_zones")]
    return [*rows, problem_row(scale, "stock", short, 8, wide, "lse", False)]


def problem_row(
    scale: Scale,
    implementation: str,
    tokens: int,
    rate: Rate,
    head_dim: int,
    stabilizer: str,
    masked: bool,
    function: str | None = None,
) -> Row:
    what = implementation if function is None else f"{implementation} {function}"
    name = f"{what}, {rate_name(rate)}, {stabilizer}, {head_dim} channels" + (", masked" * masked)
    return Row(
        KERNELS,
        name,
        scale.allowance[KERNELS],
        tokens,
        rate,
        PASSES[0] if function == "softmax_zones" else PASSES[1],
        implementation,
        function,
        head_dim=head_dim,
        stabilizer=stabilizer,
        masked=masked,
    )


def attention(scale: Scale, tokens: int) -> list[Row]:
    """Forward rows, then forward + backward: every rate with the stock softmax and with our kernels, and full softmax
    by cuDNN and torch."""
    contenders: list[tuple[str, Rate, str]] = [("cuDNN softmax (JAX)", 1, "cudnn")]
    contenders += [(f"{rate_name(rate)}, stock softmax", rate, "stock") for rate in (2, 4, 8)]
    contenders += [("linear, XLA", "linear", "stock")]
    contenders += [(f"{rate_name(rate)}, our kernels", rate, "gpu") for rate in (1, 2, 4, 8, "linear")]
    contenders += [("torch flash", 1, "torch flash"), ("torch cuDNN", 1, "torch cudnn")]
    return [
        Row(ATTENTION, name, scale.allowance[passes], tokens, rate, passes, implementation)
        for passes in PASSES
        for name, rate, implementation in contenders
    ]


def parts(scale: Scale, tokens: int) -> list[Row]:
    """The functions of attention over a context axis and of distillation in one pass, by our kernels and by XLA."""
    functions: list[tuple[str, Rate, tuple[str, ...]]] = [
        ("softmax_zones", 1, PASSES[:1]),
        ("linear_state", "linear", PASSES),
        ("attend_with_state", 8, PASSES),
    ]
    return [
        Row(PARTS, f"{function}, {by}", scale.allowance[passes], tokens, rate, passes, implementation, function)
        for function, rate, both in functions
        for passes in both
        for implementation, by in (("gpu", "our kernels"), ("xla", "XLA"))
    ]


def flex(scale: Scale, tokens: int) -> list[Row]:
    return [Row(ATTENTION, "torch flex", scale.allowance["flex"], tokens, 1, passes, "torch flex") for passes in PASSES]


def forwards(scale: Scale, video: tuple[int, int, int]) -> list[Row]:
    return [Row(FORWARD, plan, scale.allowance[FORWARD], video=video) for plan in ("softmax", *scale.plans)]


def distillation(scale: Scale, video: tuple[int, int, int]) -> Row:
    return Row(DISTILLATION, "all blocks, all rates", scale.allowance[DISTILLATION], video=video)
