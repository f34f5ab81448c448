"""Which model of the table `models` a folder holds: told by configs where they decide, otherwise by `--kind`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from jsurgery.errors import InputError, did_you_mean
from jsurgery.io.files import read_object
from jsurgery.load_config import load_config
from jsurgery.runtime.progress import say
from jsurgery.wan.checkpoint import read_config
from jsurgery.wan.model_config import WanConfig
from jsurgery.wan.model_folder import model_path, pipeline_folder, transformer_folder
from jsurgery.wan.model_sizes import CONFIGS, network_of
from jsurgery.wan.models import BY_KIND, MODELS, READ, Model
from jsurgery.wan.pipeline_parts import INDEX
from jsurgery.wan.schedulers import FILE, scheduler_settings

KEPT_SAMPLER = "sampler"  # the field of an operated model's config.json
SAMPLER_FIELDS = ("solver", "steps", "timesteps", "shift", "guidance", "negative_prompt")


@dataclasses.dataclass(frozen=True)
class ToldModel:
    """A row of the table, and what told it: "--kind", "its scheduler", "its pipeline" or "its sizes"."""

    model: Model
    by: str
    remark: str = ""  # what could not be told, for a line


def tell_model(path: str, kind: str = "") -> ToldModel:
    """The model at `config.model.path`. With `kind` it is that one, if the transformer has its sizes.

    A model of other sizes is a row of its own, with the config for its width. Reads configs alone. Raises InputError
    for an unknown kind, one that jsurgery does not read, and one of other sizes.
    """
    folder = model_path(path)
    base, network = pipeline_folder(folder), read_config(transformer_folder(folder))
    if not kind and (kept := kept_sampler(transformer_folder(folder))):
        named = Model(epath.Path(path).name, "", config=CONFIGS.get(network.dim, "tiny"), defaults=kept, few_steps=True)
        return ToldModel(named, "its config.json")
    if kind:
        return ToldModel(kind_that_fits(kind, network, path), "--kind")
    config = CONFIGS.get(network.dim, "tiny")
    class_name = lambda file: read_object(file).get("_class_name") if file.exists() else None
    scheduler, pipeline = class_name(base / FILE), class_name(base / INDEX)
    if found := next((model for model in READ if model.scheduler and model.scheduler == scheduler), None):
        return ToldModel(dataclasses.replace(found, config=config), "its scheduler")
    same = [model for model in READ if model.transformer is not None and has_sizes(network, model)]
    if pipeline and (found := next((model for model in same if model.few_steps and pipeline in model.pipelines), None)):
        return ToldModel(found, "its pipeline")
    plain = next((model for model in same if not model.few_steps), None)
    if plain is None:
        return ToldModel(Model(epath.Path(path).name, "", config=config), "its sizes")
    return ToldModel(plain, "its sizes", "" if (base / INDEX).exists() else unsaid(plain))


def kept_sampler(folder: epath.Path) -> dict[str, Any]:
    """The sampler that surgery of a few-step model left in config.json, as fields of a config; empty if there is none.

    Raises InputError for a field that a sampler does not have.
    """
    file = folder / "config.json"
    kept = read_object(file).get(KEPT_SAMPLER) if folder.is_dir() and file.exists() else None
    if not kept:
        return {}
    if not isinstance(kept, dict) or (unknown := kept.keys() - SAMPLER_FIELDS):
        found = sorted(unknown) if isinstance(kept, dict) else kept
        raise InputError(f"{file}: {KEPT_SAMPLER}: expected some of {', '.join(SAMPLER_FIELDS)}; found {found!r}")
    return {f"sampler.{name}": tuple(value) if isinstance(value, list) else value for name, value in kept.items()}


def own_sampler(config: ConfigDict) -> dict[str, Any]:
    """What the config.json of a model that surgery makes of a few-step teacher says of sampling."""
    return {KEPT_SAMPLER: {name: config.sampler[name] for name in SAMPLER_FIELDS}}


def sampler_of(model: Model) -> dict[str, Any]:
    """The same of a few-step model's makers, for the config.json of its transformer; empty for any other model."""
    named = {field.removeprefix("sampler."): value for field, value in model.defaults.items()}
    kept = {name: value for name, value in named.items() if name in SAMPLER_FIELDS}
    return {KEPT_SAMPLER: kept} if model.few_steps else {}


