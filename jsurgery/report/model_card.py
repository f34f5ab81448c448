"""The model card of a folder, for the Hugging Face Hub."""

import itertools
import json
from collections.abc import Iterable
from typing import Any

from etils import epath

from jsurgery.attention.feature_maps import HEDGEHOG
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.evaluate.statistics import bootstrap_interval
from jsurgery.io.results import markdown_table
from jsurgery.rates import Rate
from jsurgery.report.run_files import read_json
from jsurgery.wan import hub
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.model_folder import BUNDLED

CARD = "README.md"

STAGES = {
    "teacher": "original",
    "not_distilled": "operated, feature maps not trained",
    "distilled": "operated, feature maps distilled",
    "finetuned": "fine-tuned",
}


def model_card(folder: epath.Path, network: WanConfig, repo: str) -> str:
    """README.md for the Hub: a YAML header, the plan, what was measured, and how to load the model."""
    from huggingface_hub import ModelCardData

    base = (read_json(folder / "config.json") or {}).get("base_pipeline")
    named = hub.repository(base) if base and base not in BUNDLED else None
    header = ModelCardData(
        library_name="jsurgery",
        license="apache-2.0",  # that of Wan2.1 and of what is bundled
        base_model=named[0] if named else None,
        pipeline_tag="text-to-video",
        tags=["jsurgery", "wan", "text-to-video", *(["hybrid-attention"] if network.hybrid else [])],
    )
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# {repo.split('/')[-1]}",
        *_description(network, base),
        *_plan(folder, network),
        *_measured(folder),
        *_loading(folder, network, base, repo),
    ]
    return "\n\n".join(parts) + "\n"


def _description(network: WanConfig, base: str | None) -> Iterable[str]:
    origin = f" of `{base}`" if base else ""
    size = f"{network.num_layers} blocks, {network.num_attention_heads} heads of {network.attention_head_dim} channels"
    if network.hybrid is None:
        yield f"The text-to-video transformer{origin}, with softmax self-attention in every block ({size})."
        return
    yield (
        f"The text-to-video transformer{origin} after attention surgery "
        "([arXiv 2509.24899](https://arxiv.org/abs/2509.24899)): "
        f"{len(network.hybrid.converted)} of its blocks have hybrid self-attention ({size}). At rate R every R-th "
        "token keeps softmax and the others go through a learned linear attention; a linear block has no softmax."
    )


def _plan(folder: epath.Path, network: WanConfig) -> Iterable[str]:
    """The blocks of each rate; the shares of plan.json where it is this model's."""
    hybrid = network.hybrid
    if hybrid is None:
        return
    blocks: dict[Rate, list[int]] = {}
    for block, rate in enumerate(hybrid.rates):
        blocks.setdefault(rate, []).append(block)
    rows = [
        (str(rate), spans(blocks[rate]), "softmax" if rate == 1 else "linear" if rate == "linear" else "hybrid")
        for rate in sorted(blocks, key=lambda rate: (rate == "linear", rate))
    ]
    yield "## Plan"
    yield markdown_table(("rate", "blocks", "self-attention"), rows)
    yield f"Token lattice: {hybrid.lattice}; stabiliser: {hybrid.stabilizer}; feature maps: {feature_maps(hybrid)}."
    plan = read_json(folder.parent / "plan" / "plan.json")
    if plan and tuple(plan["rates"]) == hybrid.rates:
        yield (
            f"Budget {plan['budget']} ({plan['selection']}): {100 * plan['share_of_teacher']:.1f} % of the original's "
            "FLOPs in attention cores, by the cost model."
        )


def feature_maps(hybrid: HybridConfig) -> str:
    phi = hybrid.feature_map
    if not hybrid.linear_branch:
        return "none"
    if phi.activation == HEDGEHOG:
        return "HedgeHog, the softmax of one layer and of its negative"
    return f"polynomials of degree {phi.degree} over {phi.layers} layers, {phi.activation}"


def _measured(folder: epath.Path) -> Iterable[str]:
    """The evaluation of the workdir in which the folder lies."""
    evaluation = read_json(folder.parent / "evaluation" / "evaluation.json")
    config = read_json(folder.parent / "config.json") or {}
    operated = "distilled" if config.get("finetune.distilled", True) else "not_distilled"
    subject = {"hybrid": operated, "model": "finetuned"}.get(folder.name)
    if not evaluation or subject not in evaluation["models"]:
        return
    rows = []
    for name, result in evaluation["models"].items():
        score = result.get("score", {}).get("total")
        loss = result.get("validation_loss")
        cells = [
            between(bootstrap_interval(result["latent_rmse"])),
            f"{loss:.4f}" if loss is not None else "–",
            between(score) if score else "–",
        ]
        stage = STAGES.get(name) or name
        rows.append((f"{stage} (this model)" if name == subject else stage, *cells))
    yield "## Measured"
    yield markdown_table(("stage", "latent distance to the original", "validation loss", "score"), rows)
    size = [str(config[f"video.{side}"]) for side in ("frames", "height", "width") if f"video.{side}" in config]
    sampled = f" of {size[0]} frames at {size[1]}x{size[2]}" if len(size) == 3 else ""
    text = (
        f"Means over {len(evaluation['prompts'])} prompts{sampled} with 95 % intervals; the same noise for every stage."
    )
    if config.get("prompts") == "sprites":
        text += " Prompts and score are those of sprites, a procedural set of moving shapes: not of natural video."
    yield text


def _loading(folder: epath.Path, network: WanConfig, base: str | None, repo: str) -> Iterable[str]:
    whole = (folder / "vae").exists()
    yield "## Use"
    if whole or base:
        yield f'    jsurgery sample --model={repo} --prompt="…" --output=out.mp4'
        yield f'```python\nimport jsurgery\n\npipeline = jsurgery.load_pipeline("{repo}")\n```'
    else:
        yield (
            "```python\nimport huggingface_hub\nimport jsurgery\n\n"
            f'transformer = jsurgery.load_transformer(huggingface_hub.snapshot_download("{repo}"))\n```'
        )
    if whole and not network.hybrid:
        yield "In diffusers:"
        yield f'```python\nfrom diffusers import WanPipeline\n\npipeline = WanPipeline.from_pretrained("{repo}")\n```'
    elif whole or base:
        part = "/transformer" if (folder / "transformer").exists() else ""
        source = f'"{repo if whole else base}"'
        imports = ["from diffusers import WanPipeline", "from huggingface_hub import snapshot_download", ""]
        imports += ["from jsurgery.export.torch_model import load"]
        if base in BUNDLED and not whole:
            imports += ["from jsurgery.wan.pipeline import model_path"]
            source = f"str(model_path({source}))"
        elif not whole and (named := hub.repository(base or "")) and named[1]:
            source = f'"{named[0]}", revision="{named[1]}"'
        yield "In torch, inside diffusers' pipeline:"
        yield "\n".join(
            [
                "```python",
                *imports,
                "",
                f'transformer = load(snapshot_download("{repo}"){part and f" + {json.dumps(part)}"})',
                f"base = WanPipeline.from_pretrained({source}, transformer=None)",
                'pipeline = WanPipeline(**base.components | {"transformer": transformer})',
                "```",
            ]
        )


def spans(numbers: list[int]) -> str:
    """([0, 1, 2, 5]) -> "0–2, 5"."""
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in ends)


def between(summary: dict[str, Any]) -> str:
    return f"{summary['mean']:.3f} ({summary['low']:.3f} to {summary['high']:.3f})"
