"""Readers on files changed at random: a small sample of `make fuzz`, and contents on which readers once failed."""

import pathlib
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings

from jsurgery.errors import InputError
from tests.faults import fuzz, fuzz_commands

# Half a second for each reader. Some load a model, and get fewer examples.
EXAMPLES = dict.fromkeys(("transformer", "hybrid", "vae", "text_encoder"), 15) | {"tokenizer": 40}
FEW = {"sample_numbers": 12, "convert_folder": 15}
briefly = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", fuzz.readers())
def test_changed_files_are_read_or_refused(name, tmp_path):
    reader = fuzz.readers()[name]()
    folder = fuzz.write_folder(reader, tmp_path)
    reader.read(folder)  # which imports what it needs
    assert fuzz.outcome(reader, folder) == "taken"
    for changed in fuzz.REGRESSIONS.get(name, []):
        fuzz.try_contents(reader, folder, reader.files | changed)
    counts = {"taken": 0, "refused": 0}

    @settings(briefly, max_examples=EXAMPLES.get(name, 60))
    @given(fuzz.contents(reader))
    def run_example(changed):
        counts[fuzz.try_contents(reader, folder, changed)] += 1

    run_example()
    assert counts["refused"], "no changed file was refused"


@pytest.mark.parametrize("name", fuzz_commands.READERS)
def test_what_people_give_to_a_command_is_read_or_refused(name, tmp_path, monkeypatch):
    reader = fuzz_commands.READERS[name]()
    folder = fuzz.write_folder(reader, tmp_path)
    monkeypatch.chdir(folder)
    reader.read(folder)  # which imports what it needs
    assert fuzz.outcome(reader, folder) == "taken"
    counts = {"taken": 0, "refused": 0}

    @settings(briefly, max_examples=FEW.get(name, 25))
    @given(fuzz_commands.contents(reader))
    def run_example(changed):
        counts[fuzz.try_contents(reader, folder, changed)] += 1

    run_example()
    assert counts["refused"] and counts["taken"] >= 0.2 * sum(counts.values()), counts


@settings(briefly, max_examples=25)
@given(fuzz_commands.output_names())
def test_outputs_of_any_name_are_written_or_refused(name):
    with tempfile.TemporaryDirectory() as folder:
        fuzz_commands.check_output(name, pathlib.Path(folder))


@settings(briefly, max_examples=15)
@given(fuzz_commands.video_rates())
def test_an_mp4_has_the_rate_that_is_asked_for(drawn):
    with tempfile.TemporaryDirectory() as folder:
        fuzz_commands.check_video_rate(drawn, pathlib.Path(folder))


@settings(briefly, max_examples=25)
@given(fuzz_commands.clip_folders())
def test_the_clips_of_a_folder_are_counted(drawn):
    fuzz_commands.check_clips(drawn)


@settings(briefly, max_examples=100)
@given(fuzz_commands.rates())
def test_a_gif_has_the_rate_of_its_video(drawn):
    fuzz_commands.check_rate(drawn)


@settings(briefly, max_examples=150)
@given(fuzz.configs())
def test_configs_are_valid_or_refused(overrides):
    fuzz.check_config(overrides)


@settings(briefly, max_examples=200)
@given(fuzz.shapes())
def test_shapes_are_refused_or_have_a_token_order(shape):
    fuzz.check_shape(shape)


def test_control_other_files_writes_and_exceptions_are_found(tmp_path):
    folder = fuzz.write_folder(fuzz.Reader({"a": b"1"}, ("a",), lambda _: None), tmp_path)
    with pytest.raises(AssertionError, match="opened"):
        fuzz.outcome(fuzz.Reader({}, (), lambda f: (f.parent / fuzz.SECRET).read_bytes()), folder)
    with pytest.raises(AssertionError, match="files changed"):
        fuzz.outcome(fuzz.Reader({}, (), lambda f: (f / "b").write_bytes(b"")), folder)
    with pytest.raises(ZeroDivisionError):
        fuzz.outcome(fuzz.Reader({}, (), lambda f: 1 / 0), folder)


def test_control_an_endless_reader_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "PATIENCE", 1)

    def loop_forever(_: pathlib.Path) -> None:
        while True:
            pass

    with pytest.raises(AssertionError, match="longer than 1 s"):
        fuzz.outcome(fuzz.Reader({}, (), loop_forever), fuzz.write_folder(fuzz.Reader({}, (), loop_forever), tmp_path))


def test_an_index_cannot_name_files_outside_its_folder(tmp_path):
    """An index may name only files of its folder, however the path is written."""
    reader = fuzz.readers()["index"]()
    folder = fuzz.write_folder(reader, tmp_path)
    index = folder / reader.changed[0]
    outside = tmp_path / fuzz.SECRET
    for name in (
        f"../{fuzz.SECRET}",
        str(outside),
        f"./../{fuzz.SECRET}",
        f"x/../../{fuzz.SECRET}",
        f"file://{outside}",
    ):
        index.write_bytes(fuzz.as_json({"weight_map": {"a.weight": name}}))
        with pytest.raises(InputError, match="in this folder"):
            reader.read(folder)


def test_a_vocabulary_that_is_not_utf_8_is_refused(tmp_path):
    """Found by fuzzing: SentencePiece returns pieces without checking that they are UTF-8."""
    reader = fuzz.readers()["tokenizer"]()
    folder = fuzz.write_folder(reader, tmp_path)
    changed = reader.files["spiece.model"].replace(b"<pad>", b"\xbcpad>")
    assert fuzz.try_contents(reader, folder, {"spiece.model": changed}) == "refused"
