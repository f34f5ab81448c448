"""The velocity through all TFLite parts in order, as an app runs them, against JAX's velocity."""

import pathlib

from etils import epath

from jsurgery.io.files import write_json
from jsurgery.io.results import relative_error
from jsurgery.runtime.progress import say

from .driver import Pipeline
from .formats import BOUNDS
from .parity import load_sample
from .parts import ExportJob


def export(job: ExportJob, folder: pathlib.Path, precisions: tuple[str, ...]) -> None:
    """Writes `chain/PRECISION.json`, a row of parity.json, for each precision."""
    (folder / "chain").mkdir(exist_ok=True)
    latents, timestep, text, expected = load_sample(folder, 0, ("latents", "timestep", "text_embeddings", "velocity"))
    for precision in precisions:
        velocity = Pipeline(folder, precision).velocity(latents, float(timestep[0]), text)
        error, bound = relative_error(velocity, expected), BOUNDS["tflite", precision]
        row = {"part": "all", "format": "tflite", "precision": precision, "relative_error": error}
        row |= {"max_error": float(abs(velocity - expected).max()), "bound": bound, "passed": bool(error <= bound)}
        write_json(epath.Path(folder) / "chain" / f"{precision}.json", row)
        say(f"export: velocity through all parts, {precision}: error {error:.1e}")
