"""Declared tables of arms: the work that arms share, stored measurements and written tables, without real models."""

import collections
import dataclasses
import json
import pathlib
import types
import zlib

import numpy as np
import pytest
from etils import epath

from jsurgery.ablate import measures as measures_module
from jsurgery.ablate import run_tables as tables_module
from jsurgery.ablate import seed_run as seed_module
from jsurgery.ablate.run_arms import items_over_steps, run_arms
from jsurgery.ablate.run_tables import RUN, RUN_APART, run_tables, title
from jsurgery.ablate.seed_run import SeedRun, arm_config, measured_steps, prompt_ranges
from jsurgery.ablate.tables import APART, ARM_TABLES, MAPS, OTHER_TABLES, TABLES, Arm, scaled
from jsurgery.ablate.write_table import grids, markdown
from jsurgery.cli import main
from jsurgery.config import base, flatten
from jsurgery.errors import Diverged, InputError
from jsurgery.evaluate import sprites_score
from jsurgery.load_config import load_config

BLOCKS = 6
FIELDS = {field for field, _ in flatten(base())}
MEASURES = {"attention", "velocity", "samples", "shares"}


@pytest.fixture(scope="module")
def config():
    return load_config("tiny_ablations")


@pytest.mark.parametrize(
    "blocks, layers, expected",
    [("20R8", 6, "4R8"), ("25R4", 6, "5R4"), ("15Rlinear", 30, "15Rlinear"), ("15R2", 2, "1R2"), ("10R8", 1, "1R8")],
)
def test_budgets_scale_with_depth(blocks, layers, expected):
    assert scaled(blocks, layers) == expected


@pytest.mark.parametrize("name", ARM_TABLES)
def test_declared_arms_are_valid_and_distinct(name, config):
    table = ARM_TABLES[name]
    names = [arm.name for arm in table.arms]
    assert len(set(names)) == len(names) > 1 and set(table.measures) <= MEASURES
    assert all(a in names and b in names and a != b for a, b in table.contrasts)
    kinds = [[arm.blocks, arm.selection, arm.maps, arm.finetuned, dict(arm.changes)] for arm in table.arms]
    assert all(kind not in kinds[:number] for number, kind in enumerate(kinds))
    for arm in table.arms:
        assert arm.maps in MAPS and set(arm.changes) <= FIELDS
        assert all(field.startswith(("hybrid.", "distill.", "plan.errors")) for field in arm.changes)
        changed = arm_config(config, arm, BLOCKS)  # validates
        assert changed.plan.budget == scaled(arm.blocks, BLOCKS) and changed.seed == config.seed
        for field, value in arm.changes.items():
            assert dict(flatten(changed))[field] == value != dict(flatten(config))[field]
    assert not table.arms[0].finetuned or measured_steps(config) == (20, 40)


def test_every_table_has_a_title_and_a_function():
    assert set(RUN) == set(OTHER_TABLES) and set(TABLES) == {*OTHER_TABLES, *ARM_TABLES}
    assert set(RUN_APART) == set(APART) and not set(APART) & set(TABLES)
    assert all(title(name) for name in (*TABLES, *APART))


def test_results_document_has_a_section_for_every_table():
    document = (pathlib.Path(__file__).parents[2] / "docs" / "results.md").read_text()
    for name in (*TABLES, *APART, "evidence"):
        before, _, after = document.partition(f"<!-- begin {name} -->")
        assert after.count(f"<!-- end {name} -->") == 1 and f"<!-- end {name} -->" not in before


def test_numbers_of_the_paper_are_consistent_with_its_text():
    """For example, heterogeneous plans are better at every budget of Table 5."""
    totals = {arm.name: arm.paper["Total"] for arm in ARM_TABLES["budgets"].arms if arm.paper}
    printed = [pair for pair in ARM_TABLES["budgets"].contrasts if totals.keys() >= set(pair)]
    assert len(printed) == 4 and all(totals[a] > totals[b] for a, b in printed)
    loss = {arm.name: arm.paper for arm in ARM_TABLES["loss"].arms}
    assert loss["15R8, attention loss"]["Total"] > loss["15R8, value loss"]["Total"]  # a known error of the paper
    assert all(loss[a]["Dynamic degree"] > loss[b]["Dynamic degree"] for a, b in ARM_TABLES["loss"].contrasts)
    assert [arm.paper["GFLOP"] for arm in ARM_TABLES["feature_map"].arms] == [387, 70, 60, 30]


