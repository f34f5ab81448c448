"""The model card of a model folder, a README.md for the Hugging Face Hub.

`model_card` joins its sections; each section is a generator of paragraphs, which yields none if it has nothing to say.
"""

import json
from collections.abc import Iterable
from typing import Any

from etils import epath

from jsurgery.attention.feature_maps import HEDGEHOG
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.attention.kinds.registry import kind_of, rate_key
from jsurgery.evaluate.statistics import bootstrap_interval
from jsurgery.io.results import format_ranges, markdown_table
from jsurgery.rates import Rate
from jsurgery.report.run_files import read_json
from jsurgery.report.scores import scaled
from jsurgery.wan import hub
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.model_folder import BUNDLED

CARD = "README.md"

STAGES = {  # name of a model in evaluation.json -> what the card calls it
    "teacher": "original",
    "not_distilled": "operated, feature maps not trained",
    "distilled": "operated, feature maps distilled",
    "finetuned": "fine-tuned",
}


def model_card(folder: epath.Path, network: WanConfig, repo: str) -> str:
    """The card's text: a YAML header, a description, the plan, measurements, and how to load the model."""
    from huggingface_hub import ModelCardData

    base = (read_json(folder / "config.json") or {}).get("base_pipeline")
    base_repository = hub.repository(base) if base and base not in BUNDLED else None
    header = ModelCardData(
        library_name="jsurgery",
        license="apache-2.0",  # the license of Wan2.1 and of the bundled models
        base_model=base_repository[0] if base_repository else None,
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
    """The blocks of each rate, and the cost according to plan.json in the workdir, if that is this model's plan."""
    hybrid = network.hybrid
    if hybrid is None:
        return
    blocks: dict[Rate, list[int]] = {}
    for block, rate in enumerate(hybrid.rates):
        blocks.setdefault(rate, []).append(block)
    rows = [
        (
            str(rate),
            format_ranges(blocks[rate], dash="–", separator=", "),
            kind_of(rate).family,
        )
        for rate in sorted(blocks, key=rate_key)
    ]
    yield "## Plan"
    yield markdown_table(("rate", "blocks", "self-attention"), rows)
    for name, description in other_kinds(hybrid.rates).items():
        yield f"{name}: {description}."
    yield f"Token lattice: {hybrid.lattice}; stabiliser: {hybrid.stabilizer}; feature maps: {feature_maps(hybrid)}."
    plan = read_json(folder.parent / "plan" / "plan.json")
    if plan and tuple(plan["rates"]) == hybrid.rates:
        yield (
            f"Budget {plan['budget']} ({plan['selection']}): {100 * plan['share_of_teacher']:.1f} % of the original's "
            "FLOPs in attention cores, by the cost model."
        )


def other_kinds(rates: Iterable[Rate]) -> dict[str, str]:
    """{name: description} of the kinds among `rates` that are neither softmax nor R-hybrids nor linear."""
    kinds = (kind_of(rate) for rate in sorted(set(rates), key=rate_key))
    return {kind.name: kind.description for kind in kinds if kind.format_version > 1}


def feature_maps(hybrid: HybridConfig) -> str:
    """The feature maps of the linear branch in words."""
    phi = hybrid.feature_map
    if not hybrid.linear_branch:
        return "none"
    if phi.activation == HEDGEHOG:
        return "HedgeHog, the softmax of one layer and of its negative"
    return f"polynomials of degree {phi.degree} over {phi.layers} layers, {phi.activation}"


def _measured(folder: epath.Path) -> Iterable[str]:
    """The results of the workdir that holds the model folder: nothing if it has no evaluation of this model."""
    evaluation = read_json(folder.parent / "evaluation" / "evaluation.json")
    config = read_json(folder.parent / "config.json") or {}
    operated = "distilled" if config.get("finetune.distilled", True) else "not_distilled"
    subject = {"hybrid": operated, "model": "finetuned"}.get(folder.name)
    if not evaluation or subject not in evaluation["models"]:
        return
    rows = []
    for name, result in evaluation["models"].items():
        score = scaled(result.get("score", {}).get("total"))
        loss = result.get("validation_loss")
        cells = [
            _mean_with_interval(bootstrap_interval(result["latent_rmse"])),
            f"{loss:.4f}" if loss is not None else "–",
            _mean_with_interval(score) if score else "–",
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
        text += (
            " Prompts and score are those of sprites, a procedural set of moving shapes: not of natural video. A score "
            "of 1 is that of real clips, 0 that of real clips whose captions were dealt at random."
        )
    yield text


def _loading(folder: epath.Path, network: WanConfig, base: str | None, repo: str) -> Iterable[str]:
    complete = (folder / "vae").exists()  # a whole pipeline, not a transformer alone
    yield "## Use"
    if complete or base:
        yield f'    jsurgery sample --model={repo} --prompt="…" --output=out.mp4'
        yield f'```python\nimport jsurgery\n\npipeline = jsurgery.load_pipeline("{repo}")\n```'
    else:
        yield (
            "```python\nimport huggingface_hub\nimport jsurgery\n\n"
            f'transformer = jsurgery.load_transformer(huggingface_hub.snapshot_download("{repo}"))\n```'
        )
    if complete and not network.hybrid:
        yield "In diffusers:"
        yield f'```python\nfrom diffusers import WanPipeline\n\npipeline = WanPipeline.from_pretrained("{repo}")\n```'
    elif complete or base:
        part = "/transformer" if (folder / "transformer").exists() else ""
        source = f'"{repo if complete else base}"'
        imports = ["from diffusers import WanPipeline", "from huggingface_hub import snapshot_download", ""]
        imports += ["from jsurgery.export.torch_model import load"]
        if base in BUNDLED and not complete:
            imports += ["from jsurgery.wan.pipeline import model_path"]
            source = f"str(model_path({source}))"
        elif not complete and (repository := hub.repository(base or "")) and repository[1]:
            source = f'"{repository[0]}", revision="{repository[1]}"'
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


def _mean_with_interval(summary: dict[str, Any]) -> str:
    return f"{summary['mean']:.3f} ({summary['low']:.3f} to {summary['high']:.3f})"
