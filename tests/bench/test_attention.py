"""`jsurgery bench attention`: its report, estimates, and the search for block sizes."""

import functools
import json
import pickle

import jax
import numpy as np
import pytest
import torch

from jsurgery.bench import attention, attention_cycles, attention_programs, attention_tuning
from jsurgery.bench.attention_cycles import estimated
from jsurgery.bench.attention_programs import AttentionShape, at_rate, gradients
from jsurgery.bench.attention_tuning import search
from jsurgery.bench.transformer import SIZES
from jsurgery.cli import main
from pallas_kernels import estimate as estimates
from pallas_kernels import tuning
from pallas_kernels.api import hybrid_attention
from pallas_kernels.tpu import blocks_for

SIZE = ["--tokens=40", "--heads=2", "--head_dim=16", "--runs=2"]


@pytest.fixture(autouse=True)
def restore_torch_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_report_has_every_rate(tmp_path, capsys):
    report = tmp_path / "attention.json"
    assert main(["bench", "attention", "--rates=1,4,linear", "--backward", f"--json={report}", *SIZE]) == 0
    printed = capsys.readouterr().out
    found = json.loads(report.read_text())
    assert list(found["passes"]) == ["forward", "forward + backward"] and found["dtype"] == "float32"
    for rows in found["passes"].values():
        assert [row["name"] for row in rows] == ["torch", "softmax", "R4", "linear"]
        assert all(len(row["seconds"]) == 2 and row["name"] in printed for row in rows)
        torch_row, softmax, r4, _ = rows
        assert torch_row["speedup"] == softmax["bound"] == 1 and torch_row["memory_bytes"] is None
        assert r4["speedup"] == pytest.approx(torch_row["median_s"] / r4["median_s"])
        assert r4["share_of_bound"] == pytest.approx(r4["speedup"] / r4["bound"])
        # 4 N^2 D for scores and values; forward and backward cost three forwards
        forwards = 3 if rows is found["passes"]["forward + backward"] else 1
        assert softmax["flops"] == forwards * 4 * 40 * 40 * 32
        assert softmax["memory_bytes"] > 4 * 4 * 40 * 32
    assert found["machine"]["name"] in printed


def test_rows_of_other_families(tmp_path):
    report = tmp_path / "attention.json"
    families = ["--rates=1", "--chunked=16,8", "--sparse=0.5"]
    assert main(["bench", "attention", *families, f"--json={report}", *SIZE]) == 0
    rows = json.loads(report.read_text())["passes"]["forward"]
    assert [row["name"] for row in rows] == ["torch", "softmax", "chunks 16+8", "sparse 0.5"]
    linear = AttentionShape(40, 2, 16, "float32", "lse").flops("linear")
    # windows of 16, 24 and 16 keys for 16, 16 and 8 queries; one block of 64 keys, of which there are 40
    assert rows[2]["flops"] == 4 * (16 * 16 + 16 * 24 + 8 * 16) * 32 + linear
    assert rows[3]["flops"] == 4 * 40 * (40 + 16) * 32
    assert rows[3]["bound"] == rows[1]["flops"] / rows[3]["flops"]


@pytest.mark.parametrize("wrong", ["--chunked=16", "--chunked=0,8", "--sparse=1.5"])
def test_families_that_do_not_exist_are_refused(wrong, capsys):
    assert main(["bench", "attention", wrong, *SIZE]) == 2
    assert wrong.partition("=")[2] in capsys.readouterr().err


def test_shapes_of_arguments_and_the_bound_of_the_speed_up():
    size = AttentionShape(40, 2, 16, "float32", "lse")
    q, k, v, *maps = attention_programs.arguments(size, 4)
    assert q.shape == k.shape == v.shape == (1, 40, 2, 16) and maps[0].kernels[0].shape == (2, 16, 32)
    assert size.num_softmax(4) == 10 and size.num_softmax("linear") == 0
    assert size.bound(4) < 4  # as phi has costs


@pytest.mark.parametrize("passes", attention.PASSES)
def test_estimates_cover_the_whole_layer(passes, monkeypatch):
    """All heads, with q, k, v as rows [B, N, H D], in a function that can be pickled for another process."""

    def estimate(chip, function, *shapes):
        assert chip == "v6e" and pickle.loads(pickle.dumps(function))
        found = jax.tree.leaves(jax.eval_shape(function, *shapes))
        inputs = jax.tree.leaves(shapes)
        assert [x.shape for x in inputs[:3]] == [(1, 600, 12 * 128)] * 3
        expected = inputs[:1] if passes == "forward" else inputs
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]
        return {"hybrid_attend.1": 7, "hybrid_state.1": 5}, {"fusion": 3, "copy": 1}

    monkeypatch.setattr(estimates, "estimate_cycles", estimate)
    size = AttentionShape(600, 12, 128, "bfloat16", "lse")
    for rate in (1, 8):
        found = estimated("v6e", size, rate, at_rate(hybrid_attention, size, rate, implementation="xla"), passes)
        assert found == {"cycles": 16, "kernels": {"hybrid_attend.1": 7, "hybrid_state.1": 5}, "xla": 4}


