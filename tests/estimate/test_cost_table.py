import json
import pathlib
import re

import pytest
from etils import epath

from jsurgery.cli import main
from jsurgery.report.cost_page import write_front_page

RATES = ["1", "2", "4", "8", "linear"]


def cost(tmp_path, *arguments):
    """The JSON report of `jsurgery cost`."""
    assert main(["cost", *arguments, f"--json={tmp_path / 'cost.json'}"]) == 0
    return json.loads((tmp_path / "cost.json").read_text())


def tera(flops):
    return round(flops / 1e12, 3)


def test_costs_of_wan_1_3b_are_those_of_the_paper(tmp_path, capsys):
    found = cost(tmp_path, "--config=configs/wan_1_3b.py", "--plan=15R2")
    assert (found["tokens"], found["parameters"], found["blocks"]) == (32760, 1_418_996_800, 30)
    softmax = found["block"]["1"]["flops"]
    parts = ("core", "projections", "cross_attention", "ffn", "total")
    assert [tera(softmax[part]) for part in parts] == [6.594, 0.618, 0.417, 1.803, 9.433]
    assert round(100 * found["self_attention_share"], 2) == 76.46
    saved = found["plan"]["saved"]
    assert round(100 * saved["core"], 1) == 23.8 and round(100 * saved["blocks"], 1) == 16.7
    by_rate = {rate: [tera(row["core"][rate]) for row in found["durations"]] for rate in RATES}
    assert by_rate["1"] == [0.975, 1.495, 2.126, 2.867]
    assert by_rate["8"] == [0.196, 0.279, 0.376, 0.486]
    assert by_rate["linear"] == [0.079, 0.098, 0.117, 0.136]
    assert [row["tokens"] for row in found["durations"]] == [12600, 15600, 18600, 21600]
    out = capsys.readouterr().out
    assert "32,760 tokens, 30 blocks, 1,418,996,800 parameters" in out and "6,593.8" in out and "23.8 %" in out


def test_claims_of_the_paper_are_counted(tmp_path):
    claims = {row["claim"]: row for row in cost(tmp_path, "--config=wan_14b")["paper"]}
    table_7 = [row for claim, row in claims.items() if claim.startswith("Table 7")]
    assert [row["counted"] for row in table_7] == [
        "1.2 M, 29.9 GFLOP",
        "2.4 M, 59.7 GFLOP",
        "3.9 M, 99.4 GFLOP",
        "15.4 M, 387.1 GFLOP",
    ]
    assert [bool(row["note"]) for row in table_7] == [False, False, True, False]
    counted = " ".join(row["counted"] for row in claims.values())
    for number in ("76.5 %", "39.9 %", "39.7 %", "39.4 %", "23.8 %", "16.7 %", "5.66x", "3.41x", "1.88x"):
        assert number in counted


def test_results_md_has_the_table_of_claims(tmp_path):
    document = (pathlib.Path(__file__).parents[2] / "docs" / "results.md").read_text()
    for row in cost(tmp_path, "--config=wan_1_3b")["paper"]:
        assert f"| {' | '.join(row.values())} |" in document


def test_costs_depend_on_video_size_plan_and_model(tmp_path):
    found = cost(tmp_path, "--config=wan_1_3b", "--height=320", "--width=480", "--plan=15R8")
    assert found["tokens"] == 12600
    assert round(100 * found["plan"]["saved"]["core"], 1) == 39.9
    conversions = found["conversions"]["8"]
    assert len(conversions) == 31 and conversions[0] == 1
    assert conversions[15] == pytest.approx(1 - found["plan"]["saved"]["network"])
    assert cost(tmp_path, "--config=wan_14b")["parameters"] == 14_288_491_584


def test_hedgehog_costs_less_than_a_polynomial_map(tmp_path):
    polynomial = cost(tmp_path, "--config=wan_1_3b")
    hedgehog = cost(tmp_path, "--config=wan_1_3b", "--feature_map=hedgehog")
    assert hedgehog["feature_map"]["kind"] == "hedgehog"
    assert hedgehog["feature_map"]["parameters"] == 12 * 128 * 128
    assert hedgehog["block"]["8"]["flops"]["core"] < polynomial["block"]["8"]["flops"]["core"]
    assert hedgehog["block"]["1"] == polynomial["block"]["1"]


