"""`jsurgery push` to a local imitation of the Hub: the uploaded files, the model card, and refused models."""

import base64
import http.server
import json
import pathlib
import re
import shutil
import threading

import diffusers
import huggingface_hub
import pytest
import yaml

from jsurgery.attention.feature_maps import FeatureMapConfig
from jsurgery.attention.hybrid import HybridConfig
from jsurgery.cli import main
from jsurgery.export.torch_model import HybridWanTransformer3DModel
from jsurgery.io.results import format_ranges
from jsurgery.report.model_card import feature_maps, model_card
from jsurgery.report.push import check_folder
from jsurgery.surgery.operate import save_model
from jsurgery.wan.checkpoint import read_config
from jsurgery.wan.model_folder import model_path

TOKEN = "hf_not_to_be_told"
RATES = (2, 2, "linear", 1, 2, 8)
WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hub's API that an upload uses. `asked` holds (path, token, parsed body) of each request."""

    asked: list
    status = 200

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        parsed = [json.loads(line) for line in body.splitlines()]
        self.asked.append((self.path, self.headers["Authorization"], parsed))
        answer: dict = {"errors": [], "warnings": []}
        if self.path.endswith("/repos/create"):
            answer = {"url": f"{huggingface_hub.constants.ENDPOINT}/{parsed[0]['organization']}/{parsed[0]['name']}"}
        elif "/preupload/" in self.path:
            names = [file["path"] for file in parsed[0]["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        elif "/commit/" in self.path:
            answer = {"commitOid": "0" * 40, "commitUrl": f"{huggingface_hub.constants.ENDPOINT}/org/name/commit/0"}
        content = json.dumps(answer).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def asked(monkeypatch):
    """The requests that the local Hub has received."""
    monkeypatch.setattr(Hub, "asked", [], raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield Hub.asked
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def workdir(random_transformer, tmp_path_factory) -> pathlib.Path:
    """The workdir of a run on the bundled model: the final model, with random feature maps, its plan and evaluation."""
    workdir = tmp_path_factory.mktemp("run")
    teacher = read_config(model_path("tiny_wan") / "transformer")
    config = type(teacher)(**{**vars(teacher), "hybrid": HybridConfig(RATES)})
    assert len(RATES) == config.num_layers
    save_model(random_transformer(config), workdir / "model", "tiny_wan")
    plan = {"rates": RATES, "budget": "4R2", "selection": "heterogeneous", "share_of_teacher": 0.6543}
    total = {"mean": 0.6, "low": 0.4, "high": 0.8, "upper": 1.0, "chance": 0.2}  # 0.5, 0.25 to 0.75 on the scale
    models = {
        "teacher": {"validation_loss": 0.25, "latent_rmse": [0.0, 0.0], "score": {"total": total}},
        "finetuned": {"validation_loss": 0.3125, "latent_rmse": [0.5, 0.5], "score": {"total": total}},
    }
    config = {"prompts": "sprites", "video.frames": 17, "video.height": 192, "video.width": 160}
    for name, content in {
        "plan/plan.json": plan,
        "evaluation/evaluation.json": {"prompts": ["a", "b"], "models": models},
        "config.json": config,
    }.items():
        (workdir / name).parent.mkdir(exist_ok=True)
        (workdir / name).write_text(json.dumps(content))
    return workdir


def committed(asked) -> dict[str, bytes]:
    """The files of the only commit."""
    (lines,) = [body for path, _, body in asked if "/commit/" in path]
    files = [line["value"] for line in lines if line["key"] == "file"]
    return {file["path"]: base64.b64decode(file["content"]) for file in files}


def test_a_model_is_uploaded_in_one_commit(workdir, asked, tmp_path, capsys):
    model = shutil.copytree(workdir / "model", tmp_path / "model")
    for name in ("stage.json", "notes.txt", ".cache/huggingface/download.json", "optimizer.npy"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("{}")
    assert main(["push", f"--model={model}", "--repo=org/name", "--private", "--revision=trial"]) == 0
    output = capsys.readouterr()
    assert output.out.strip().endswith("/org/name/tree/trial") and TOKEN not in output.out + output.err
    files = committed(asked)
    assert files.keys() == {"README.md", "config.json", "hashes.json", "hybrid_wan.safetensors"}
    assert all(files[name] == (model / name).read_bytes() for name in files.keys() - {"README.md"})
    assert not (model / "README.md").exists()
    created, branch = (body[0] for _, _, body in asked[:2])
    assert (created["organization"], created["name"], created["visibility"]) == ("org", "name", "private")
    assert asked[1][0] == "/api/models/org/name/branch/trial" and branch == {}
    assert any("/commit/trial" in path for path, _, _ in asked)
    assert {token for _, token, _ in asked} == {f"Bearer {TOKEN}"}


def test_a_pipeline_keeps_its_own_card(tiny_pipeline, asked, tmp_path):
    model = shutil.copytree(tiny_pipeline, tmp_path / "model")
    (model / "README.md").write_text("# Mine\n")
    assert main(["push", f"--model={model}", "--repo=org/name"]) == 0
    files = committed(asked)
    assert files["README.md"] == b"# Mine\n"
    assert files.keys() == {str(p.relative_to(model)) for p in model.rglob("*") if p.is_file()}
    assert {"tokenizer/spiece.model", "vae/config.json", "model_index.json"} < files.keys()


def test_the_card_of_a_hybrid_shows_plan_and_measurements(workdir, tmp_path):
    card = model_card(workdir / "model", check_folder(workdir / "model"), "org/name")
    _, header, text = card.split("---\n", 2)
    fields = yaml.safe_load(header)
    assert (fields["library_name"], fields["license"]) == ("jsurgery", "apache-2.0") and "base_model" not in fields
    assert "hybrid-attention" in fields["tags"] and "# name\n" in text
    for line in (
        "| 1 | 3 | softmax |",
        "| 2 | 0–1, 4 | hybrid |",
        "| 8 | 5 | hybrid |",
        "| linear | 2 | linear |",
        "| original | 0.000 (0.000 to 0.000) | 0.2500 | 0.500 (0.250 to 0.750) |",
        "| fine-tuned (this model) | 0.500 (0.500 to 0.500) | 0.3125 | 0.500 (0.250 to 0.750) |",
    ):
        assert line + "\n" in text, text
    assert "65.4 %" in text and "2 prompts of 17 frames at 192x160" in text and "sprites" in text
    assert "5 of its blocks" in text and str(workdir.parent) not in text

    alone = shutil.copytree(workdir / "model", tmp_path / "alone" / "model")
    file = alone / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_pipeline": f"{WAN}@0fad780"}))
    (alone / "hashes.json").unlink()
    text = model_card(alone, check_folder(alone), "org/name")
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == WAN
    assert "## Measured" not in text and f'from_pretrained("{WAN}", revision="0fad780", transformer=None)' in text


def test_the_card_names_the_feature_maps(workdir):
    hedgehog = HybridConfig(RATES, feature_map=FeatureMapConfig(1, 1, "hedgehog"))
    network = check_folder(workdir / "model")
    cards = [
        model_card(workdir / "model", type(network)(**{**vars(network), "hybrid": hybrid}), "org/name")
        for hybrid in (hedgehog, HybridConfig(RATES))
    ]
    assert "feature maps: HedgeHog" in cards[0] and "polynomial" not in cards[0]
    assert "feature maps: polynomials of degree 2 over 2 layers, relu." in cards[1] and "HedgeHog" not in cards[1]
    assert feature_maps(HybridConfig((1, 2), linear_branch=False)) == "none"


def test_the_code_on_the_card_runs(workdir, monkeypatch):
    card = model_card(workdir / "model", check_folder(workdir / "model"), "org/name")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(workdir / "model"))
    ours, theirs = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    exec(ours, names)
    assert names["pipeline"].transformer.config.hybrid.rates == RATES
    exec(theirs, names)
    assert isinstance(names["pipeline"], diffusers.WanPipeline)
    assert isinstance(names["pipeline"].transformer, HybridWanTransformer3DModel)


def test_the_card_of_a_plain_pipeline(tiny_pipeline):
    card = model_card(tiny_pipeline, check_folder(tiny_pipeline), "org/name")
    assert 'WanPipeline.from_pretrained("org/name")' in card and "## Plan" not in card and "torch_model" not in card


def add_a_pickle(model):
    (model / "vae" / "old.bin").write_bytes(b"\x80")


def truncate(model):
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def remove_weights(model):
    (model / "text_encoder" / "model.safetensors").unlink()


def raise_the_number_of_blocks(model):
    file = model / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_layers": 3}))
    (model / "transformer" / "hashes.json").unlink()


def keep_the_transformer_only(model):
    shutil.copytree(model / "transformer", model / "alone")
    file = model / "alone" / "config.json"
    fields = json.loads(file.read_text()) | {"base_pipeline": str(model)}
    for part in model.iterdir():
        if part.name != "alone":
            shutil.rmtree(part) if part.is_dir() else part.unlink()
    for part in (model / "alone").iterdir():
        part.rename(model / part.name)
    (model / "config.json").write_text(json.dumps(fields))
    (model / "hashes.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "repo", "parts"),
    [
        (add_a_pickle, "org/name", ["pickles", "old.bin"]),
        (truncate, "org/name", ["vae", "truncated"]),
        (remove_weights, "org/name", ["text_encoder", "missing"]),
        (raise_the_number_of_blocks, "org/name", ["transformer", "missing blocks.2."]),
        (shutil.rmtree, "org/name", ["--model", "no such folder on this machine"]),
        (lambda model: (model / "transformer" / "config.json").unlink(), "org/name", ["jsurgery convert"]),
        (keep_the_transformer_only, "org/name", ["base_pipeline", "expected a repository"]),
        (lambda model: None, "name", ["--repo=name", "ORG/NAME"]),
        (lambda model: None, "org/na me", ["--repo=org/na me"]),
    ],
)
def test_bad_models_are_refused_before_any_request(spoil, repo, parts, tiny_pipeline, asked, tmp_path, capsys):
    model = shutil.copytree(tiny_pipeline, tmp_path / "model")
    spoil(model)
    assert main(["push", f"--model={model}", f"--repo={repo}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in parts) and asked == [], line


def test_a_missing_token_is_refused(tiny_pipeline, asked, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert main(["push", f"--model={tiny_pipeline}", "--repo=org/name"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no token" in line and "hf auth login" in line and asked == []


def test_errors_of_the_hub_do_not_reveal_the_token(tiny_pipeline, asked, monkeypatch, capsys):
    monkeypatch.setattr(Hub, "status", 403)
    assert main(["push", f"--model={tiny_pipeline}", "--repo=org/name"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--repo=org/name: refused: " in line and "403" in line and TOKEN not in line
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", f"--model={tiny_pipeline}", "--repo=org/name"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--repo=org/name: the Hub is out of reach" in line and TOKEN not in line


@pytest.mark.parametrize(
    ("blocks", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5], "0–2, 5"), ([1, 2, 4, 5], "1–2, 4–5")]
)
def test_ranges_of_blocks_are_shortened(blocks, text):
    assert format_ranges(blocks, dash="–", separator=", ") == text
