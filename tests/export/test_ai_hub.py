"""Export to AI Hub with the real client, qai-hub, and a local server in place of the service."""

import http.server
import importlib.util
import io
import json
import threading

import numpy as np
import pytest

if importlib.util.find_spec("qai_hub") is None:
    pytest.skip("NOT TESTED: AI Hub, without qai-hub: pip install '.[export]'", allow_module_level=True)

import h5py
import qai_hub
from qai_hub import hub
from qai_hub import public_api_pb2 as pb
from qai_hub.client import UserError
from qai_hub.util.dataset_entries_converters import dataset_entries_to_h5

from jsurgery.errors import InputError
from jsurgery.export import ai_hub
from jsurgery.export.parity import sample_file
from jsurgery.export.parts import Part

DEVICE = "Snapdragon 8 Elite QRD"
PARTS = [
    Part("embed", "every step", ("latents",), ("tokens_00",)),
    Part("block_00", "every step", ("tokens_00", "text", "modulation"), ("tokens_01",), (0,)),
]
REASON = "QNN_COMMON_ERROR_MEM_ALLOC: graph needs more TCM than the device has"


class Job:
    """The part of an ExportJob that `ai_hub` uses."""

    fingerprint = "abc"

    def parts(self):
        return [Part("text_encoder", "once a prompt", ("token_ids", "mask"), ("text_embeddings",)), *PARTS]


class Service:
    """The part of the service that the client uses: its state, and responses by method and path."""

    def __init__(self):
        self.jobs, self.models, self.outputs = [], [], {}
        self.fail, self.uploads = "", 0

    def answer(self, method, path, body):
        match (method, *path.strip("/").split("/")[2:]):
            case ("GET", "devices"):
                attributes = ["framework:qnn", "framework:onnx", "framework:tflite"]
                return pb.DeviceList(devices=[pb.Device(name=DEVICE, os="15", attributes=attributes)])
            case ("POST", "models"):
                self.uploads += 1
                return self.added(pb.Model.FromString(body))
            case ("GET", "models", id, "multipart_upload"):
                urls = pb.FileMultipartUploadURL(upload_id="u", urls=[f"{self.url}/put/{id}"], max_part_size=1 << 30)
                return pb.FileUploadResponse(multipart_url=urls)
            case ("GET", "datasets", id, "upload_url"):
                url = pb.FileUploadURL(url=f"{self.url}/put/{id}", file_field_name="file")
                return pb.FileUploadResponse(url=url)
            case ("PUT" | "POST" | "PATCH", "models" | "datasets", id, *_):
                return pb.CreateUpdateResponse(id=id)
            case ("POST", "datasets"):
                return pb.CreateUpdateResponse(id="given")
            case ("GET", "datasets", id):
                return pb.Dataset(dataset_id=id, expiration_time={"seconds": 1 << 32})
            case ("GET", "models", id):
                return next(model for model in self.models if model.model_id == id)
            case ("GET", "models" | "jobs" | "datasets", id, "download" | "download_compiled_model" | "download_data"):
                url = pb.FileDownloadURL(url=f"{self.url}/get/{id}", filename=f"{id}.bin")
                return pb.FileDownloadResponse(url=url)
            case ("POST", "jobs"):
                return self.submitted(pb.Job.FromString(body))
            case ("GET", "jobs", id):
                return next(job for job in self.jobs if inner(job)[1] == id)
            case ("GET", "jobs", id, "result"):
                return self.result(id)
        raise AssertionError(f"the client asked for {method} {path}")

    def added(self, model):
        model.model_id = f"m{len(self.models)}"
        self.models.append(model)
        return pb.CreateUpdateResponse(id=model.model_id)

    def submitted(self, job):
        kind = job.WhichOneof("job")
        found = getattr(job, kind)
        failing = self.fail and self.fail in f"{kind} {found.name}"
        setattr(found, f"{kind}_id", f"j{len(self.jobs)}")
        found.job_state = pb.JOB_STATE_FAILED if failing else pb.JOB_STATE_DONE
        found.failure_reason = REASON if failing else ""
        if kind in ("compile_job", "link_job") and not failing:
            dlc = "qnn_dlc" in found.options
            made = pb.MODEL_TYPE_QNN_DLC if dlc else pb.MODEL_TYPE_QNN_CONTEXT_BINARY
            target = pb.Model(model_type=made, name=found.name, producer_id=f"j{len(self.jobs)}")
            self.added(target)
            found.target_model.CopyFrom(target)
        self.jobs.append(job)
        return pb.CreateUpdateResponse(id=inner(job)[1])

    def result(self, id):
        layers = [pb.LayerDetail(name=f"l{n}", compute_unit=pb.COMPUTE_UNIT_NPU) for n in range(3)]
        layers.append(pb.LayerDetail(name="last", compute_unit=pb.COMPUTE_UNIT_CPU))
        measured = {"execution_time": 1234, "after_execution_peak_memory": 7_000_000, "major_version": 1}
        detail = pb.ProfileDetail(**measured, layer_details=layers)
        job = next(job for job in self.jobs if inner(job)[1] == id)
        if job.WhichOneof("job") == "inference_job":
            found = {"inference_job_id": id, "output_dataset_id": f"output-{id}", "detail": detail}
            return pb.JobResult(inference_job_result=found)
        return pb.JobResult()

    def download(self, id):
        """The content of a compiled model, or of the outputs of an inference job."""
        if not id.startswith("output-"):
            return b"context binary"
        name = inner(next(job for job in self.jobs if f"output-{inner(job)[1]}" == id))[0].name
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            dataset_entries_to_h5({name: [array] for name, array in self.outputs[name].items()}, file)
        return buffer.getvalue()


