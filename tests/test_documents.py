"""README.md and docs/: links lead somewhere, commands exist, and what is generated or copied agrees with the code.

`tests/test_run.py` runs the commands.
"""

import json
import re
import shlex

import jax
import pytest

from jsurgery import cli
from jsurgery.config import base, flatten
from jsurgery.load_config import load_config
from tests import documents
from tests.conftest import FULL_GRID
from tests.documents import COMMANDS, ELSEWHERE, LINES, PAGES, ROOT


def test_the_readme_is_short():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 120 and readme.count("![") == 1
    assert max(map(len, readme.splitlines())) <= 250


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=documents.name_of)
def test_links_lead_somewhere(page):
    assert documents.broken_links(page, documents.text_of(page)) == []


def test_control_broken_links_are_found():
    text = (
        "# A heading\n[a](no_such.md) [b](#a-heading) [c](#another) [d](docs/how_it_works.md#prefix-order) ![e](x.png)"
    )
    text += " [f](docs/how_it_works.md#no-such) [g](https://example.org/x)\n"
    broken = documents.broken_links(ROOT / "README.md", text)
    assert broken == ["no_such.md", "#another", "x.png", "docs/how_it_works.md#no-such"]


def test_every_page_is_found():
    assert len(PAGES) > 20 and len(COMMANDS) > 40
    indented = re.compile(r"^ {4}(jsurgery|make|pip) ", re.MULTILINE)
    assert not [page for page in PAGES if indented.search(page.read_text())], "commands stand in ```sh blocks"


@pytest.mark.parametrize("line", COMMANDS, ids=str)
def test_a_command_parses_and_its_fields_exist(line):
    options, overrides = cli.parse(line.arguments)
    if getattr(options, "config", None) is not None:
        load_config(options.config, overrides)


def test_control_a_misspelt_flag_or_field_is_found():
    for text in ("sample --modle=x --prompt=a", "surgery --workdir=x --config.finetune.stepz=3"):
        with pytest.raises(cli.InputError):
            options, overrides = cli.parse(shlex.split(text))
            load_config(options.config, overrides)


def test_other_programs_find_what_they_are_told():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in set(LINES) - set(COMMANDS):
        program, *rest = line.words
        if program == "make":
            assert rest[0] in targets, line
        elif program == "pip":
            extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
            assert re.search(r"jsurgery\[(\w+)\]", rest[-1])[1] in extras, line
        elif "pytest" in rest:
            assert all((ROOT / path).exists() for path in rest[rest.index("pytest") + 1 :]), line


def test_commands_that_are_run_elsewhere_are_run_there():
    ways = {documents.command_of(line.arguments) for line in COMMANDS if documents.way(line) == "elsewhere"}
    assert ways == ELSEWHERE.keys()
    for command, file in ELSEWHERE.items():
        text = (ROOT / "tests" / file).read_text()
        assert all(f'"{word}"' in text for word in command.split()), f"{file} does not run `jsurgery {command}`"


