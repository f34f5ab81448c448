"""A run of the surgery in a workdir. It skips the stages that are already complete there."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jsurgery.attention.feature_maps import LearnedMaps
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.config import block_numbers, flatten
from jsurgery.data.latents import check_latents, encode_sprites
from jsurgery.data.prompts import load_prompts
from jsurgery.errors import InputError
from jsurgery.estimate.nearest_machine import placed_or_nearest
from jsurgery.evaluate.surgery_models import evaluate
from jsurgery.io.fields import describe_changes
from jsurgery.io.files import matching, write_json
from jsurgery.io.hashes import folder_fingerprint
from jsurgery.report.first_frame import write_first_frame
from jsurgery.report.page import write_report
from jsurgery.runtime import processes
from jsurgery.runtime.garbage import free_dropped_models
from jsurgery.runtime.mesh import (
    abstract_mesh,
    check_batch,
    check_heads,
    gather_to_first_process,
    is_given,
    make_mesh,
    mesh_sizes,
    single_device_mesh,
)
from jsurgery.runtime.progress import say
from jsurgery.runtime.stage_folder import StageFolder
from jsurgery.surgery.disk import check_disk, disk_of_stages, written_bytes
from jsurgery.surgery.distillation.distill import distill
from jsurgery.surgery.distillation.jobs import job_name, job_of_block, merge
from jsurgery.surgery.distillation.saved_maps import load_maps
from jsurgery.surgery.distillation.while_sampling import own_clips
from jsurgery.surgery.finetune import finetune
from jsurgery.surgery.operate import copy_model, operate, save_model, save_operated
from jsurgery.surgery.phases import COMPUTING, on_mesh
from jsurgery.surgery.plan import check_budget, plan, read_plan
from jsurgery.surgery.stages import BY_NAME, STAGES, job_folder, stage_folders
from jsurgery.surgery.trace import CLIPS, trace
from jsurgery.wan.checkpoint import load_transformer
from jsurgery.wan.lora import check_loras, describe_loras, loras_of, with_lora_hashes
from jsurgery.wan.lora_file import save_low_rank
from jsurgery.wan.low_rank import check_rank
from jsurgery.wan.model_folder import check_pipeline, model_path, pipeline_folder, transformer_folder
from jsurgery.wan.model_sizes import ModelSizes, find_sizes
from jsurgery.wan.pipeline import Pipeline, configured_pipeline
from jsurgery.wan.tell_model import own_sampler, tell_model
from jsurgery.wan.transformer import WanTransformer
from jsurgery.wan.video_size import check_size

LORA = "lora"  # the folder of the low-rank changes that fine-tuning with `lora_rank` trains
VALIDATION_SEED = 3  # scene sets: 0 trains the teacher; seed + VALIDATION_SEED is held out from everything


def start_run(config: ConfigDict, workdir: str) -> "Run":
    """Makes the run that all processes work on. Raises InputError in all of them if their configs or models differ."""
    run = processes.on_all(lambda: Run(config, workdir))
    first, *others = processes.gather_messages({"workdir": workdir, "model": run.identity, **dict(flatten(config))})
    for number, other in enumerate(others, 1):
        if other != first:
            changes = describe_changes(first, other)
            raise InputError(f"--process_id={number}: started with other settings than process 0: {changes}")
    return run


class Run:
    """The stages of a config in a workdir. The constructor makes all checks that need no long work.

    Attributes:
      stages: the StageFolder of every stage, by name.
      job: the StageFolder of the independent job that distils `config.distill.blocks`; None if that names no blocks.
      config: the config with the mesh of the current stage.
      coming: the commands that `run_commands` has not finished yet.
    """

    def __init__(self, config: ConfigDict, workdir: str):
        self.config = self.original_config = config
        self.workdir, self._config_of = epath.Path(workdir), dict[str, ConfigDict]()
        self.teacher_path = model_path(config.model.path)
        self.model_config = check_pipeline(config.model.path)
        self.loras = loras_of(config)
        check_loras(self.model_config, self.loras)
        self._check_config()
        self.coming: Sequence[str] = ()
        self.identity = with_lora_hashes(folder_fingerprint(self.teacher_path), self.loras)
        self.stages = stage_folders(config, self.workdir, self.identity)
        blocks = self._chosen_blocks()
        self.job = None if blocks is None else job_folder(config, job_name(blocks), self.stages)
        for stage in filter(None, (*self.stages.values(), self.job)):
            stage.done()  # refuses a workdir of another config before anything is written

    def _check_config(self) -> None:
        """Raises InputError for a config that the model, the devices or the data do not allow."""
        config = self.config
        check_size(self.model_config, config.video.frames, config.video.height, config.video.width)
        load_prompts(config, config.trace.prompts + config.evaluate.prompts)
        check_budget(config, self.model_config)
        check_rank(self.model_config, config.finetune.lora_rank)
        mesh = abstract_mesh(config.mesh)
        check_heads(mesh, self.model_config.num_attention_heads, config.mesh.exchange, config.hybrid.rates)
        if is_given(config.mesh):
            for batch in (config.distill.batch, config.finetune.batch // config.finetune.accumulate):
                check_batch(mesh, batch)
        if processes.several():
            for stage in COMPUTING:
                make_mesh(self.config_of(stage).mesh)
        if config.finetune.steps and not config.data.path and not own_clips(config):
            raise InputError(
                f"config.data.path: (empty): none of the trajectories ends within config.distill.steps = "
                f"{config.distill.steps}; expected more steps, or a folder of latents"
            )
        if config.finetune.steps and config.data.path not in ("", "sprites"):
            check_latents(epath.Path(config.data.path), pipeline_folder(self.teacher_path) / "vae")

    def _chosen_blocks(self) -> tuple[int, ...] | None:
        """The block numbers in `config.distill.blocks`; None: all blocks."""
        blocks = block_numbers(self.config.distill.blocks)
        if blocks is not None and blocks[-1] >= self.model_config.num_layers:
            model = f"the model has blocks 0 to {self.model_config.num_layers - 1}"
            raise InputError(f"config.distill.blocks: {model}, found {blocks[-1]}")
        return blocks

    def run_commands(self, commands: Sequence[str]) -> None:
        """Runs commands in order. After each, `report.html` shows the results so far and the remaining commands."""
        self.check_resources([stage.name for stage in STAGES if stage.command in commands])
        for number, command in enumerate(commands):
            self.coming = commands[number:]
            self.run_command(command)
            self.coming = commands[number + 1 :]
            self.show_progress()

    def check_resources(self, names: Sequence[str]) -> None:
        """Raises DoesNotFit or InputError, before any work, where memory or disk is too small for unfinished stages."""
        unfinished = [name for name in names if not processes.on_first(self.stages[name].done)]
        for name in unfinished:
            if name in COMPUTING:
                self.config_of(name)
        rows = [row for row in disk_of_stages(self.original_config, self.sizes) if row.stage in unfinished]
        there = sum(written_bytes(self.stages[row.stage].folder) for row in rows)
        processes.on_first(lambda: check_disk(rows, str(self.workdir), written=there))

    def run_command(self, command: str) -> None:
        """Runs the stages of one command. Raises InputError, with nothing written, if an earlier stage is missing."""
        stages = [stage for stage in STAGES if stage.command == command]
        names = [stage.name for stage in stages]
        reads = {name for stage in stages for name in stage.reads}
        if "distill" in reads:
            processes.on_first(self.merge_jobs)
        for earlier in (self.stages[name] for name in BY_NAME if name in reads and name not in names):
            if not processes.on_first(earlier.done):
                raise InputError(
                    f"{earlier.folder}: missing or incomplete; run that stage first, or `jsurgery surgery`"
                )
        job = self.job if command == "distill" else None
        for stage in stages:
            folder = job or self.stages[stage.name]
            if stage.name in COMPUTING and not processes.on_first(folder.done):
                make_mesh(self.config_of(stage.name).mesh)  # raises, before anything is written, for unsuitable devices
        processes.on_first(lambda: self.write_config(job))
        for name in names:
            self.run_stage(name)

    def run_stage(self, name: str) -> None:
        """Does the work of one stage, unless it is complete."""
        if name == "distill" and self.job is None and processes.on_first(self.merge_jobs):
            return  # independent jobs have distilled all blocks
        folder = self.job if name == "distill" and self.job else self.stages[name]
        work = {
            "trace": lambda: trace(self.config, self.shared_pipeline(), folder.folder, self.show_first_frame),
            "distill": lambda: self.distill_maps(folder.folder),
            "plan": lambda: plan(self.config, self.model_config, self.stages["distill"].folder, folder.folder),
            "hybrid": lambda: self.save_hybrid(folder.folder),
            "latents": self.encode_latents,
            "finetune": self.finetune_and_save,
            "evaluation": self.evaluate_all,
            "report": lambda: write_report(self.config, self.workdir),
        }
        if name in COMPUTING and not processes.on_first(folder.done):
            self.place(name)
        folder.run(work[name], all_processes=BY_NAME[name].all_processes)

    @functools.cached_property
    def sizes(self) -> ModelSizes:
        """The sizes of the teacher's three models."""
        return find_sizes(self.original_config, "")

    def config_of(self, stage: str) -> ConfigDict:
        """The config with the mesh of a stage; see `phases.on_mesh`."""
        if stage not in self._config_of:
            place = lambda: on_mesh(stage, self.original_config, self.sizes)
            self._config_of[stage] = placed_or_nearest(stage, self.original_config, self.sizes, place)
        return self._config_of[stage]

    def place(self, stage: str) -> None:
        """Moves the run to the mesh of a stage.

        What the stages before have loaded goes, unless this stage needs it on the same mesh.
        """
        config, loaded = self.config_of(stage), vars(self).get("pipeline")
        if loaded is not None:
            loaded.drop_vae()
        if mesh_sizes(config.mesh) != mesh_sizes(self.config.mesh):
            for name in ("pipeline", "teacher", "teacher_to_train"):
                vars(self).pop(name, None)
        elif stage == "finetune" and not config.finetune.teacher_weight and loaded is not None:
            vars(self).pop("teacher", None)
            loaded.drop_transformer()
        del loaded
        free_dropped_models()
        self.config = config

    @functools.cached_property
    def pipeline(self) -> Pipeline:
        """The teacher, loaded when a stage first needs it.

        It is on the mesh, or, with several processes, on the first device of this process.
        """
        return self.load_pipeline(single_device_mesh() if processes.several() else make_mesh(self.config.mesh))

    def shared_pipeline(self) -> Pipeline:
        """The teacher for a stage that all processes work on: each process loads its part of the weights."""
        if not processes.several():
            return self.pipeline
        for name in ("pipeline", "teacher"):  # frees the whole teacher, which a stage of process 0 may have loaded
            vars(self).pop(name, None)
        return self.load_pipeline(make_mesh(self.config.mesh))

    def load_pipeline(self, mesh: Mesh) -> Pipeline:
        return configured_pipeline(self.config, mesh)

    def put_on_mesh(self, model: WanTransformer) -> WanTransformer:
        """Puts a model on the run's mesh, and returns it. With several processes, all must call it.

        A single device is a mesh, too: programs compiled for parameters on a mesh cannot be reused for others.
        """
        model.shard(make_mesh(self.config.mesh), self.config.mesh.exchange)
        return model

    @functools.cached_property
    def teacher(self) -> WanTransformer:
        return self.pipeline.transformer

    @property
    def base(self) -> str:
        """The model from which a saved transformer takes its VAE and text encoder."""
        return self.config.model.path

    @property
    def notes(self) -> dict[str, Any]:
        """What the config of a saved transformer also says: the LoRAs in it, and the sampler of a few-step teacher."""
        notes: dict[str, Any] = {"loras": describe_loras(self.loras)} if self.loras else {}
        few_steps = tell_model(self.config.model.path, self.config.model.kind).model.few_steps
        return notes | (own_sampler(self.config) if few_steps else {})

    def show_first_frame(self, prompt: str, latents_1xTxHxWxC: jax.Array) -> None:
        """Writes the first frame that the teacher samples, so that the report shows an image early.

        Does nothing with several processes, since each holds a part of the frame, and in an ablation, which makes no
        report.
        """
        if processes.several() or not self.coming:
            return
        frame = self.pipeline.decode(latents_1xTxHxWxC[:, :1])[0, 0]
        say(f"trace: the teacher's first frame of this run: {write_first_frame(self.workdir, frame, prompt)}")
        self.show_progress()

    def show_progress(self) -> None:
        """Writes the report of an unfinished run, unless the next command is `report` itself."""
        if len(self.coming) > 1 and processes.is_first() and not self.stages["report"].done():
            write_report(self.config, self.workdir, coming=self.coming)

    def distill_maps(self, folder: epath.Path) -> None:
        teacher = self.shared_pipeline().transformer
        distill(self.config, teacher, self.stages["trace"].folder, folder, profile=self.workdir / "profile")

    def merge_jobs(self) -> bool:
        """Merges the results of independent jobs into the stage `distill`, and returns whether there are jobs.

        Raises InputError if no job has distilled some block.
        """
        whole, blocks = self.stages["distill"], self.model_config.num_layers
        jobs = [job_folder(self.config, path.name, self.stages) for path in matching(whole.folder, "blocks_*")]
        finished = [job.folder for job in jobs if job.done()]
        if jobs and not whole.done():
            job_of_block(finished, blocks)
            whole.begin()
            merge(self.config, finished, blocks, whole.folder)
            whole.end()
        return bool(jobs)

    def plan_and_maps(self, distilled: bool) -> tuple[HybridConfig, LearnedMaps | None]:
        """The plan, and the maps of its converted blocks: trained if `distilled`, otherwise only calibrated."""
        rates = read_plan(self.stages["plan"].folder)["rates"]
        hybrid = HybridConfig.of(self.config, rates)
        file = self.stages["distill"].folder / ("feature_maps.safetensors" if distilled else "initial.safetensors")
        return hybrid, load_maps(file, rates, hybrid.feature_map)

    def save_hybrid(self, folder: epath.Path) -> None:
        plan, maps = self.plan_and_maps(self.config.finetune.distilled)
        teacher = transformer_folder(self.teacher_path)
        save_operated(teacher, plan, maps, folder, self.base, self.notes, self.loras)

    @functools.cached_property
    def teacher_to_train(self) -> WanTransformer:
        """The teacher with parameters in float32, to be trained or operated and then trained."""
        dtype, mesh = jnp.dtype(self.config.model.dtype), make_mesh(self.config.mesh)
        teacher = load_transformer(transformer_folder(self.teacher_path), dtype, mesh, loras=self.loras)
        teacher.set_mesh(mesh, self.config.mesh.exchange)
        return teacher

    def encode_latents(self) -> None:
        """Encodes sprites for training and for validation. Users encode other data by `jsurgery encode`."""
        config, folder = self.config, self.stages["latents"].folder
        if config.data.path != "sprites":
            return
        encode = functools.partial(
            encode_sprites, self.pipeline.vae, video=config.video, two_sprites=config.data.two_sprites
        )
        encode(folder / "train", seed=config.seed, clips=config.data.clips)
        seed, clips = config.seed + VALIDATION_SEED, config.evaluate.validation_clips
        encode(folder / "validation", seed=seed, clips=clips)

    @property
    def training_latents(self) -> epath.Path:
        path, traced = self.config.data.path, "distill" if self.config.distill.mode == "sampling" else "trace"
        if not path:
            return self.stages[traced].folder / CLIPS
        return self.stages["latents"].folder / "train" if path == "sprites" else epath.Path(path)

    @property
    def validation_latents(self) -> epath.Path | None:
        return self.stages["latents"].folder / "validation" if self.config.data.path == "sprites" else None

    def finetune_and_save(self) -> None:
        subject = self.config.finetune.subject
        start = transformer_folder(self.teacher_path) if subject == "teacher" else self.stages["hybrid"].folder
        loras = self.loras if subject == "teacher" else ()  # the hybrid has them merged
        if not self.config.finetune.steps:
            processes.on_first(lambda: copy_model(start, self.workdir / "model", self.base, self.notes, loras))
            return

        def student() -> WanTransformer:
            dtype, mesh = jnp.dtype(self.config.model.dtype), make_mesh(self.config.mesh)
            frozen = self.config.finetune.lora_rank > 0
            model = load_transformer(start, dtype, mesh, inference=frozen, loras=loras)
            model.remat = self.config.model.remat
            return model

        teacher, latents, folder = self.shared_pipeline(), self.training_latents, self.stages["finetune"].folder
        options = {"overwrite": True, "profile": self.workdir / "profile"}
        trained = finetune(self.config, student(), teacher, latents, folder, **options)
        gather_to_first_process(trained)
        processes.on_first(lambda: save_model(trained, self.workdir / "model", self.base, self.notes))
        if self.config.finetune.lora_rank:
            processes.on_first(lambda: say(f"finetune: {save_low_rank(trained, self.workdir / LORA)}, for diffusers"))

    def evaluate_all(self) -> None:
        dtype, mesh = jnp.dtype(self.config.model.dtype), make_mesh(self.config.mesh)
        pipeline = self.shared_pipeline()
        hybrid = lambda distilled: operate(pipeline.transformer, *self.plan_and_maps(distilled))

        def finetuned() -> WanTransformer:
            vars(self).pop("teacher", None)
            pipeline.drop_transformer()  # which the hybrids before shared
            return load_transformer(self.workdir / "model", dtype, mesh, inference=True)

        models = {
            "teacher": lambda: pipeline.transformer,
            "not_distilled": lambda: hybrid(False),
            "distilled": lambda: hybrid(True),
            "finetuned": finetuned,
        }
        models = {name: lambda load=load: self.put_on_mesh(load()) for name, load in models.items()}
        evaluate(self.config, pipeline, models, self.validation_latents, self.stages["evaluation"].folder)

    def write_config(self, job: StageFolder | None = None) -> None:
        """Writes config.json to the workdir, or to the folder of a job, since other jobs may share the workdir."""
        folder = job.folder if job else self.workdir
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", dict(flatten(self.original_config)))  # without the mesh of a stage
