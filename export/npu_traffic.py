"""Memory traffic of one block on the NPU as its compiler estimates it: the paper's Table 8, without a phone.

    python -m jsurgery.export.npu_traffic FOLDER CHIP SETTINGS_AS_JSON

The weights are random: traffic depends only on shapes.
"""

import dataclasses
import json
import math
import pathlib
import sys
import time
from typing import Any

import torch
from torch import nn

from jsurgery.attention.feature_maps import FeatureMapConfig
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.errors import InputError
from jsurgery.runtime.progress import clock, say
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.video_size import latent_grid

from . import onnx, qnn, torch_model
from .mobile_layout import TokenLayout
from .mobile_model import TILE, Attention, Block, mobile_rope
from .parts import Part

PART = Part("block", "every step", ("tokens", "text", "modulation"), ("made",))
VARIANTS = ("softmax", "softmax, tiled", "hybrid R8", "linear, HedgeHog", "linear", "no attention")


class MobileHedgehogMap(nn.Module):
    """HedgeHog's feature map softmax([W x, -W x]), the paper's linear baseline; [1, H, N, D] -> [1, H, N, 2 D]."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.eye(width).repeat(1, heads, 1, 1), requires_grad=False)

    def forward(self, x_1xHxNxD: torch.Tensor) -> list[torch.Tensor]:
        h = x_1xHxNxD @ self.kernel
        return [torch.cat([h, -h], dim=-1).softmax(dim=-1)]


class NoAttention(Attention):
    """The control: projections without attention between them."""

    def attend(self, group: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q + k + v


def block(config: WanConfig, variant: str, latent_shape: tuple[int, int, int], tile: int) -> Block:
    """A block of a variant with random weights, for latents of shape (T, H, W)."""
    torch.manual_seed(0)
    rate = {"softmax": 1, "softmax, tiled": 1, "no attention": 1, "hybrid R8": 8}.get(variant, "linear")
    hybrid = HybridConfig((rate,), feature_map=FeatureMapConfig())
    config = dataclasses.replace(config, num_layers=1, hybrid=hybrid)
    layout = TokenLayout.of(config, latent_shape)
    source = torch_model.Block(config, rate).requires_grad_(False)
    kind = NoAttention if variant == "no attention" else Attention
    tile_or_none = None if variant in ("softmax", "no attention") else tile
    attention = kind(source.attn1, mobile_rope(config, layout), layout.softmax[rate], layout.tokens, tile_or_none)
    if variant == "linear, HedgeHog":
        for group, heads in enumerate(attention.groups):
            sizes = heads.stop - heads.start, config.attention_head_dim
            attention.phi_q[group], attention.phi_k[group] = MobileHedgehogMap(*sizes), MobileHedgehogMap(*sizes)
    return Block(source, attention).eval()


def traffic(
    folder: pathlib.Path,
    config: WanConfig,
    variant: str,
    size: tuple[int, int, int],
    *,
    chip: str,
    text_length: int,
    tile: int,
) -> dict:
    """The row of a block, for a video of `size` = (frames, height, width): its DDR traffic in bytes, the size of its
    binary, the share of nodes on the NPU; or "failed", the compiler's reason."""
    frames, height, width = size
    latent_shape = latent_grid(frames, height, width, config.strides)
    tokens, began = math.prod(config.token_grid(latent_shape)), time.monotonic()
    row = {"variant": variant, "frames": frames, "height": height, "width": width, "tokens": tokens}
    row |= {"chip": chip, "tile": tile}
    model, binary = folder / "tmp.block.onnx", folder / "tmp.block.bin"
    shapes = (1, tokens, config.dim), (1, text_length, config.dim), (1, 6, config.dim)
    try:
        module = block(config, variant, latent_shape, tile)
        onnx.convert(module, tuple(torch.zeros(shape) for shape in shapes), PART, model)
        facts = qnn.compile_model(model, binary, chip)
        row |= {name: facts[name] for name in ("ddr", "nodes", "npu_share", "off_npu")}
        row["bytes"] = binary.stat().st_size
    except InputError as error:
        row["failed"] = str(error)
    finally:
        for file in folder.glob("*block.*"):
            file.unlink()
    return row | {"seconds": round(time.monotonic() - began, 1)}


def main(folder: pathlib.Path, chip: str, settings: dict) -> None:
    """Compiles every variant and number of frames of `settings` that `ddr.json` lacks, and prints the table.

    `settings` has the keys model, frames, height, width, text_length and tile.
    """
    file = folder / "ddr.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    sizes: dict[str, Any] = settings["model"] | {"patch_size": tuple(settings["model"]["patch_size"])}
    config = WanConfig(**sizes)
    tile = settings["tile"] or TILE
    setting = {"height": settings["height"], "width": settings["width"], "chip": chip, "tile": tile}
    for frames in settings["frames"]:
        for variant in VARIANTS:
            size = frames, settings["height"], settings["width"]
            key = {"variant": variant, "frames": frames} | setting
            if any(key.items() <= row.items() for row in rows):
                continue
            length = settings["text_length"]
            rows.append(traffic(folder, config, variant, size, chip=chip, text_length=length, tile=tile))
            file.write_text(json.dumps(rows, indent=2) + "\n")
            say(f"export: {variant}, {frames} frames: {clock(rows[-1]['seconds'])}")
    print(f"{chip}, MB written / read by one block at 16 bits: the compiler's estimate, not a measurement")
    for line in table([row for row in rows if setting.items() <= row.items()]):
        print(line)


def table(rows: list[dict]) -> list[str]:
    """Lines of text: for each number of tokens, MB written and read by every variant."""
    variants = [variant for variant in VARIANTS if any(row["variant"] == variant for row in rows)]
    lines = ["frames  tokens  " + "".join(f"{variant:>20}" for variant in variants)]
    for frames, tokens in sorted({(row["frames"], row["tokens"]) for row in rows}):
        cells = []
        for variant in variants:
            measured = [row for row in rows if (row["variant"], row["frames"]) == (variant, frames)]
            if not measured:
                cells.append("-")
            elif "failed" in measured[-1] or None in measured[-1]["ddr"].values():
                cells.append("not compiled")
            else:
                ddr = measured[-1]["ddr"]
                cells.append(f"{ddr['write_total'] / 1e6:.0f} / {ddr['read_total'] / 1e6:.0f}")
        lines.append(f"{frames:>6}{tokens:>8}  " + "".join(f"{cell:>20}" for cell in cells))
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['variant']}, {row['frames']} frames, not compiled: {row['failed']}")
    return lines


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
