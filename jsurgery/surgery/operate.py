"""operate: the teacher's weights and the distilled feature maps become one hybrid model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from flax import nnx

from jsurgery.attention.feature_maps import FeatureMapParams, LearnedMaps, ProjectionParams
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.errors import InputError
from jsurgery.wan import checkpoint_layouts
from jsurgery.wan.abstract_module import abstract_module
from jsurgery.wan.checkpoint import open_transformer, save_transformer, write_transformer
from jsurgery.wan.lora_file import LoraSource
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.transformer import WanTransformer


def operate(transformer: WanTransformer, plan: HybridConfig, maps: LearnedMaps | None) -> WanTransformer:
    """A new transformer whose blocks have the plan's rates. It shares all other parameters with `transformer`.

    `maps` are those of the converted blocks (`saved_maps.load_maps`). Raises InputError if the plan has another number
    of blocks, or the maps another number of converted blocks.
    """
    check_plan(transformer.config, plan, maps)
    config = dataclasses.replace(transformer.config, hybrid=plan)
    operated = abstract_module(WanTransformer, config, dtype=transformer.dtype, remat=transformer.remat)
    nnx.update(operated, nnx.state(transformer))
    put_maps(operated, plan, maps)
    return operated


def put_maps(operated: WanTransformer, plan: HybridConfig, maps: LearnedMaps | None) -> None:
    """Gives a model of this plan its maps."""
    if maps is None or not plan.linear_branch:
        return
    if maps.pair is not None:
        operated.query_maps, operated.key_maps = map(FeatureMapParams, maps.pair)
    if maps.projection is not None:
        operated.projections = ProjectionParams(maps.projection)


def check_plan(transformer: WanConfig, plan: HybridConfig, maps: LearnedMaps | None) -> None:
    """Raises InputError unless the plan has a rate for every block, and there are maps for all converted blocks."""
    if len(plan.rates) != transformer.num_layers:
        raise InputError(f"plan: has {len(plan.rates)} rates, the transformer {transformer.num_layers} blocks")
    mapped = maps.query.log_scale.shape[0] if maps and maps.query else 0
    projected = maps.projection.bias.shape[0] if maps and maps.projection else 0
    if plan.linear_branch and (mapped, projected) != (len(plan.mapped), len(plan.projected)):
        found = mapped + projected
        raise InputError(f"feature_maps: the plan converts {len(plan.converted)} blocks, found maps for {found}")


def save_operated(
    teacher: epath.Path,
    plan: HybridConfig,
    maps: LearnedMaps | None,
    folder: epath.Path,
    base_pipeline: str,
    notes: Mapping[str, Any] | None = None,
    loras: Sequence[LoraSource] = (),
) -> None:
    """Writes the folder of `save_model(operate(...))`, with the weights copied from the teacher's folder or file.

    One tensor at a time is in memory, and none on a device. The weights keep the type that they have in the file.
    `loras` are merged into them.
    """
    config, copied = open_transformer(teacher, loras=loras)
    check_plan(config, plan, maps)
    operated = abstract_module(WanTransformer, dataclasses.replace(config, hybrid=plan))
    put_maps(operated, plan, maps)
    ours = checkpoint_layouts.lazy_transformer_tensors(operated)
    without_maps = abstract_module(WanTransformer, dataclasses.replace(config, hybrid=None))
    ours |= {name: copied[name] for name in checkpoint_layouts.lazy_transformer_tensors(without_maps)}
    write_transformer(
        ours, operated.config, folder, "diffusers", more={"base_pipeline": base_pipeline, **(notes or {})}
    )


def copy_model(
    source: epath.Path,
    folder: epath.Path,
    base_pipeline: str,
    notes: Mapping[str, Any] | None = None,
    loras: Sequence[LoraSource] = (),
) -> None:
    """Writes the folder of `save_model` for the transformer in another folder or file, tensor by tensor.

    Without `loras` the tensors are unchanged.
    """
    config, tensors = open_transformer(source, loras=loras)
    write_transformer(tensors, config, folder, "diffusers", more={"base_pipeline": base_pipeline, **(notes or {})})


def save_model(
    transformer: WanTransformer, folder: epath.Path, base_pipeline: str, notes: Mapping[str, Any] | None = None
) -> None:
    """Writes a transformer folder whose config also names the pipeline of its VAE and text encoder, and has `notes`."""
    save_transformer(transformer, folder, more={"base_pipeline": base_pipeline, **(notes or {})})
