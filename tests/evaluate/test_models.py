"""A sampler is compiled once for all hybrid models that a run evaluates."""

import logging

import jax
import pytest

from jsurgery.attention.hybrid import HybridConfig
from jsurgery.load_config import load_config
from jsurgery.run import Run
from jsurgery.runtime.mesh import make_mesh
from jsurgery.surgery.distillation.saved_maps import load_maps, save_maps
from jsurgery.surgery.distillation.update import initial_maps
from jsurgery.surgery.operate import operate, save_model
from jsurgery.wan.checkpoint import load_transformer

FIELDS = {
    "video.frames": "5", "video.height": "64", "video.width": "48", "sampler.steps": "2", "trace.keep_steps": "1",
    "hybrid.rates": "(2,)", "plan.rates": "(1, 2)", "plan.budget": "1R2",
}  # fmt: skip


class CompileLog(logging.Handler):
    """Collects the names of the programs that JAX compiles."""

    def __init__(self):
        super().__init__()
        self.programs: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if (message := record.getMessage()).startswith("Compiling "):
            self.programs.append(message.split()[1])


@pytest.fixture
def compiled():
    logger, handler = logging.getLogger("jax._src.interpreters.pxla"), CompileLog()
    logger.addHandler(handler)
    with jax.log_compiles():
        yield handler.programs
    logger.removeHandler(handler)


def test_one_sampler_is_compiled_for_all_hybrids(tiny_pipeline, tmp_path, compiled):
    config = load_config("tiny", FIELDS | {"model.path": str(tiny_pipeline)})
    run = Run(config, str(tmp_path / "run"))
    run.teacher.shard(make_mesh(config.mesh))  # as training leaves it
    save_maps(tmp_path / "maps.safetensors", initial_maps(config, run.teacher), (2,), range(2))
    hybrid = HybridConfig.of(config, (2, 1))
    operated = operate(run.teacher, hybrid, load_maps(tmp_path / "maps.safetensors", (2, 1), hybrid.feature_map))
    save_model(operated, run.workdir / "model", str(tiny_pipeline))
    compiled.clear()
    for model in (operated, load_transformer(run.workdir / "model")):
        pipeline = run.pipeline.with_transformer(run.put_on_mesh(model))
        for first in range(2):
            pipeline.sample(["a red circle"], config, seed=0, first=first)
    assert compiled.count("jit(sampling_step)") == 1
