"""operate: the teacher's weights and the distilled feature maps become one hybrid model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from flax import nnx

from jsurgery.attention.feature_maps import FeatureMapPair, FeatureMapParams
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.errors import InputError
from jsurgery.wan import checkpoint_layouts
from jsurgery.wan.abstract_module import abstract_module
from jsurgery.wan.checkpoint import open_transformer, save_transformer, write_transformer
from jsurgery.wan.lora_file import LoraSource
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.transformer import WanTransformer


def operate(transformer: WanTransformer, plan: HybridConfig, feature_maps: FeatureMapPair | None) -> WanTransformer:
    """A new transformer whose blocks have the plan's rates. It shares all other parameters with `transformer`.

    `feature_maps` are the maps of the converted blocks (`saved_maps.load_maps`), leaves [converted, heads, ...].
    Raises InputError if the plan has another number of blocks, or the maps another number of converted blocks.
    """
    check_plan(transformer.config, plan, feature_maps)
    config = dataclasses.replace(transformer.config, hybrid=plan)
    operated = abstract_module(WanTransformer, config, dtype=transformer.dtype, remat=transformer.remat)
    nnx.update(operated, nnx.state(transformer))
    if feature_maps is not None and plan.linear_branch:
        operated.query_maps, operated.key_maps = (FeatureMapParams(maps) for maps in feature_maps)
    return operated


def check_plan(transformer: WanConfig, plan: HybridConfig, feature_maps: FeatureMapPair | None) -> None:
    """Raises InputError unless the plan has a rate for every block, and there are maps for all converted blocks."""
    if len(plan.rates) != transformer.num_layers:
        raise InputError(f"plan: has {len(plan.rates)} rates, the transformer {transformer.num_layers} blocks")
    found = 0 if feature_maps is None else feature_maps[0].log_scale.shape[0]
    if plan.linear_branch and found != len(plan.converted):
        raise InputError(f"feature_maps: the plan converts {len(plan.converted)} blocks, found maps for {found}")


def save_operated(
    teacher: epath.Path,
    plan: HybridConfig,
    feature_maps: FeatureMapPair | None,
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
    check_plan(config, plan, feature_maps)
    operated = abstract_module(WanTransformer, dataclasses.replace(config, hybrid=plan))
    if feature_maps is not None and plan.linear_branch:
        operated.query_maps, operated.key_maps = (FeatureMapParams(maps) for maps in feature_maps)
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
