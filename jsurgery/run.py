"""One run of the surgery in one workdir: the stages, in order, each skipped when its files are there already."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jsurgery.attention.hybrid import HybridConfig
from jsurgery.config import block_numbers, flatten
from jsurgery.data.latents import check_latents, encode_sprites
from jsurgery.data.prompts import load_prompts
from jsurgery.errors import InputError
from jsurgery.evaluate.surgery_models import evaluate
from jsurgery.io.fields import describe_changes
from jsurgery.io.files import write_json
from jsurgery.io.hashes import folder_fingerprint
from jsurgery.report.first_frame import write_first_frame
from jsurgery.report.page import write_report
from jsurgery.runtime import processes
from jsurgery.runtime.mesh import abstract_mesh, check_batch, check_heads, gather_to_first_process, make_mesh
from jsurgery.runtime.progress import say
from jsurgery.runtime.stage_folder import StageFolder
from jsurgery.surgery.distillation.distill import distill
from jsurgery.surgery.distillation.jobs import job_name, job_of_block, merge
from jsurgery.surgery.distillation.saved_maps import load_maps
from jsurgery.surgery.finetune import finetune
from jsurgery.surgery.operate import operate, save_model
from jsurgery.surgery.plan import check_budget, plan, read_plan
from jsurgery.surgery.trace import trace
from jsurgery.wan.checkpoint import load_transformer
from jsurgery.wan.model_folder import check_pipeline, model_path, pipeline_folder, transformer_folder
from jsurgery.wan.pipeline import Pipeline, load_pipeline
from jsurgery.wan.transformer import WanTransformer
from jsurgery.wan.video_size import check_size

SAMPLING = ("seed", "prompts", "model", "video", "text_length", "sampler", "data.two_sprites")
DISTILLING = (
    "hybrid", "distill.loss", "distill.steps", "distill.updates_per_batch", "distill.batch", "distill.learning_rate",
    "distill.weight_decay", "distill.calibrate", "distill.velocity_steps",
)  # fmt: skip
SAMPLED = ("distill.mode", "distill.trajectories")  # of runs that distil without traces
LATENTS = ("video", "data.path", "data.clips", "data.two_sprites", "seed", "evaluate.validation_clips")
VALIDATION_SEED = 3  # scene sets: 0 trains the teacher, + VALIDATION_SEED is held out from everything


def start_run(config: ConfigDict, workdir: str) -> "Run":
    """The run that all processes do together. Raises InputError, in all of them, where they were not started alike."""
    run = processes.on_all(lambda: Run(config, workdir))
    first, *others = processes.gather_messages({"workdir": workdir, "model": run.identity, **dict(flatten(config))})
    for number, found in enumerate(others, 1):
        if found != first:
            told = describe_changes(first, found)
            raise InputError(f"--process_id={number}: expected what process 0 was started with: {told}")
    return run


class Run:
    """The stages of a config in a workdir. Everything that can be checked without work is checked here."""

    def __init__(self, config: ConfigDict, workdir: str):
        self.config, self.workdir = config, epath.Path(workdir)
        self.teacher_path = model_path(config.model.path)
        self.model_config = check_pipeline(config.model.path)
        check_size(self.model_config, config.video.frames, config.video.height, config.video.width)
        load_prompts(config, config.trace.prompts + config.evaluate.prompts)
        check_budget(config, self.model_config)
        mesh = abstract_mesh(config.mesh)
        check_heads(mesh, self.model_config.num_attention_heads, config.mesh.exchange)
        for batch in (config.distill.batch, config.finetune.batch // config.finetune.accumulate):
            check_batch(mesh, batch)
        if processes.several():
            make_mesh(config.mesh)
        if config.finetune.steps and config.data.path != "sprites":
            if not config.data.path:
                raise InputError("config.data.path: expected a folder of latents or 'sprites', found none")
            check_latents(epath.Path(config.data.path), pipeline_folder(self.teacher_path) / "vae")

        blocks = block_numbers(config.distill.blocks)
        if blocks is not None and blocks[-1] >= self.model_config.num_layers:
            model = f"the model has blocks 0 to {self.model_config.num_layers - 1}"
            raise InputError(f"config.distill.blocks: {model}, found {blocks[-1]}")

        self.coming: Sequence[str] = ()  # the stages that `stages` has not ended yet
        identity = self.identity = folder_fingerprint(self.teacher_path)
        stage = functools.partial(StageFolder, self.workdir, config=config)
        sampled = SAMPLED if config.distill.mode == "sampling" else ()
        self.distilling = (*DISTILLING, *sampled)
        self.trace = stage("trace", fields=(*SAMPLING, "trace", *sampled[:1]), teacher=identity)
        self.distill = stage("distill", fields=self.distilling, after=[self.trace])
        self.job = None if blocks is None else self.distill_job(job_name(blocks))
        self.plan = stage("plan", fields=("plan",), after=[self.distill])
        self.latents = stage("latents", fields=LATENTS, teacher=identity)
        self.operate = stage("hybrid", fields=("finetune.distilled",), after=[self.plan])
        self.finetune = stage("finetune", fields=("finetune",), after=[self.operate, self.latents])
        self.evaluate = stage("evaluation", fields=("evaluate",), after=[self.finetune])
        self.report = stage("report", fields=(), after=[self.evaluate])
        for made in vars(self).copy().values():
            if isinstance(made, StageFolder):
                made.done()  # refuses a workdir of another config before anything is written

    @functools.cached_property
    def pipeline(self) -> Pipeline:
        """The teacher, loaded when a stage first needs it: on the mesh, or where there are several processes on this
        one's own device."""
        return self.load_pipeline(None if processes.several() else self.mesh)

    def shared_pipeline(self) -> Pipeline:
        """The teacher for a stage that all processes work at: of several, each loads its part."""
        if not processes.several():
            return self.pipeline
        for name in ("pipeline", "teacher"):  # process 0 may have had them to itself
            vars(self).pop(name, None)
        return self.load_pipeline(self.mesh)

    def load_pipeline(self, mesh: Mesh | None) -> Pipeline:
        return load_pipeline(
            self.config.model.path, jnp.dtype(self.config.model.dtype), mesh, self.config.mesh.exchange
        )

    @property
    def mesh(self) -> Mesh | None:
        """None: a single device."""
        mesh = make_mesh(self.config.mesh)
        return mesh if mesh.size > 1 else None

    def put_on_mesh(self, model: WanTransformer) -> WanTransformer:
        """A model that this process samples from, on the mesh of a process that is alone: a single device's too, since
        what is compiled for parameters that lie on a mesh does not serve for others."""
        if not processes.several():
            model.shard(make_mesh(self.config.mesh), self.config.mesh.exchange)
        return model

    @functools.cached_property
    def teacher(self) -> WanTransformer:
        return self.pipeline.transformer

    def run_trace(self) -> None:
        work = lambda: trace(self.config, self.shared_pipeline(), self.trace.folder, self.show_first_frame)
        self.trace.run(work, all_processes=True)

    def show_first_frame(self, prompt: str, latents_1xTxHxWxC: jax.Array) -> None:
        """So that there is soon something to be seen. Not of several processes, each of which holds a part of it, and
        not in an ablation, whose runs nobody watches."""
        if processes.several() or not self.coming:
            return
        frame = self.pipeline.decode(latents_1xTxHxWxC[:, :1])[0, 0]
        say(f"trace: the teacher's first frame of this run: {write_first_frame(self.workdir, frame, prompt)}")
        self.show_progress()

    def distill_job(self, name: str) -> StageFolder:
        """The stage of an independent job of the distillation: its folder lies in that of the whole."""
        return StageFolder(
            self.workdir, f"{self.distill.name}/{name}", self.config, self.distilling, after=[self.trace]
        )

    def run_distill(self) -> None:
        """All blocks, or those of one job; where there are jobs, all blocks are theirs."""
        stage = self.job or self.distill
        if self.job is None and processes.on_first(self.merge_jobs):
            return
        stage.run(lambda: self.distill_maps(stage.folder), all_processes=True)

    def distill_maps(self, folder: epath.Path) -> None:
        teacher = self.shared_pipeline().transformer
        distill(self.config, teacher, self.trace.folder, folder, profile=self.workdir / "profile")

    def merge_jobs(self) -> bool:
        """Whether there are jobs. Their results become the stage's; raises InputError where a block is in none."""
        jobs = [self.distill_job(path.name) for path in sorted(self.distill.folder.glob("blocks_*"))]
        finished = [job.folder for job in jobs if job.done()]
        blocks = self.model_config.num_layers
        if jobs and not self.distill.done():
            job_of_block(finished, blocks)
            self.distill.begin()
            merge(self.config, finished, blocks, self.distill.folder)
            self.distill.end()
        return bool(jobs)

    def run_plan(self) -> None:
        self.plan.run(lambda: plan(self.config, self.model_config, self.distill.folder, self.plan.folder))

    def run_operate(self) -> None:
        self.operate.run(
            lambda: save_model(self.hybrid_model(self.config.finetune.distilled), self.operate.folder, self.base)
        )

    def run_finetune(self) -> None:
        self.latents.run(self.encode_latents)
        self.finetune.run(self.finetune_and_save, all_processes=True)

    def run_evaluate(self) -> None:
        self.evaluate.run(self.evaluate_all)

    def run_report(self) -> None:
        self.report.run(lambda: write_report(self.config, self.workdir))

    def stages(self, names: Sequence[str]) -> None:
        """Runs stages by their commands, in order; `report.html` fills up as they end, and says what is to come."""
        for number, name in enumerate(names):
            self.coming = names[number:]
            self.stage(name)
            self.coming = names[number + 1 :]
            self.show_progress()

    def show_progress(self) -> None:
        """Writes the page of a run that goes on, unless the next stage does it: `report` itself."""
        if len(self.coming) > 1 and processes.is_first() and not self.report.done():
            write_report(self.config, self.workdir, coming=self.coming)

    def stage(self, name: str) -> None:
        """Runs one stage by its command. Raises InputError, with nothing written, when the one before is not done."""
        stages = {
            "trace": (None, self.run_trace),
            "distill": (self.trace, self.run_distill),
            "plan": (self.distill, self.run_plan),
            "operate": (self.plan, self.run_operate),
            "finetune": (self.operate, self.run_finetune),
            "evaluate": (self.finetune, self.run_evaluate),
            "report": (self.evaluate, self.run_report),
        }
        before, run = stages[name]
        if before is self.distill:
            processes.on_first(self.merge_jobs)
        if before is not None and not processes.on_first(before.done):
            raise InputError(f"{before.folder}: not there or not complete; run that stage first, or `jsurgery surgery`")
        computing = {"trace": self.trace, "distill": self.job or self.distill, "finetune": self.finetune}
        if name in computing and not processes.on_first(computing[name].done):
            make_mesh(self.config.mesh)  # refuses one that these devices do not make up, before anything is written
        processes.on_first(lambda: self.write_config(self.job if name == "distill" else None))
        run()

    @property
    def base(self) -> str:
        """The model folder that a saved transformer names for its VAE and text encoder."""
        return self.config.model.path

    def hybrid_model(self, distilled: bool) -> WanTransformer:
        """The hybrid model of the plan, with trained or with merely calibrated feature maps."""
        rates = read_plan(self.plan.folder)["rates"]
        hybrid = HybridConfig.of(self.config, rates)
        file = self.distill.folder / ("feature_maps.safetensors" if distilled else "initial.safetensors")
        return operate(self.teacher, hybrid, load_maps(file, rates, hybrid.feature_map))

    def encode_latents(self) -> None:
        data = self.config.data
        if data.path != "sprites":
            return
        common = {"video": self.config.video, "two_sprites": data.two_sprites}
        encode_sprites(
            self.pipeline.vae, self.latents.folder / "train", seed=self.config.seed, clips=data.clips, **common
        )
        clips = self.config.evaluate.validation_clips
        seed = self.config.seed + VALIDATION_SEED
        encode_sprites(self.pipeline.vae, self.latents.folder / "validation", seed=seed, clips=clips, **common)

    @property
    def training_latents(self) -> epath.Path:
        path = self.config.data.path
        return self.latents.folder / "train" if path == "sprites" else epath.Path(path)

    @property
    def validation_latents(self) -> epath.Path | None:
        return self.latents.folder / "validation" if self.config.data.path == "sprites" else None

    def finetune_and_save(self) -> None:
        folder = (
            transformer_folder(self.teacher_path) if self.config.finetune.subject == "teacher" else self.operate.folder
        )
        student = load_transformer(folder, jnp.dtype(self.config.model.dtype), make_mesh(self.config.mesh))
        student.remat = self.config.model.remat
        profile = self.workdir / "profile"
        teacher, latents = self.shared_pipeline(), self.training_latents
        trained = finetune(self.config, student, teacher, latents, self.finetune.folder, profile=profile)
        gather_to_first_process(trained)
        processes.on_first(lambda: save_model(trained, self.workdir / "model", self.base))

    def evaluate_all(self) -> None:
        dtype = jnp.dtype(self.config.model.dtype)
        models = {
            "teacher": lambda: self.put_on_mesh(self.teacher),
            "not_distilled": lambda: self.put_on_mesh(self.hybrid_model(False)),
            "distilled": lambda: self.put_on_mesh(self.hybrid_model(True)),
            "finetuned": lambda: self.put_on_mesh(load_transformer(self.workdir / "model", dtype)),
        }
        evaluate(self.config, self.pipeline, models, self.validation_latents, self.evaluate.folder)

    def write_config(self, job: StageFolder | None = None) -> None:
        """Beside the stages, or with the files of a job: others may be at work in this workdir."""
        folder = job.folder if job else self.workdir
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", dict(flatten(self.config)))
