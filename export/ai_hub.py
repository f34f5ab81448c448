"""Compiles, links, profiles and runs parts on phones hosted by Qualcomm AI Hub, through the qai-hub package.

qai-hub reads its API token from its own configuration. AI Hub compiles ONNX only; .tflite files can be profiled there
but not compiled. The id of every job is saved: another run waits for jobs that exist and submits only the others.
"""

import contextlib
import json
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import qai_hub
from qai_hub.client import Error

from jsurgery.errors import InputError
from jsurgery.runtime.progress import say

from .artefacts import Artefact
from .parity import errors, load_sample
from .parts import ExportJob, Part

NO_TOKEN = (
    "--ai_hub: found no API token; get one at https://aihub.qualcomm.com (Account, Settings), then run "
    "`qai-hub configure --api_token TOKEN`"
)


def export(job: ExportJob, folder: pathlib.Path, choices: tuple[str, ...]) -> None:
    """Writes `ai_hub/jobs.json`, `ai_hub/report.json` and the compiled parts; prints a table.

    `choices` are the device, the runtime, options of compile jobs, options of inference jobs, and "link" or "". Raises
    InputError without a token, for an unknown device and where a job fails.
    """
    device, runtime, compile_options, options, link = choices
    hub = Hub(folder / "ai_hub", device, f"{runtime} {compile_options} {options}")
    parts = [part for part in job.parts() if part.name not in ("text_encoder", "condition")]
    try:
        if not qai_hub.get_devices(device):  # without a valid token it raises here, before anything is uploaded
            raise InputError(f"--ai_hub={device}: no such device; `qai-hub list-devices` names them")
        models = hub.compiled(job, folder, parts, runtime, compile_options)
        if link:
            hub.link(models)
        rows = [hub.measured(part, models[part.name], folder, options) for part in parts]
    except Error as error:
        raise InputError(explain(error)) from None
    (hub.folder / "report.json").write_text(json.dumps({"device": device, "parts": rows}, indent=2) + "\n")
    for line in table(rows):
        print(line)


def explain(error: Exception) -> str:
    """The message of a qai-hub error in one line, without the box that qai-hub draws around it."""
    text = " ".join(re.sub("[┌─┐└┘│|]", " ", str(error)).split())
    return NO_TOKEN if "configuration file" in text else f"--ai_hub: {text}"


class Hub:
    """The jobs of one device and set of options. A job is submitted once; its id is kept in `jobs.json` by a key."""

    def __init__(self, folder: pathlib.Path, device: str, settings: str):
        folder.mkdir(exist_ok=True)
        self.folder, self.device, self.settings = folder, qai_hub.Device(device), f"{device} {settings}"
        self.file = folder / "jobs.json"
        self.ids: dict[str, str] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def submitted(self, key: str, submit: Callable[[], Any]) -> Any:
        """The job of a key, which `submit` submits if there is none yet."""
        key = f"{key} [{self.settings}]"
        if key in self.ids:
            return qai_hub.get_job(self.ids[key])
        job = submit()
        self.ids[key] = job.job_id
        self.file.write_text(json.dumps(self.ids, indent=2) + "\n")
        return job

    def ended(self, name: str, job: Any) -> Any:
        """Waits for a job and returns it. Raises InputError with the reason if it failed; the next run resubmits it."""
        say(f"export: AI Hub, {name}: job {job.job_id}")
        status = job.wait()
        if not status.success:
            self.ids = {key: id for key, id in self.ids.items() if id != job.job_id}
            self.file.write_text(json.dumps(self.ids, indent=2) + "\n")
            reason = " ".join((status.message or "no reason given").split())
            raise InputError(f"--ai_hub: {name} failed (job {job.job_id}): {reason}")
        return job

    def compiled(
        self, job: ExportJob, folder: pathlib.Path, parts: list[Part], runtime: str, options: str
    ) -> dict[str, Any]:
        """The compiled model of every part, or for tflite its file. Submits all jobs before it waits for the first."""
        if runtime == "tflite":
            return {part.name: str(Artefact(folder, "tflite", "float32", part.name).path) for part in parts}
        jobs = {
            part.name: self.submitted(
                f"compile {part.name} {job.fingerprint}",
                lambda part=part: qai_hub.submit_compile_job(
                    model=str(Artefact(folder, "onnx", "float32", part.name).path),
                    device=self.device,
                    name=f"jsurgery {part.name}",
                    options=f"--target_runtime {runtime} {options}".strip(),
                ),
            )
            for part in parts
        }
        models = {}
        for name, submitted in jobs.items():
            models[name] = self.ended(f"compile of {name}", submitted).get_target_model()
            self.download(models[name], name)
        return models

    def link(self, models: dict[str, Any]) -> None:
        """Downloads one context binary of all parts, which stores equal weights once. The models must be QNN DLCs."""
        submit = lambda: qai_hub.submit_link_job(list(models.values()), device=self.device, name="jsurgery")
        ids = " ".join(model.model_id for model in models.values())
        linked = self.ended("link", self.submitted(f"link {ids}", submit))
        self.download(linked.get_target_model(), "linked")

    def download(self, model: Any, name: str) -> None:
        """Downloads a model under a name, to which AI Hub adds the suffix."""
        if not any(self.folder.glob(f"{name}.*")):
            with contextlib.redirect_stdout(sys.stderr):
                model.download(str(self.folder / name))

    def measured(self, part: Part, model: Any, folder: pathlib.Path, options: str) -> dict[str, Any]:
        """The row of a part: latency, peak memory and layers by compute unit on the device, and its outputs' errors."""
        # In a .tflite file tensors are called args_0, args_1, ..., output_0, ... in the part's order.
        own = lambda kind, names: [f"{kind}_{i}" if isinstance(model, str) else name for i, name in enumerate(names)]
        arguments = load_sample(folder, 0, part.inputs)
        inputs = {name: [np.asarray(x)] for name, x in zip(own("args", part.inputs), arguments, strict=True)}
        submit = lambda: qai_hub.submit_inference_job(model, self.device, inputs, f"jsurgery {part.name}", options)
        submitted = self.submitted(f"run {part.name} {getattr(model, 'model_id', model)}", submit)
        profile = self.ended(f"run of {part.name}", submitted).download_profile()
        summary, units = profile["execution_summary"], [unit["compute_unit"] for unit in profile["execution_detail"]]
        outputs = submitted.download_output_data()
        return {
            "part": part.name,
            "job": submitted.job_id,
            "latency_ms": summary["estimated_inference_time"] / 1e3,
            "peak_memory_mb": max(summary["estimated_inference_peak_memory"] or 0, 0) / 1e6,  # 0: not reported
            "layers": {unit: units.count(unit) for unit in sorted(set(units))},
            **errors(part, [outputs[name][0] for name in own("output", part.outputs)], folder),
        }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as lines of text under a header."""
    lines = [f"{'part':<16}{'latency':>12}{'peak memory':>14}  layers"]
    for row in rows:
        layers = ", ".join(f"{count} {unit}" for unit, count in row["layers"].items())
        lines.append(f"{row['part']:<16}{row['latency_ms']:>9.2f} ms{row['peak_memory_mb']:>11.1f} MB  {layers}")
    return lines
