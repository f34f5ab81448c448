"""Every notebook runs from top to bottom on a tiny model with short settings, and is stored without outputs.

Those for accelerators run on eight devices of the CPU.
"""

import importlib.util
import os
import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SHORT = {
    "video.frames": "5", "video.height": "64", "video.width": "48", "sampler.steps": "2", "trace.keep_steps": "2",
    "trace.prompts": "2", "trace.holdout": "1", "trace.batch": "2", "distill.steps": "2", "log_every": "1",
    "hybrid.rates": "(8, 'linear')", "plan.rates": "(1, 8, 'linear')", "plan.budget": "1R8",
}  # fmt: skip
# The whole surgery, from prompts alone.
WHOLE = {
    "prompts": "prompts.txt", "data.path": "", "distill.velocity_steps": "0", "plan.errors": "attention",
    "finetune.steps": "0", "evaluate.prompts": "2", "evaluate.batch": "2", "evaluate.videos": "1",
}  # fmt: skip
IMAGES = {
    "01_sample": 2, "02_distil_one_block": 3, "03_plan": 6, "04_ablation": 1, "05_export": 4,
    "06_kaggle_tpu": 1, "07_colab": 3,
}  # fmt: skip
ON_DEVICES = ("06_kaggle_tpu", "07_colab")
EXPORT = ("litert_torch", "ai_edge_litert", "ai_edge_quantizer")  # packages that 05_export needs and tests do not
MISSING = [name for name in EXPORT if importlib.util.find_spec(name) is None]


def parameters_cell(notebook):
    return next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))


def shortened(path, pipeline):
    """The cells of a notebook, with the settings of a test."""
    notebook = nbformat.read(path, as_version=4)
    cell = parameters_cell(notebook)
    settings = SHORT | (WHOLE if path.stem == "06_kaggle_tpu" else {})
    cell.source += f"\nCONFIG, MODEL = 'tiny', {str(pipeline)!r}\nOVERRIDES |= {settings!r}"
    if "BLOCK, RATE" in cell.source:
        cell.source += "\nBLOCK = 1"  # the last block of the model
    if "SEEDS" in cell.source:
        cell.source += "\nSEEDS, ARMS = SEEDS[:1], dict(list(ARMS.items())[1::2])"
    if "PRECISIONS" in cell.source:
        cell.source += "\nPRECISIONS = PRECISIONS[:2]"
    return notebook.cells


@pytest.fixture(scope="module")
def executed(tiny_pipeline, tmp_path_factory):
    """{name: cells, with their outputs} of every notebook that can run here.

    One process runs them one after another, so that what one has compiled need not be compiled for the next, and
    another those for accelerators. Each begins with no variables, in a folder of its own.
    """
    cells = {path.stem: shortened(path, tiny_pipeline) for path in NOTEBOOKS if path.stem != "05_export" or not MISSING}
    several = "--xla_force_host_platform_device_count=8 " + os.environ["XLA_FLAGS"]
    for flags, names in ((os.environ["XLA_FLAGS"], cells.keys() - ON_DEVICES), (several, ON_DEVICES)):
        together = nbformat.v4.new_notebook()
        for name in sorted(names):
            folder = tmp_path_factory.mktemp(name)
            begin = nbformat.v4.new_code_cell(f"%reset -f\nimport os\nos.chdir({str(folder)!r})")
            together.cells += [begin, *cells[name]]
        client = nbclient.NotebookClient(together, timeout=600, allow_errors=True)
        client.execute(env=os.environ | {"XLA_FLAGS": flags})
    return cells


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, executed):
    if path.stem == "05_export" and MISSING:
        pytest.skip(f"NOT CHECKED: {path.name} needs {', '.join(MISSING)}: pip install 'jsurgery[export]'")
    outputs = [output for cell in executed[path.stem] for output in cell.get("outputs", [])]
    errors = [output for output in outputs if output.output_type == "error"]
    assert not errors, "\n".join(errors[0].traceback)
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) >= IMAGES[path.stem]
    if path.stem in ON_DEVICES:
        assert any("of 8 devices" in output.get("text", "") for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    assert "tiny_wan" in parameters_cell(notebook).source and "Wan2.1-T2V-1.3B" in parameters_cell(notebook).source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_on_colab_and_kaggle(path):
    heading, empty, colab, kaggle = nbformat.read(path, as_version=4).cells[0].source.splitlines()[:4]
    assert heading.startswith("# ") and not empty
    for badge, place in ((colab, "colab.research.google.com/github/"), (kaggle, "kaggle.com/kernels/welcome?src=")):
        assert place in badge and badge.endswith(f"/notebooks/{path.name})")


def test_every_notebook_has_an_expected_number_of_images():
    assert {path.stem for path in NOTEBOOKS} == set(IMAGES)