@pytest.fixture
def seeds(config, tmp_path, monkeypatch):
    """(a function that makes SeedRuns with fake work, the count of each kind of work)."""
    count = {"trace": 0, "latents": 0, "distill": 0, "finetune": 0, "sample": 0}

    def counted(kind, work):
        def run(*arguments, **_):
            count[kind] += 1
            return work(*arguments)

        return run

    def distill(config, teacher, traces, folder):
        rates = list(config.hybrid.rates)
        rng = np.random.default_rng(zlib.crc32(str(flatten(config.hybrid)).encode()))
        table = np.sort(rng.random((BLOCKS, len(rates))), axis=1).tolist()
        names = ("errors", "initial_errors", "softmax_share", "teacher_softmax_share", "velocity_errors")
        (folder / "errors.json").write_text(json.dumps({"rates": rates, **{name: table for name in names}}))

    def save_model(model, folder, base):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    def measure_models(config, pipeline, models, latents, folder, shares):
        bounds = [dict.fromkeys(sprites_score.DIMENSIONS, bound) for bound in (1.0, 0.5)]
        (folder / "reference.json").write_text(json.dumps(bounds))
        for name, load in models.items():
            if (file := folder / f"{name}.json").exists():
                continue
            load()
            count["sample"] += 1
            share = shares.get(name, range(config.evaluate.prompts))
            clips = {name: [number / config.evaluate.prompts for number in share] for name in sprites_score.DIMENSIONS}
            result = {"validation_loss": 1.0, "latent_rmse": [0.5] * len(share), "per_clip": clips}
            file.write_text(json.dumps(result))

    monkeypatch.setattr(seed_module, "distill", counted("distill", distill))
    monkeypatch.setattr(seed_module, "finetune", counted("finetune", lambda *_: None))
    monkeypatch.setattr(seed_module, "save_model", save_model)
    monkeypatch.setattr(measures_module, "measure_models", measure_models)
    for name in ("load_maps", "operate", "load_transformer"):
        monkeypatch.setattr(seed_module, name, lambda *_, **__: None)
    monkeypatch.setattr(measures_module, "velocity_error", lambda seed, model: {"velocity_error": [0.25, 0.5]})
    monkeypatch.setattr(measures_module, "branch_share", lambda seed, model: {"softmax_share": [0.5] * BLOCKS})

    def make(number=0, workdir="run"):
        made = SeedRun(config, epath.Path(tmp_path / workdir), number, tmp_path / "measurements")
        vars(made.run)["pipeline"] = types.SimpleNamespace(transformer=None)
        made.run.run_stage = lambda name: made.run.stages[name].run(counted(name, lambda: None))
        return made

    return make, count


def test_arms_share_stages_and_models(seeds):
    make, count = seeds
    made = make()
    for name in ("front", "distillation", "budgets", "loss", "linear_branch", "shares"):
        run_arms(ARM_TABLES[name], [made])
    assert count["trace"] == count["latents"] == 1 and count["distill"] == 2  # the value loss and the attention loss
    finetuned = {path.name for path in (made.run.workdir).glob("finetune_*")}
    # 9 of Fig. 6; 3: all-linear distilled and not, 20R8 not distilled; 2 of the attention loss; plans of Table 5 that
    # are not homogeneous; 2 without a linear branch; 3: 30 blocks at three rates.
    plans = {tuple(made.operation(arm).plan["rates"]) for arm in ARM_TABLES["budgets"].arms}
    homogeneous = {tuple(made.operation(arm).plan["rates"]) for arm in ARM_TABLES["front"].arms}
    assert len(finetuned) == 9 + 3 + 2 + len(plans - homogeneous) + 2 + 3
    assert count["finetune"] == 2 * len(finetuned)
    before = dict(count)
    again = make()
    for name in ("loss", "shares", "front"):
        run_arms(ARM_TABLES[name], [again])
    assert count == before


