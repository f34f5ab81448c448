"""Sums of VBench results, compared with published tables that have all dimensions and the authors' sums."""

import json

import pytest

from jsurgery.cli import main
from jsurgery.errors import InputError
from jsurgery.evaluate.vbench_scores import DIMENSIONS, PUBLISHED, PUBLISHED_2, read_results, summarize

# FlashVideo (arXiv 2502.05179), Table 1, which takes other models' rows from VBench's leaderboard. Its column order:
COLUMNS = (
    "subject consistency", "background consistency", "temporal flickering", "motion smoothness", "dynamic degree",
    "aesthetic quality", "imaging quality", "object class", "multiple objects", "human action", "color",
    "spatial relationship", "scene", "appearance style", "temporal style", "overall consistency",
)  # fmt: skip
FLASHVIDEO_TABLE_1 = {  # (Total, Quality, Semantic), dimensions
    "CogVideoX-1.5": (
        (82.17, 82.78, 79.76),
        (96.87, 97.35, 98.88, 98.31, 50.93, 62.79, 65.02, 87.47, 69.65, 97.20, 87.55, 80.25, 52.91, 24.89, 25.19,
         27.30),
    ),
    "CogVideoX-2B": (
        (81.57, 82.51, 77.79),
        (96.42, 96.53, 98.45, 97.76, 58.33, 61.47, 65.60, 87.81, 69.35, 97.00, 86.87, 54.64, 57.51, 24.93, 25.56,
         28.01),
    ),
    "Mochi-1": (
        (80.13, 82.64, 70.08),
        (96.99, 97.28, 99.40, 99.02, 61.85, 56.94, 60.64, 86.51, 50.47, 94.60, 79.73, 69.24, 36.99, 20.33, 23.65,
         25.15),
    ),
    "LTX-Video": (
        (80.00, 82.30, 70.79),
        (96.56, 97.20, 99.34, 98.96, 54.35, 59.81, 60.28, 83.45, 45.43, 92.80, 81.45, 65.43, 51.07, 21.47, 22.62,
         25.19),
    ),
    "FlashVideo, 24 frames a second": (
        (82.99, 83.35, 81.56),
        (97.19, 97.09, 98.52, 98.89, 56.88, 62.11, 65.40, 88.38, 78.93, 99.40, 84.84, 82.16, 57.43, 24.36, 25.26,
         27.59),
    ),
}  # fmt: skip
# Attention Surgery, Tables 9 to 11, two rows by category. Our copy of the text lacks most column headings. These are
# the only sets of columns whose means are the categories of Table 11; the order within a category does not matter.
VBENCH_2 = {
    "Wan2.1 1.3B": {
        "human": (63.5, 97.9, 80.6),
        "creativity": (49.1, 48.4),
        "controllability": (25.1, 16.4, 49.1, 11.3, 71.7, 32.0, 32.1),
        "commonsense": (86.0, 40.8),
        "physics": (72.4, 61.7, 69.4, 9.6),
    },
    "Attention Surgery 15R2": {
        "human": (62.7, 97.1, 77.0),
        "creativity": (48.5, 46.4),
        "controllability": (25.1, 18.4, 44.0, 13.2, 70.3, 33.7, 29.0),
        "commonsense": (84.8, 41.4),
        "physics": (66.4, 70.5, 67.3, 7.1),
    },
}
VBENCH_2_DIMENSIONS = {
    "human": ("Human_Anatomy", "Human_Clothes", "Human_Identity"),
    "creativity": ("Diversity", "Composition"),
    "controllability": ("Camera_Motion", "Complex_Landscape", "Complex_Plot", "Dynamic_Attribute",
                        "Dynamic_Spatial_Relationship", "Human_Interaction", "Motion_Order_Understanding"),
    "commonsense": ("Instance_Preservation", "Motion_Rationality"),
    "physics": ("Mechanics", "Thermotics", "Material", "Multi-View_Consistency"),
}  # fmt: skip


def write_results(folder, scores, name="run_eval_results.json", videos=5):
    folder.mkdir(parents=True, exist_ok=True)
    details = [{"video_path": f"{i}.mp4", "video_results": 0.5} for i in range(videos)]
    (folder / name).write_text(json.dumps({key: [score, details] for key, score in scores.items()}))
    return folder


