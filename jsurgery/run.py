"""One run of the surgery in one workdir: the stages, in order, each skipped when its files are there already."""

import functools

import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from jsurgery.config import flat
from jsurgery.data.latents import encode_sprites
from jsurgery.errors import InputError
from jsurgery.evaluate.stages import evaluate
from jsurgery.report.page import write_report
from jsurgery.runtime.mesh import abstract_mesh, check_batch, check_heads
from jsurgery.runtime.stages import Stage, file_identity, write_json
from jsurgery.surgery.distill import distill, load_maps
from jsurgery.surgery.finetune import finetune
from jsurgery.surgery.operate import operate, save_model
from jsurgery.surgery.plan import check_budget, hybrid_config, plan, read_plan
from jsurgery.surgery.trace import load_prompts, trace
from jsurgery.wan.pipeline import check_pipeline, check_size, load_pipeline, model_path, transformer_folder
from jsurgery.wan.transformer import WanTransformer, load_transformer

SAMPLING = ("seed", "prompts", "model", "video", "text_length", "sampler", "data.two_sprites")
LATENTS = ("video", "data.path", "data.clips", "data.two_sprites", "seed", "evaluate.validation_clips")
VALIDATION_SEED = 3  # scene sets: 0 trains the teacher, + VALIDATION_SEED is held out from everything


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
        if config.finetune.steps and config.data.path != "sprites" and not epath.Path(config.data.path or "?").exists():
            raise InputError(f"config.data.path: {config.data.path or '(empty)'}: no such folder; or 'sprites'")

        identity = file_identity(self.teacher_path)
        stage = functools.partial(Stage, self.workdir, config=config)
        self.trace = stage("trace", fields=(*SAMPLING, "trace"), teacher=identity)
        self.distill = stage("distill", fields=("hybrid", "distill"), after=[self.trace])
        self.plan = stage("plan", fields=("plan",), after=[self.distill])
        self.latents = stage("latents", fields=LATENTS, teacher=identity)
        self.operate = stage("hybrid", fields=("finetune.distilled",), after=[self.plan])
        self.finetune = stage("finetune", fields=("finetune",), after=[self.operate, self.latents])
        self.evaluate = stage("evaluation", fields=("evaluate",), after=[self.finetune])
        self.report = stage("report", fields=(), after=[self.evaluate])
        for made in vars(self).copy().values():
            if isinstance(made, Stage):
                made.done()  # refuses a workdir of another config before anything is written

    @functools.cached_property
    def pipeline(self):
        """The teacher, loaded when a stage first needs it."""
        return load_pipeline(self.config.model.path, jnp.dtype(self.config.model.dtype))

    @functools.cached_property
    def teacher(self) -> WanTransformer:
        return self.pipeline.transformer

    def run_trace(self) -> None:
        self.trace.run(lambda: trace(self.config, self.pipeline, self.trace.folder))

    def run_distill(self) -> None:
        self.distill.run(lambda: distill(self.config, self.teacher, self.trace.folder, self.distill.folder))

    def run_plan(self) -> None:
        self.plan.run(lambda: plan(self.config, self.model_config, self.distill.folder, self.plan.folder))

    def run_operate(self) -> None:
        self.operate.run(
            lambda: save_model(self.operated(self.config.finetune.distilled), self.operate.folder, self.base)
        )

    def run_finetune(self) -> None:
        self.latents.run(self.encode_latents)
        self.finetune.run(self.finetune_and_save)

    def run_evaluate(self) -> None:
        self.evaluate.run(self.evaluate_all)

    def run_report(self) -> None:
        self.report.run(lambda: write_report(self.config, self.workdir))

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
        if before is not None and not before.done():
            raise InputError(f"{before.folder}: not there or not complete; run that stage first, or `jsurgery surgery`")
        self.write_config()
        run()

    @property
    def base(self) -> str:
        """The model folder that a saved transformer names for its VAE and text encoder."""
        return self.config.model.path

    def operated(self, distilled: bool) -> WanTransformer:
        """The hybrid model of the plan, with trained or with merely calibrated feature maps."""
        rates = read_plan(self.plan.folder)["rates"]
        hybrid = hybrid_config(self.config, rates)
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
        student = load_transformer(folder, jnp.dtype(self.config.model.dtype))
        student.remat = self.config.model.remat
        trained = finetune(self.config, student, self.pipeline, self.training_latents, self.finetune.folder)
        save_model(trained, self.workdir / "model", self.base)

    def evaluate_all(self) -> None:
        dtype = jnp.dtype(self.config.model.dtype)
        teacher = self.teacher
        models = {
            "teacher": lambda: teacher,
            "not_distilled": lambda: self.operated(False),
            "distilled": lambda: self.operated(True),
            "finetuned": lambda: load_transformer(self.workdir / "model", dtype),
        }
        evaluate(self.config, self.pipeline, models, self.validation_latents, self.evaluate.folder)
        self.pipeline.transformer = teacher

    def write_config(self) -> None:
        self.workdir.mkdir(parents=True, exist_ok=True)
        write_json(self.workdir / "config.json", dict(flat(self.config)))
