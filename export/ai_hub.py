"""Qualcomm AI Hub: parts compiled, linked, profiled and run on hosted phones, by qai-hub and its own configuration.

AI Hub compiles ONNX, not TFLite: a .tflite file can only be profiled there. Every job's id is kept: running again waits
for the jobs that there are and submits the others.
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

    `choices` are device, runtime, options of compile jobs, options of profile and inference jobs, and "link" or "".
    A .tflite file names its tensors args_0, output_0 and so on, in the part's order.
    """
    device, runtime, compile_options, options, link = choices
    hub = Hub(folder / "ai_hub", device, f"{runtime} {compile_options} {options}")
    parts = [part for part in job.parts() if part.name not in ("text_encoder", "condition")]
    try:
        if not qai_hub.get_devices(device):  # or it raises, with no token or a bad one, before anything is uploaded
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
    """One line for what qai-hub raises, without the box that it draws around it."""
    text = " ".join(re.sub("[┌─┐└┘│|]", " ", str(error)).split())
    return NO_TOKEN if "configuration file" in text else f"--ai_hub: {text}"


class Hub:
    """Jobs of one device and set of options, by key: submitted once, then known by their ids."""

    def __init__(self, folder: pathlib.Path, device: str, settings: str):
        folder.mkdir(exist_ok=True)
        self.folder, self.device, self.settings = folder, qai_hub.Device(device), f"{device} {settings}"
        self.file = folder / "jobs.json"
        self.ids: dict[str, str] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def submitted(self, key: str, submit: Callable[[], Any]) -> Any:
        """The job of a key; submitted if there is none."""
        key = f"{key} [{self.settings}]"
        if key in self.ids:
            return qai_hub.get_job(self.ids[key])
        job = submit()
        self.ids[key] = job.job_id
        self.file.write_text(json.dumps(self.ids, indent=2) + "\n")
        return job

    def ended(self, what: str, job: Any) -> Any:
        """Waits for a job. Raises InputError with the service's reason when it fails; the next run submits anew."""
        say(f"export: AI Hub, {what}: job {job.job_id}")
        status = job.wait()
        if not status.success:
            self.ids = {key: id for key, id in self.ids.items() if id != job.job_id}
            self.file.write_text(json.dumps(self.ids, indent=2) + "\n")
            reason = " ".join((status.message or "no reason given").split())
            raise InputError(f"--ai_hub: {what} failed (job {job.job_id}): {reason}")
        return job

    def compiled(
        self, job: ExportJob, folder: pathlib.Path, parts: list[Part], runtime: str, options: str
    ) -> dict[str, Any]:
        """The target model of every part; all are submitted before the first is waited for."""
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
        """Downloads one context binary of all parts, which share what weights they can. They must be QNN DLCs."""
        submit = lambda: qai_hub.submit_link_job(list(models.values()), device=self.device, name="jsurgery")
        ids = " ".join(model.model_id for model in models.values())
        linked = self.ended("link", self.submitted(f"link {ids}", submit))
        self.download(linked.get_target_model(), "linked")

    def download(self, model: Any, name: str) -> None:
        """The service gives the file its suffix."""
        if not any(self.folder.glob(f"{name}.*")):
            with contextlib.redirect_stdout(sys.stderr):
                model.download(str(self.folder / name))

    def measured(self, part: Part, model: Any, folder: pathlib.Path, options: str) -> dict[str, Any]:
        """Latency, memory and layers by compute unit as the device measured them, and errors of the part's outputs."""
        own = lambda kind, names: [f"{kind}_{i}" if isinstance(model, str) else name for i, name in enumerate(names)]
        arguments = load_sample(folder, 0, part.inputs)
        inputs = {name: [np.asarray(x)] for name, x in zip(own("args", part.inputs), arguments, strict=True)}
        submit = lambda: qai_hub.submit_inference_job(model, self.device, inputs, f"jsurgery {part.name}", options)
        submitted = self.submitted(f"run {part.name} {getattr(model, 'model_id', model)}", submit)
        profile = self.ended(f"run of {part.name}", submitted).download_profile()
        summary, units = profile["execution_summary"], [unit["compute_unit"] for unit in profile["execution_detail"]]
        made = submitted.download_output_data()
        return {
            "part": part.name,
            "job": submitted.job_id,
            "latency_ms": summary["estimated_inference_time"] / 1e3,
            "peak_memory_mb": max(summary["estimated_inference_peak_memory"] or 0, 0) / 1e6,  # 0: not told
            "layers": {unit: units.count(unit) for unit in sorted(set(units))},
            **errors(part, [made[name][0] for name in own("output", part.outputs)], folder),
        }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of text."""
    lines = [f"{'part':<16}{'latency':>12}{'peak memory':>14}  layers"]
    for row in rows:
        layers = ", ".join(f"{count} {unit}" for unit, count in row["layers"].items())
        lines.append(f"{row['part']:<16}{row['latency_ms']:>9.2f} ms{row['peak_memory_mb']:>11.1f} MB  {layers}")
    return lines