def test_stored_measurements_replace_work(seeds):
    """In another workdir with the same measurements, only the work of new arms is done."""
    make, count = seeds
    tables = [run_arms(ARM_TABLES[name], [make()]) for name in ("loss", "distillation")]
    before = dict(count)
    other = make(workdir="other")
    assert [run_arms(ARM_TABLES[name], [other]) for name in ("loss", "distillation")] == tables
    assert count == before and not other.run.workdir.exists()
    run_arms(ARM_TABLES["linear_branch"], [other])
    made = {kind: count[kind] - before[kind] for kind in count}
    # 20R8 and 30R8 without a linear branch, which needs no maps, and 30R8 with it: one distillation.
    assert made == {"trace": 1, "latents": 1, "distill": 1, "finetune": 6, "sample": 6}


def test_each_measured_stage_is_stored_as_a_line(seeds):
    make, _ = seeds
    seed = make()
    run_arms(ARM_TABLES["loss"], [seed])
    lines = [json.loads(line) for line in seed.measurements.path.read_text().splitlines()]
    assert all(list(line) == ["stage", "made_with", "files"] for line in lines)
    kinds = collections.Counter(line["stage"].rpartition("_")[0] for line in lines)
    assert kinds == {"errors": 2, "plan": 4, "velocity": 1, "evaluation": 1}
    (evaluation,) = (line["files"] for line in lines if line["stage"].startswith("evaluation"))
    assert len(evaluation) == len({"teacher.json", "reference.json"}) + 2 * len(ARM_TABLES["loss"].arms)
    assert [file.name for file in seed.measurements.path.parent.iterdir()] == ["seed0.jsonl"]


def test_an_interrupted_run_keeps_its_measurements(seeds, monkeypatch):
    make, count = seeds
    measure_models, calls = measures_module.measure_models, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        measure_models(*arguments)

    monkeypatch.setattr(measures_module, "measure_models", killed)
    with pytest.raises(KeyboardInterrupt):
        run_arms(ARM_TABLES["loss"], [make()])
    assert count["sample"] == 3  # the teacher and two models
    run_arms(ARM_TABLES["loss"], [make(workdir="other")])  # has only the measurements
    assert count["sample"] == 1 + 2 * len(ARM_TABLES["loss"].arms)


