import json

import numpy as np
import pytest
from etils import epath

from jsurgery.ablate.predicted_errors import rank_correlations, spearman_interval
from jsurgery.ablate.results_document import update_results
from jsurgery.ablate.write_table import charts, markdown, write
from jsurgery.errors import InputError
from jsurgery.evaluate.statistics import fact, mean_and_std, paired_difference

RESULT = {
    "table": "loss",
    "title": "The <loss>",
    "subject": "tiny model",
    "text": "2 seeds.",
    "rows": {
        "teacher": {"total": (0.9, 0.0)},
        "a": {"attention_flops": 0.5, "total": (0.25, 0.125), "color": (1.0, 0.0)},
    },
    "paper": {"a": {"Total": 80.0}},
    "contrasts": {"a − b": {"total": {"difference": -0.5, "low": -0.75, "high": -0.25, "items": 7}}},
    "plotted": ["total"],
    "charts": [{"title": "Score over cost", "lines": {"R8": {"x": [10.0, 20.0], "y": [0.5, 0.75]}}}],
}


def test_means_and_standard_deviations():
    assert mean_and_std([1.0, 3.0]) == (2.0, pytest.approx(np.sqrt(2))) and mean_and_std([4.0]) == (4.0, 0.0)
    assert fact([2.0, 2.0]) == 2.0 and fact([1.0, 3.0]) == mean_and_std([1.0, 3.0])


def test_paired_differences_reveal_a_small_effect():
    rng = np.random.default_rng(1)
    prompts = [rng.normal(0, 5, 30) for _ in range(3)]
    better = [values + 0.5 + rng.normal(0, 0.1, 30) for values in prompts]
    found = paired_difference(better, prompts)
    assert found["items"] == 90 and 0.45 < found["low"] < found["difference"] < found["high"] < 0.55
    unpaired = paired_difference(prompts, [values[::-1] for values in prompts])
    assert unpaired["low"] < 0 < unpaired["high"] and unpaired["difference"] == pytest.approx(0)


def test_the_interval_agrees_with_the_normal_approximation():
    """For seeds with different numbers of items."""
    rng = np.random.default_rng(2)
    a = [rng.normal(1, 1, 150), rng.normal(1, 1, 250)]
    found = paired_difference(a, [np.zeros(150), np.zeros(250)], resamples=5000)
    values = np.concatenate(a)
    half = 1.96 * values.std() / 20
    assert found["difference"] == pytest.approx(values.mean())
    assert [found["low"], found["high"]] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.015)


def test_a_table_is_written_as_markdown_json_and_html(tmp_path):
    folder = tmp_path / "not there yet"
    text = write(RESULT, epath.Path(folder))
    assert text == markdown(RESULT) == (folder / "loss.md").read_text()
    lines = text.splitlines()
    assert (
        "| tiny model | attention FLOPs, of the teacher's | total | paper: Total |" in lines
    )  # color is only in the JSON
    assert "| a | 0.5 | 0.2500 ± 0.1250 | 80 |" in lines and "| teacher |  | 0.9000 ± 0.0000 |  |" in lines
    assert "| a − b | -0.5000 [-0.7500, -0.2500] (n 7) |" in lines
    assert json.loads((folder / "loss.json").read_text())["rows"]["a"]["color"] == [1.0, 0.0]
    page = (folder / "loss.html").read_text()
    assert "The &lt;loss&gt;" in page and page.count("<svg") == 2 and "0.2500 ± 0.1250" in page


def test_nan_is_printed_but_not_plotted():
    broken = RESULT | {"rows": {"a": {"total": (float("nan"), 0.0)}, "b": {"total": (1.0, 0.1)}}, "charts": []}
    assert charts(broken) == [] and "| a | n/a | 80 |" in markdown(broken)


def test_only_the_section_of_the_table_is_rewritten(tmp_path):
    document = epath.Path(tmp_path) / "results.md"
    document.write_text(
        "# A\n<!-- begin loss -->\nold\n<!-- end loss -->\nB\n<!-- begin phi -->\nkept\n<!-- end phi -->\n"
    )
    for _ in range(2):
        update_results(document, "loss", "| new |\n")
        found = document.read_text()
        assert found.startswith("# A\n<!-- begin loss -->\n\n| new |\n\n<!-- end loss -->\nB\n") and "kept" in found
    with pytest.raises(InputError, match="expected lines <!-- begin front --> and <!-- end front -->"):
        update_results(document, "front", "text")


def test_rank_correlations_equal_scipy():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    x, y = rng.integers(6, size=(2, 4, 20)).astype(float)  # with ties
    expected = [spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(rank_correlations(x, y), expected)
    assert rank_correlations(np.ones((1, 5)), x[:1, :5]) == 0
    low, high = spearman_interval([(x[0], x[0] ** 3), (x[1], x[1])])
    assert low == high == pytest.approx(1)
    low, high = spearman_interval([(x[0], y[0])])
    assert low < expected[0] < high