def inner(job):
    """(the compile, link or inference job in a Job message, its id)."""
    kind = job.WhichOneof("job")
    found = getattr(job, kind)
    return found, getattr(found, f"{kind}_id")


@pytest.fixture
def service(tmp_path, monkeypatch):
    """Starts a server and configures qai-hub to use it."""
    found = Service()

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            self.send_response(200)
            if path.startswith("/put/"):
                content, kind = b"", "text/plain"
                self.send_header("ETag", "tag")
            elif path.startswith("/get/"):
                content, kind = found.download(path.rpartition("/")[2]), "application/octet-stream"
            else:
                assert self.headers["Authorization"] == "token secret"
                content, kind = found.answer(self.command, path, body).SerializeToString(), "application/x-protobuf"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = handle_any

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    config = tmp_path / "client.ini"
    config.write_text(f"[api]\napi_url = {found.url}\nweb_url = {found.url}\napi_token = secret\nverbose = False\n")
    configure(monkeypatch, config)
    yield found
    server.shutdown()
    server.server_close()


def configure(monkeypatch, config):
    """Makes qai-hub read its configuration again, which it otherwise reads once per process."""
    monkeypatch.setenv("QAIHUB_CLIENT_INI", str(config))
    monkeypatch.setattr(hub._global_client, "_config", None)


@pytest.fixture
def folder(tmp_path):
    """The folder of an export, with placeholders for ONNX files and random tensors."""
    folder = tmp_path / "export"
    (folder / "onnx").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part in PARTS:
        (folder / "onnx" / f"{part.name}.float32.onnx").write_bytes(b"onnx")
        for name in (*part.inputs, *part.outputs):
            file = sample_file(folder, 0, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, rng.normal(size=(1, 3, 4)).astype(np.float32))
    return folder


def run(folder, runtime="qnn_context_binary", link=""):
    ai_hub.export(Job(), folder, (DEVICE, runtime, "--truncate_64bit_io", "", link))


@pytest.fixture
def device_outputs(service, folder):
    """Outputs of the device for every part: the reference with a relative error of 1e-3."""
    for part in PARTS:
        made = {name: np.load(sample_file(folder, 0, name)) * np.float32(1.001) for name in part.outputs}
        service.outputs[f"jsurgery {part.name}"] = made


def test_compiles_profiles_and_measures(service, folder, device_outputs, capsys):
    run(folder)
    compiled = [job.compile_job for job in service.jobs if job.HasField("compile_job")]
    assert [job.options for job in compiled] == ["--target_runtime qnn_context_binary --truncate_64bit_io"] * 2
    assert (folder / "ai_hub" / "block_00.bin").read_bytes() == b"context binary"
    report = json.loads((folder / "ai_hub" / "report.json").read_text())
    assert report["device"] == DEVICE and [row["part"] for row in report["parts"]] == ["embed", "block_00"]
    row = report["parts"][1]
    assert (row["latency_ms"], row["peak_memory_mb"], row["layers"]) == (1.234, 7.0, {"CPU": 1, "NPU": 3})
    assert row["relative_error"] == pytest.approx(1e-3, rel=1e-2)
    assert "1.23 ms" in capsys.readouterr().out

    submitted, uploads = len(service.jobs), service.uploads
    assert (submitted, uploads) == (4, 2)
    run(folder)  # waits for the same jobs
    assert (len(service.jobs), service.uploads) == (submitted, uploads)


def test_a_failed_job_gives_its_reason_and_is_retried(service, folder, device_outputs):
    service.fail = "compile_job jsurgery block_00"
    with pytest.raises(InputError, match=f"compile of block_00 failed .job j1.: {REASON}"):
        run(folder)
    assert not (folder / "ai_hub" / "report.json").exists()
    service.fail = ""
    run(folder)
    assert sum(job.HasField("compile_job") for job in service.jobs) == 3  # embed once, block_00 twice


def test_compiled_parts_are_linked(service, folder, device_outputs):
    run(folder, "qnn_dlc", link="link")
    (link,) = (job.link_job for job in service.jobs if job.HasField("link_job"))
    assert [model.model_id for model in link.models.models] == ["m1", "m3"]
    assert (folder / "ai_hub" / "linked.bin").exists()


def test_tflite_is_profiled_without_compilation(service, folder, device_outputs):
    (folder / "tflite").mkdir()
    for part in PARTS:
        (folder / "tflite" / f"{part.name}.float32.tflite").write_bytes(b"tflite")
    with pytest.raises(UserError, match="cannot be compiled"):  # by the client
        qai_hub.submit_compile_job(str(folder / "tflite" / "embed.float32.tflite"), qai_hub.Device(DEVICE))
    for name, made in service.outputs.items():  # litert-torch names outputs so
        service.outputs[name] = {f"output_{i}": array for i, array in enumerate(made.values())}
    run(folder, "tflite")
    assert {job.WhichOneof("job") for job in service.jobs} == {"inference_job"}


def test_without_a_token_the_error_says_how_to_get_one(folder, tmp_path, monkeypatch):
    configure(monkeypatch, tmp_path / "none.ini")
    with pytest.raises(InputError) as error:
        run(folder)
    message = str(error.value)
    assert "\n" not in message and "https://aihub.qualcomm.com" in message and "qai-hub configure" in message