def test_concurrent_runs_of_a_seed_keep_the_lines_of_both(seeds):
    make, _ = seeds
    first, second = make(workdir="first"), make(workdir="second")
    for arm, seed in zip(ARM_TABLES["loss"].arms[:2], (first, second), strict=True):
        seed.operation(arm)  # each has read the file before the other writes
    count = len(first.measurements.path.read_text().splitlines())
    assert count == 4
    first.operation(ARM_TABLES["loss"].arms[2])
    assert len(first.measurements.path.read_text().splitlines()) == count + 1


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda lines: [lines[0], lines[1][:-20]], "line 2: damaged or cut"),
        (lambda lines: [lines[0].replace('"made_with"', '"made"'), lines[1]], "line 1: expected an object of stage, "),
        (lambda lines: [lines[0], "7"], "line 2: expected an object of stage, made_with, files, found 7"),
        (lambda lines: [lines[0], lines[0]], "line 2: expected one line for each stage, found a second of errors_"),
        (lambda lines: [], "line 1: damaged or cut"),
    ],
)
def test_a_damaged_line_is_named(seeds, damage, message, tmp_path, capsys):
    seed = seeds[0]()
    seed.operation(Arm("20R8"))
    path = seed.measurements.path
    path.write_text("\n".join(damage(path.read_text().splitlines())))
    command = ["ablate", "--table=loss", "--seeds=1", "--config=tiny_ablations", f"--workdir={tmp_path / 'run'}"]
    assert main([*command, f"--measurements={path.parent}"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{path}: {message}" in error


def test_measurements_made_with_other_settings_are_refused(seeds):
    make, _ = seeds
    seed = make()
    seed.operation(Arm("20R8"))
    path = seed.measurements.path
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["made_with"] |= {"plan.errors": "attention"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        InputError, match=r"seed0.jsonl: errors_\w+: made with another config: plan.errors was 'attention'"
    ):
        make().operation(Arm("20R8"))


def test_tables_of_the_document_follow_from_its_measurements(tmp_path):
    """As by `make tables`; no model is run."""
    docs = pathlib.Path(__file__).parents[2] / "docs"
    document = tmp_path / "results.md"
    document.write_text("<!-- begin loss -->\n<!-- end loss -->\n")
    command = ["ablate", "--table=loss", "--config=tiny_ablations", f"--workdir={tmp_path / 'run'}"]
    assert main([*command, f"--measurements={docs / 'ablations'}", f"--results={document}"]) == 0
    assert document.read_text().strip() in (docs / "results.md").read_text()
    assert sorted(path.suffix for path in (tmp_path / "run").iterdir()) == [".html", ".json", ".md"]


def test_the_measured_steps_of_an_arm_divide_the_prompts(seeds, config):
    seed = seeds[0]()
    models = seed.models(seed.operation(ARM_TABLES["loss"].arms[0]))
    prompts = {step: model.prompts for step, model in models.items()}
    steps = {step: {"total": list(map(float, share)), "velocity_error": [step]} for step, share in prompts.items()}
    assert items_over_steps(steps, "total").tolist() == list(range(config.evaluate.prompts))
    assert items_over_steps(steps, "velocity_error").tolist() == [30]
    assert [list(share) for share in prompt_ranges(5, 2)] == [[0, 1], [2, 3, 4]]


def test_tables_share_distillations_of_equal_maps(seeds):
    make, count = seeds
    made = make()
    for table in ARM_TABLES.values():
        for arm in table.arms:
            made.operation(arm)
    # As configured; the attention loss; three more maps of Table 7; max; staggered; HedgeHog; nine more kinds of phi.
    assert count["distill"] == 1 + 1 + 3 + 1 + 1 + 1 + 9


@pytest.mark.parametrize("name", ARM_TABLES)
def test_tables_have_rows_of_arms_columns_of_measures_and_numbers_of_the_paper(name, seeds):
    table = ARM_TABLES[name]
    found = run_arms(table, [seeds[0](0), seeds[0](1)])
    arms = [arm.name for arm in table.arms]
    assert list(found["rows"]) == (["teacher", *arms] if "samples" in table.measures else arms)
    for arm in arms:
        row = found["rows"][arm]
        assert ("total" in row) == ("samples" in table.measures)
        assert ("velocity_error" in row) == ("velocity" in table.measures)
        assert ("error R8" in row) == ("attention" in table.measures)
        assert row["velocity_error"] == (0.375, 0.0)
    assert list(found["contrasts"]) == [f"{a} − {b}" for a, b in table.contrasts]
    for contrast in found["contrasts"].values():
        assert contrast["velocity_error"]["difference"] == 0 and contrast["velocity_error"]["items"] == 4
    (_, head, body), *rest = grids({"table": name, "subject": "tiny model", **found})
    assert head[0] == "tiny model" and [row[0] for row in body] == list(found["rows"])
    assert all(len(row) == len(head) for row in body) and len(rest) == bool(table.contrasts)
    printed = [name for name in head if name.startswith("paper: ")]
    assert printed == [f"paper: {c}" for c in (table.arms[0].paper if table.arms[0].paper else {})]
    assert "2 seeds" in markdown({"table": name, "subject": "tiny model", **found})


def test_diverged_arms_are_noted_and_not_repeated(seeds, monkeypatch):
    """An arm that diverges on one of two seeds is left out of the table and its comparisons."""
    make, count = seeds
    distill = seed_module.distill

    def diverges(config, *arguments):
        if config.hybrid.activation == "exp" and config.seed == 1:
            count["distill"] += 1
            raise Diverged("distill: step 1: loss inf")
        distill(config, *arguments)

    monkeypatch.setattr(seed_module, "distill", diverges)
    table = ARM_TABLES["phi"]
    found = run_arms(table, [make(0), make(1)])
    arms = [arm.name for arm in table.arms if "exp" not in arm.name]
    assert list(found["rows"]) == arms and len(found["contrasts"]) == len(arms) - 1 == len(table.contrasts) - 2
    note = "Without exp, raw, whose distillation diverged on seed 1: distill: step 1: loss inf."
    assert len(found["notes"]) == 2 and note in markdown({"table": "phi", "subject": "tiny model", **found})
    before = dict(count)
    assert run_arms(table, [make(0, "other"), make(1, "other")]) == found and count == before

    tolerant = make(1)
    tolerant.config = seed_module.changed(tolerant.config, {"max_skipped": 3})
    with pytest.raises(Diverged):
        tolerant.operation(next(arm for arm in table.arms if "exp" in arm.name))
    assert count["distill"] == before["distill"] + 1  # repeated, as another max_skipped may help

    only = dataclasses.replace(table, arms=tuple(arm for arm in table.arms if "exp" in arm.name))
    with pytest.raises(Diverged, match="loss inf"):
        run_arms(only, [make(1)])


def test_attention_flops_of_arms_are_those_of_their_plans(seeds):
    rows = run_arms(ARM_TABLES["front"], [seeds[0]()])["rows"]
    share = {arm: row["attention_flops"] for arm, row in rows.items() if arm != "teacher"}
    assert share["25R8"] < share["20R8"] < share["15R8"] < share["15R2"] < 1
    branch = run_arms(ARM_TABLES["linear_branch"], [seeds[0]()])["rows"]
    bare, whole = (
        branch[f"20R8, {text}"]["attention_flops"] for text in ("softmax tokens alone", "with the linear branch")
    )
    assert bare == pytest.approx((2 + 4 / 8) / 6) and bare < whole == share["20R8"]


def test_bad_configs_for_ablations_are_refused(config):
    for change, message in (
        ({"finetune.schedule": "cosine"}, "config.finetune.schedule: ablations also measure before the last step"),
        ({"finetune.steps": 0}, "config.finetune.steps: ablations fine-tune"),
    ):
        with pytest.raises(InputError, match=message):
            measured_steps(seed_module.changed(config, change))
    with pytest.raises(InputError, match="rate 4 is not among config.hybrid.rates"):
        arm_config(
            seed_module.changed(config, {"hybrid.rates": (2, 8), "plan.rates": (1, 2)}), Arm("a", "20R4"), BLOCKS
        )
    with pytest.raises(InputError, match="config.hybrid.degree: HedgeHog has 1, found 2"):
        seed_module.changed(config, {"hybrid.activation": "hedgehog"})


def test_shards_divide_the_seeds(config, tmp_path, monkeypatch):
    measured = []

    class Numbered:
        def __init__(self, config, folder, number, measurements):
            self.number = number

    monkeypatch.setattr(tables_module, "SeedRun", Numbered)
    monkeypatch.setitem(RUN, "errors", lambda seeds: measured.append([seed.number for seed in seeds]))
    for shard in ((0, 2), (1, 2)):
        run_tables(config, "errors", str(tmp_path), 3, shard=shard)
    assert measured == [[0, 2], [1]] and not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="--shard=3/4: expected at most one for each of 3 seeds"):
        run_tables(config, "errors", str(tmp_path), 3, shard=(3, 4))
    with pytest.raises(InputError, match="--shard: .* found evidence"):
        run_tables(config, "evidence", str(tmp_path), 3, shard=(0, 2))


def test_a_missing_document_is_refused_before_any_work(config, tmp_path):
    with pytest.raises(InputError, match="--results=.*none.md: no such file"):
        run_tables(config, "errors", str(tmp_path / "run"), 1, str(tmp_path / "none.md"))
    assert not (tmp_path / "run").exists()