def test_the_example_in_python_works(monkeypatch):
    """Its shapes. (`export/test_torch_model.py` has the example in diffusers' pipeline.)"""
    pages = [(ROOT / page).read_text() for page in ("README.md", "docs/python.md")]
    code, same = (re.search(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[1] for page in pages)
    assert code == same
    monkeypatch.chdir(ROOT)
    names = {}
    jax.eval_shape(lambda: exec(code, names))
    assert names["velocity"].shape == names["latents"].shape == (1, 5, 24, 20, 8)


@pytest.mark.parametrize("page", PAGES, ids=documents.name_of)
def test_commands_within_sentences_exist(page):
    flags = {name: set(parser._option_string_actions) for name, parser in documents.parsers().items()}
    said = re.findall(r"`jsurgery ([^`]+)`", documents.BLOCK.sub("", page.read_text()).replace("\n", " "))
    for words in map(str.split, said):
        if words[0].isupper():  # `jsurgery COMMAND --help`
            continue
        command = documents.command_of(words)
        assert command in {*flags, "bench"}, words
        for word in words:
            flag = word.partition("=")[0]
            if flag.startswith("--") and not flag.startswith("--config."):
                assert flag in flags[command], words


def test_the_reference_has_what_help_prints():
    text = documents.text_of(ROOT / "docs" / "reference" / "commands.md")
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    for name, parser in documents.parsers().items():
        flags = set(re.findall(r"(--\w+)", parser.format_usage()))
        assert flags == set(re.findall(r"^\| \**`(--\w+)", sections[name], re.MULTILINE)), name
    assert len(sections) > 20 and "evaluate vbench" in sections and "bench attention" in sections


def test_the_reference_has_every_config_field_with_its_default():
    text = documents.text_of(ROOT / "docs" / "reference" / "config.md")
    for field, value in flatten(base()):
        shown = '`""`' if value == "" else f"`{value}`"
        row = re.search(rf"^\| `{re.escape(field)}` \| {re.escape(shown)} \| [^|]+ \| (.+) \|$", text, re.MULTILINE)
        assert row and len(row[1]) > 3, f"{field}: expected its default, and its meaning beside it in config.base()"
    assert '`traces`, `sampling` | "sampling": no traces' in text
    assert "| `model.lora` | `()` | files |" in text and "| `model.lora_scale` | `()` | numbers |" in text
    assert "`@v5e-8`" in text and "<!-- reference" not in text


@pytest.mark.parametrize("name", list(documents.module("draw_pictures").PICTURES))
def test_pictures_are_those_that_the_code_draws(name):
    drawn = documents.module("draw_pictures").PICTURES[name]()
    assert (ROOT / "docs" / "pictures" / f"{name}.svg").read_text() == drawn, "run `python docs/draw_pictures.py`"


def messages() -> str:
    """The source and the Makefile, with texts that go on in the next line joined, and a null for what is filled in."""
    source = "\n".join(path.read_text() for path in (ROOT / "jsurgery").rglob("*.py"))
    source = re.sub(r"\{[^{}\n]*\}", "\0", re.sub(r'"\n +f?"', "", source))
    return source + (ROOT / "Makefile").read_text().replace("$(PYTHON)", "\0")


def missing_pieces(line: str, texts: str) -> list[str]:
    """The parts of an error line, between the … that stand for what is filled in, that no message has."""
    return [piece for piece in map(str.strip, line.split("…")) if len(piece) > 1 and piece not in texts]


def test_troubleshooting_quotes_real_messages():
    texts = messages()
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    lines = [block.strip() for language, block in documents.BLOCK.findall(page) if language == "text"]
    assert len(lines) > 30
    assert {line: found for line in lines if (found := missing_pieces(line, texts))} == {}
    assert missing_pieces("config.prompts: …: no such fyle; expected one prompt", texts) == [
        ": no such fyle; expected one prompt"
    ]


def test_the_table_of_machines_is_what_a_dry_run_tells(tmp_path, monkeypatch):
    """The largest phase of each stage, and the hours; with FULL_GRID of every machine."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "machines.md").read_text()
    rows = re.findall(r"^\| `(wan[^`]+)`[^|]*\|[^|]*\| (.*) \|$", page, re.MULTILINE)
    assert len(rows) == 13
    for machine, cells in rows if FULL_GRID else rows[::4]:
        code = cli.main(
            ["surgery", f"--config={machine}", "--workdir=run", "--dry_run", "--disk=1e9", "--json=dry.json"]
        )
        *stages, hours = [cell.strip() for cell in f"{cells} ".split("|")]
        found = json.loads((tmp_path / "dry.json").read_text())
        for stage, cell in zip(("trace", "distill", "finetune", "evaluation"), stages, strict=True):
            phases = [row for row in found["phases"] if row["stage"] == stage]
            refused = [re.search(r"found ([\d.]+) GiB", row["error"])[1] for row in phases if "error" in row]
            bytes = max(row.get("bytes", 0) for row in phases)
            told = float(refused[0]) if refused else bytes / 2**30
            assert float(re.search(r"[\d.]+", cell)[0]) == pytest.approx(told, abs=0.051), (machine, stage)
            assert bool(refused) == ("does not fit" in cell)
        assert (code == 3) == ("does not fit" in cells)
        if hours:
            assert float(hours) == pytest.approx(sum(row["hours"] for row in found["hours"]), abs=0.051), machine


def test_the_table_of_low_rank_fine_tuning_is_what_a_dry_run_tells(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "machines.md").read_text()
    rows = re.findall(
        r"^\| LoRA, `(wan[^`]+)`[^|]*\| (?:\d+ x )?(\d+) \| ([\d.]+)[^|]*\| ([\d.]+) \|$", page, re.MULTILINE
    )
    command = re.search(r"^(jsurgery finetune .*lora_rank.*--dry_run)$", page, re.MULTILINE)
    assert len(rows) == 5 and command
    for machine, memory, gib, hours in rows if FULL_GRID else rows[::3]:
        words = [f"--config={machine}" if word.startswith("--config=") else word for word in command[1].split()[1:]]
        assert cli.main([*words, "--disk=1e9", "--json=dry.json"]) == 0
        found = json.loads((tmp_path / "dry.json").read_text())
        (phase,) = [row for row in found["phases"] if row["stage"] == "finetune"]
        assert float(gib) == pytest.approx(phase["bytes"] / 2**30, abs=0.051) and float(gib) < float(memory), machine
        assert float(hours) == pytest.approx(sum(row["hours"] for row in found["hours"]), abs=0.051), machine