def test_costs_of_a_model_folder_with_a_plan_file(tiny_pipeline, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"rates": [1, 8]}))
    size = ["--frames=5", "--height=64", "--width=48"]
    found = cost(tmp_path, f"--config.model.path={tiny_pipeline}", *size, f"--plan={plan}")
    assert (found["tokens"], found["blocks"]) == (24, 2)
    assert found["plan"]["forward"]["parameters"] > found["parameters"] == found["forward"]["parameters"]
    total = found["embeddings_and_head"]["flops"] + sum(found["block"][rate]["flops"]["total"] for rate in ("1", "8"))
    assert found["plan"]["forward"]["flops"] == total
    out = capsys.readouterr().out
    assert "kFLOP of one block" in out and f"{found['block']['8']['flops']['total'] / 1e3:,.1f}" in out


def test_the_page_has_all_charts_and_loads_no_other_file(tmp_path):
    plans = [{"cost": c, "share_of_teacher": c / 9, "error": e, "rates": [1, 2]} for c, e in ((5, 3), (7, 1), (9, 0))]
    chosen = {**plans[1], "cheaper": plans[0], "dearer": plans[2], "error_bound": 0.875, "optimum": 1}
    front = {"unit": "ms", "candidates": [1, 2], "plans": plans, "homogeneous": {"2": plans}}
    (tmp_path / "plan.json").write_text(json.dumps({"rates": [2] * 15 + [1] * 15}))
    (tmp_path / "front.json").write_text(json.dumps({**front, "chosen": {**chosen, "proven_optimal": True}}))
    found = cost(tmp_path, "--config=wan_1_3b", f"--plan={tmp_path / 'plan.json'}", f"--figure={tmp_path / 'page'}")
    page = (tmp_path / "page" / "cost.html").read_text()
    for text in ("Core attention", "Attention with projections", "Whole block", "The Pareto front", "proven optimal"):
        assert text in page
    assert "70 GFLOP contradicts" in page and "next cheaper" in page and "0.875" in page
    assert not re.search(r"(src|href)=.(https?:)?//", page) and page.count("<script") == 1
    plan = plans[0] | {"cheaper": None, "dearer": None, "error_bound": 3, "optimum": 3, "proven_optimal": True}
    lone = write_front_page(epath.Path(tmp_path), {**front, "plans": plans[:1], "chosen": plan, "homogeneous": {}})
    assert "<svg" not in lone.read_text()
    paths = re.findall(r'<path[^>]* d="([^"]*)"', page)
    assert len(paths) == 3 * 5 + 4 + 1
    point = r"-?[\d.]+ -?[\d.]+"
    assert all(re.fullmatch(f"M{point}(L{point})*h0", path) for path in paths)
    marks = [kind for kind in re.findall(r'<i class="line [^"]*(chosen|shape-0 )" style', page)]
    assert sorted(marks) == ["chosen", *["shape-0 "] * 3], "the front is a line, the plans are marks"
    share = found["self_attention_share"]
    assert (
        f"{100 * share:.1f}%" in page and "with 15 of 30 blocks rebuilt" in page and "Nothing here is measured" in page
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=tiny", "--config.model.path="], "config.model.path: (empty): expected a model folder"),
        (["--config=wan_1_3b", "--frames=80"], "config.video.frames: expected 4k + 1, found 80"),
        (["--config=wan_1_3b", "--plan=31R2"], "--plan=31R2: converts 31 blocks, the model has 30"),
        (["--config=wan_1_3b", "--plan=3R0"], "--plan=3R0: expected a name"),
        (["--config=wan_1_3b", "--plan=none.json"], "--plan=none.json: expected a name like '15R2' or a plan.json"),
        (["--config=wan_1_3b", "--json=nowhere/cost.json"], "--json=nowhere/cost.json: expected a file"),
    ],
)
def test_bad_input_is_refused(arguments, message, capsys):
    assert main(["cost", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_bad_plan_file_is_refused(tmp_path, capsys):
    path = tmp_path / "plan.json"
    for content, message in (
        ({"rates": [1, 2]}, "rates: expected one for each of the model's 30 blocks"),
        ({"rates": [1] * 29 + [0]}, "rates[29]: expected integers from 1 or 'linear' or names"),
        ([], "expected a JSON object, found []"),
    ):
        path.write_text(json.dumps(content))
        assert main(["cost", "--config=wan_1_3b", f"--plan={path}"]) == 2
        assert message in capsys.readouterr().err