def with_own_sampler(name: str, overrides: Mapping[str, str]) -> ConfigDict:
    """The config `name` for the surgery of `config.model.path`, whose own sampler comes before the config's if it takes
    few steps: it is traced, fine-tuned and evaluated at its own timesteps, without guidance.

    Its velocities are no longer those of data, so fine-tuning follows the teacher's unless the user says otherwise.
    """
    of_model = {field: text for field, text in overrides.items() if field.startswith("model.")}
    model = load_config(name, of_model).model
    try:
        told = tell_model(model.path, model.kind) if model.path else None
    except InputError:
        if model.kind:
            raise
        told = None  # the run's own checks say what is wrong with the model
    if told is None or not told.model.few_steps:
        return load_config(name, dict(overrides))
    say_model(model.path, told)
    settings, _ = makers_settings(told.model, pipeline_folder(model_path(model.path)), overrides)
    settings.pop("video.fps", None)
    steps = overrides.get("sampler.steps", settings["sampler.steps"])
    settings |= {"trace.keep_steps": steps, "trace.solver": settings["sampler.solver"], "finetune.teacher_weight": "1"}
    return load_config(name, settings | dict(overrides))


def default_settings(model: Model, overrides: Mapping[str, str]) -> dict[str, str]:
    """The settings of a model's makers as overrides of a config, beneath those that the user gives.

    A number of steps that the user gives takes the place of the model's own timesteps.
    """
    settings = {field: str(value) for field, value in model.defaults.items()}
    if "sampler.steps" in overrides:
        settings.pop("sampler.timesteps", None)
    return settings


def makers_settings(model: Model, base: epath.Path, overrides: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The settings to sample a model with, and what of the folder's scheduler they do not follow.

    The solver and the shift are those of the scheduler in the pipeline's folder `base`, unless the model has few steps
    and that scheduler is not its own.
    """
    settings, remarks = scheduler_settings(base)
    defaults = default_settings(model, overrides)
    same = bool(model.scheduler) and settings.get("sampler.solver") == model.defaults["sampler.solver"]
    if model.few_steps and not same:
        return settings | defaults, []
    return defaults | settings, remarks


def say_model(path: str, told: ToldModel) -> None:
    """Says which model a folder is taken for, unless its sizes alone tell that."""
    if told.model.defaults and (told.remark or told.by != "its sizes"):
        own = ", with its own sampler" if told.model.few_steps else ""
        say(f"{path}: {told.model.name} by {told.by}{own}{'; ' if told.remark else ''}{told.remark}")


def kind_that_fits(kind: str, network: WanConfig, source: str) -> Model:
    """The row of `kind`. Raises InputError for one that jsurgery does not read, or whose sizes the network lacks."""
    model = known_kind(kind)
    if model.transformer is None:
        return dataclasses.replace(model, config=CONFIGS.get(network.dim, "tiny"))
    if not has_sizes(network, model):
        expected = network_of(model).size_text
        raise InputError(f"--kind={kind}: {source}: expected {expected}, found {network.size_text}")
    return model


def known_kind(kind: str) -> Model:
    """The row of `kind`. Raises InputError for an unknown one, and for one that jsurgery does not read."""
    if kind not in BY_KIND:
        known = ", ".join(model.kind for model in READ)
        raise InputError(f"--kind={kind}: expected one of {known}{did_you_mean(kind, BY_KIND)}")
    model = BY_KIND[kind]
    if model.task:
        raise InputError(f"--kind={kind}: {model.name}: {model.task}; jsurgery reads text-to-video models alone")
    return model


def has_sizes(network: WanConfig, model: Model) -> bool:
    """Whether a transformer, operated or not, has the sizes of a row."""
    return dataclasses.replace(network, hybrid=None) == network_of(model)


def unsaid(model: Model) -> str:
    """What the sizes of a transformer alone leave open."""
    like = lambda row: row.transformer is not None and network_of(row) == network_of(model)
    others = [row.name for row in MODELS if row.kind != model.kind and like(row)]
    return f"{', '.join(others)} have the same tensors, which --kind tells apart" if others else ""
