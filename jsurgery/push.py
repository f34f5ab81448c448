"""push: a model folder to the Hugging Face Hub, with a model card that says what surgery did to it."""

import itertools
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from etils import epath

from jsurgery import __version__
from jsurgery.attention.hybrid import HEDGEHOG, HybridConfig, Rate
from jsurgery.errors import InputError
from jsurgery.report.quality import interval
from jsurgery.report.run_files import read_json
from jsurgery.runtime.progress import say
from jsurgery.runtime.stages import MARKER
from jsurgery.wan import hub
from jsurgery.wan.abstract_module import abstract_module
from jsurgery.wan.hashes import check_hashes
from jsurgery.wan.pipeline import BUNDLED, check_pipeline, transformer_folder
from jsurgery.wan.safetensors_files import open_tensors
from jsurgery.wan.transformer import CLASS_NAME, HYBRID_CLASS_NAME, WanConfig, WanTransformer, read_config
from jsurgery.wan.weights import check_fit, lazy_transformer_tensors

CARD = "README.md"
SUFFIXES = (".safetensors", ".json", ".model")
PICKLES = (".bin", ".pth", ".pt", ".pkl", ".pickle", ".ckpt")
STAGES = {
    "teacher": "original",
    "not_distilled": "operated, feature maps not trained",
    "distilled": "operated, feature maps distilled",
    "finetuned": "fine-tuned",
}


def push(model: str, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Uploads a model folder in one commit and returns the repository's address.

    `repo` is ORG/NAME, made if it is not there; `revision` a branch, made too. A README.md in the folder is the card,
    else one is written into the commit. Only safetensors, JSON and SentencePiece files go along; all that can be
    checked is checked before the network is asked for anything. Raises InputError where the folder is incomplete or
    holds pickles, and where the Hub refuses or is out of reach. The token is the one that huggingface_hub finds.
    """
    folder = epath.Path(model)
    network = check_folder(folder)
    files = upload_files(folder)

    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars, validate_repo_id

    with hub.refusals(f"--repo={repo}: refused", f"--repo={repo}: the Hub"):
        validate_repo_id(repo)
        if "/" not in repo:
            raise InputError(f"--repo={repo}: expected ORG/NAME")
        if huggingface_hub.get_token() is None:
            raise InputError("no token for the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN")
        additions = [huggingface_hub.CommitOperationAdd(name, file) for name, file in files.items()]
        if CARD not in files:
            additions.append(huggingface_hub.CommitOperationAdd(CARD, model_card(folder, network, repo).encode()))
        disable_progress_bars()
        client = huggingface_hub.HfApi(library_name="jsurgery", library_version=__version__)
        client.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            client.create_branch(repo, branch=revision, exist_ok=True)
        say(f"push: {len(additions)} files to {repo}")
        message = f"{'Hybrid transformer' if network.hybrid else 'Model'} by jsurgery {__version__}"
        client.create_commit(repo, additions, commit_message=message, revision=revision)
        return f"{client.endpoint}/{repo}" + (f"/tree/{revision}" if revision else "")


def check_folder(folder: epath.Path) -> WanConfig:
    """The transformer's config. Raises InputError for a folder that others could not load or should not."""
    if not pathlib.Path(folder).is_dir():
        raise InputError(f"--model={folder}: no such folder on this machine")
    if pickles := [path.name for path in every_file(folder) if path.suffix in PICKLES]:
        raise InputError(f"{folder}: holds pickles, which are not uploaded: {', '.join(pickles[:5])}; remove them")
    transformer = transformer_folder(folder)
    fields = read_json(transformer / "config.json") or {}
    if fields.get("_class_name") not in (CLASS_NAME, HYBRID_CLASS_NAME):
        raise InputError(f"{transformer}: not in diffusers' layout; `jsurgery convert` writes it")
    check_hashes(transformer)
    network = read_config(transformer)
    expected = lazy_transformer_tensors(abstract_module(WanTransformer, network))
    check_fit({name: tensor.shape for name, tensor in expected.items()}, open_tensors(transformer), transformer)
    if (folder / "vae").exists():
        check_pipeline(str(folder))
    elif (base := fields.get("base_pipeline")) and base not in BUNDLED and hub.repository(base) is None:
        raise InputError(
            f"{transformer / 'config.json'}: base_pipeline: expected a repository, where others find the VAE and the "
            f"text encoder, found {base}"
        )
    return network


def upload_files(folder: epath.Path) -> dict[str, pathlib.Path]:
    """What goes along, by its path in the repository."""
    return {
        str(path.relative_to(folder)): path
        for path in every_file(folder)
        if (path.suffix in SUFFIXES and path.name != MARKER) or path == pathlib.Path(folder, CARD)
    }


def every_file(folder: epath.Path) -> list[pathlib.Path]:
    """All files but hidden ones and those in hidden folders, such as the Hub's own cache of a download."""
    found = (path for path in pathlib.Path(folder).rglob("*") if path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


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
    yield table(("rate", "blocks", "self-attention"), rows)
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
            between(interval(result["latent_rmse"])),
            f"{loss:.4f}" if loss is not None else "–",
            between(score) if score else "–",
        ]
        stage = STAGES.get(name) or name
        rows.append((f"{stage} (this model)" if name == subject else stage, *cells))
    yield "## Measured"
    yield table(("stage", "latent distance to the original", "validation loss", "score"), rows)
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


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spans(numbers: list[int]) -> str:
    """([0, 1, 2, 5]) -> "0–2, 5"."""
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in ends)


def between(summary: dict[str, Any]) -> str:
    return f"{summary['mean']:.3f} ({summary['low']:.3f} to {summary['high']:.3f})"