@pytest.mark.parametrize("model", FLASHVIDEO_TABLE_1)
def test_sums_of_published_dimensions_are_the_published_sums(tmp_path, model):
    expected, dimensions = FLASHVIDEO_TABLE_1[model]
    scores = {name.replace(" ", "_"): value / 100 for name, value in zip(COLUMNS, dimensions, strict=True)}
    found = summarize(read_results([str(write_results(tmp_path, scores))])[0])
    assert [found[name] for name in ("Total", "Quality", "Semantic")] == pytest.approx(expected, abs=0.01)


def test_control_plain_means_are_not_the_published_sums():
    """Without the ranges and weights of the dimensions, no sum is the published one."""
    for (_, quality, semantic), dimensions in FLASHVIDEO_TABLE_1.values():
        assert abs(sum(dimensions[:7]) / 7 - quality) > 0.2 and abs(sum(dimensions[7:]) / 9 - semantic) > 5


@pytest.mark.parametrize("model", VBENCH_2)
def test_vbench_2_sums_of_the_appendix_are_those_of_the_paper(tmp_path, model):
    for category, values in VBENCH_2[model].items():
        for name, value in zip(VBENCH_2_DIMENSIONS[category], values, strict=True):
            write_results(tmp_path, {name: value / 100}, f"{name}_eval_results.json")
    found = summarize(read_results([str(tmp_path)])[0])
    assert list(found.values()) == pytest.approx(PUBLISHED_2[model], abs=0.0501)  # printed to one decimal
    assert round(found["Total"], 1) == {"Wan2.1 1.3B": 56.0, "Attention Surgery 15R2": 55.1}[model]


def test_totals_of_the_paper_weight_quality_four_times_and_vbench_2_equally():
    for total, quality, semantic in PUBLISHED.values():
        assert (4 * quality + semantic) / 5 == pytest.approx(total, abs=0.011)
    for model in VBENCH_2:
        total, *categories = PUBLISHED_2[model]
        assert sum(categories) / 5 == pytest.approx(total, abs=0.11)


def test_a_missing_dimension_leaves_out_its_sums(tmp_path, capsys):
    scores = dict.fromkeys(DIMENSIONS, 0.5) | {"motion_smoothness": 0.9975}
    del scores["scene"]
    folder, report = write_results(tmp_path / "results", scores), tmp_path / "sums.json"
    assert main(["evaluate", "vbench-results", str(folder), "--name=ours", f"--json={report}"]) == 0
    text = capsys.readouterr().out
    sums = json.loads(report.read_text())["sums"]
    assert sums["Total"] is None and sums["Semantic"] is None and sums["Quality"] > 0
    assert f"| **ours** | – | {sums['Quality']:.2f} | – |" in text
    assert "| Wan2.1 1.3B* (published) | 83.10 | 85.10 | 75.12 |" in text
    assert "| motion smoothness | 99.75 | 5 |" in text and "Not measured: scene." in text


def test_table_of_vbench_2(tmp_path, capsys):
    folder = write_results(tmp_path, {name: 0.25 for names in VBENCH_2_DIMENSIONS.values() for name in names}, videos=0)
    assert main(["evaluate", "vbench-results", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "| **this model** | 25.0 | 25.0 | 25.0 | 25.0 | 25.0 | 25.0 |" in text
    assert "| Attention Surgery 15R2 (published) | 55.1 | 78.9 | 47.5 | 33.4 | 63.1 | 52.8 |" in text
    assert "| multi-view consistency | 25.00 | – |" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "as JSON"),
        ("[]", "found ''"),
        ('{"colour": [0.5, []]}', "found 'colour'"),
        ('{"color": [50.0, []]}', "color: expected a score from 0 to 1, found 50.0"),
        ('{"color": [NaN, []]}', "found nan"),
        ('{"color": []}', r"found \[\]"),
        ('{"color": [0.5], "Diversity": [0.5]}', "found both"),
        ("{}", "found none"),
    ],
)
def test_a_bad_results_file_is_refused(tmp_path, content, message):
    (tmp_path / "a_eval_results.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_results([str(tmp_path)])


def test_missing_results_are_refused(tmp_path, capsys):
    assert main(["evaluate", "vbench-results", str(tmp_path)]) == 2
    assert "expected files *_eval_results.json, found none" in capsys.readouterr().err
    assert main(["evaluate", "vbench-results", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