def test_the_report_of_estimates(monkeypatch, capsys, tmp_path):
    """Includes XLA's part, except for flash_attention, where that part only transposes."""
    cost = {"flash_attention": 8_500_000, "softmax": 6_500_000, "R4": 2_500_000}
    names = iter(2 * list(cost))
    monkeypatch.setattr(attention_cycles, "check_estimates", lambda chip: None)
    monkeypatch.setattr(attention_cycles, "estimated", lambda *_: {"cycles": cost[next(names)], "xla": 500_000})
    report = tmp_path / "estimates.json"
    command = ["bench", "attention", "--estimate=v6e", "--rates=4", "--backward", "--tokens=600", f"--json={report}"]
    assert main(command) == 0
    found = json.loads(report.read_text())
    assert found["static_estimate"] and found["chip"] == "v6e"
    for rows in found["passes"].values():
        assert {row["name"]: row["cycles"] for row in rows} == {
            "flash_attention": 8_000_000,
            "softmax": 6_500_000,
            "R4": 2_500_000,
        }
        assert [row["speedup"] for row in rows] == [6.5 / 8, 1, 2.6]
        assert [row["over_flash_attention"] for row in rows] == [1, 8 / 6.5, 3.2]
        assert rows[2]["bound"] == AttentionShape(600, 12, 128, "bfloat16", "lse").bound(4)
    assert capsys.readouterr().out.count("static estimate, v6e") == 2


def test_of_rows_equals_attention_on_heads():
    *arrays, query_map, key_map = attention_programs.arguments(AttentionShape(40, 2, 16, "float32", "lse"), 4)
    attend = functools.partial(hybrid_attention, num_softmax=10)
    expected = attend(*arrays, query_map, key_map)
    found = attention_programs.of_rows(attend, 2, *(x.reshape(1, 40, 32) for x in arrays), query_map, key_map)
    np.testing.assert_array_equal(found, expected.reshape(1, 40, 32))


def test_gradients_of_every_input():
    size = AttentionShape(40, 2, 16, "float32", "lse")
    inputs = attention_programs.arguments(size, 4)
    found = gradients(functools.partial(hybrid_attention, num_softmax=10), *inputs)
    assert [leaf.shape for leaf in jax.tree.leaves(found)] == [leaf.shape for leaf in jax.tree.leaves(inputs)]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))


def test_search_finds_the_fastest_sizes_and_times_backward_sizes_by_the_backward():
    timed = []

    def seconds(blocks, passes):
        timed.append(passes)
        query, backward = abs(np.log2(blocks["query"] / 512)), abs(np.log2(blocks["backward_key"] / 64))
        return 1 + (query if passes == "forward" else backward)

    assert search({"query": 128, "backward_key": 256}, seconds) == {"query": 512, "backward_key": 64}
    assert set(timed) == {"forward", "forward + backward"}


def test_block_sizes_tuned_by_estimates_are_kept_with_their_source(monkeypatch):
    saved = []
    monkeypatch.setattr(tuning, "save", lambda *entry: saved.append(entry))
    monkeypatch.setattr(attention_tuning, "check_estimates", lambda chip: None)
    cycles = lambda chip, size, rate, attend, passes: abs(np.log2(attend.keywords["block_sizes"].key / 1024))
    monkeypatch.setattr(attention_tuning, "estimated", lambda *arguments: {"cycles": 1 + cycles(*arguments)})
    assert main(["bench", "attention", "--tune", "--estimate=v6e", "--rates=8", "--tokens=4096"]) == 0
    ((chip, num_keys, num_softmax, blocks, source),) = saved
    assert (chip, num_keys, num_softmax, source) == ("v6e", 4096, 512, "static estimate")
    assert blocks == vars(blocks_for("v6e", 4096, 512)) | {"key": 1024}


def test_rows_of_whole_forwards():
    contenders = attention_programs.forwards(("1R2", "2R8"), SIZES["tiny"], (5, 64, 64), "float32", "lse")
    outputs = [contender["run"]() for contender in contenders]
    assert all(y.shape == (1, 2, 8, 8, 4) and np.isfinite(y).all() for y in outputs)
    rows = attention.measured(contenders, runs=1)
    assert [row["name"] for row in rows] == ["softmax", "1R2", "2R8"]
    assert rows[0]["bound"] == rows[0]["speedup"] == 1
    assert all(row["tflops_per_s"] == pytest.approx(row["flops"] / row["median_s"] / 1e12) for row in rows)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--rates=1,0"], ["--rates", "positive", "'0'"]),
        (["--rates=half"], ["--rates", "'half'"]),
        (["--tokens=none"], ["--tokens", "positive"]),
        (["--implementation=stock", "--stabilizer=max", "--rates=4", *SIZE], ["--implementation", "row maximum"]),
        (["--implementation=cuda"], ["--implementation", "'cuda'"]),
        (["--estimate=v9"], ["--estimate", "v6e", "'v9'"]),
        (["--tune"], ["--tune", "TPU or GPU", "cpu"]),
        (["--tune", "--estimate=v9"], ["--estimate", "v6e", "'v9'"]),
        (["--plans=15R2,31R8"], ["--plans", "at most 30 blocks", "'31R8'"]),
        (["--json=/no/such/folder/x.json"], ["/no/such/folder"]),
    ],
)
def test_bad_arguments_are_refused(arguments, parts, capsys):
    assert main(["bench", "attention", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("bench:")]
    assert all(part in line for part in parts), line
