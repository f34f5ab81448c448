"""`jsurgery bench attention`: what it reports, and the arithmetic behind estimates and the search for block sizes."""

import dataclasses
import functools
import json
import pickle

import jax
import numpy as np
import pytest
import torch

from jsurgery import bench_attention
from jsurgery.bench import SIZES
from jsurgery.bench_attention import Size, at_rate, gradients, search, whole_layer
from jsurgery.cli import main
from pallas_kernels import hybrid_attention, tuning
from pallas_kernels.estimate import pullback_of
from pallas_kernels.tpu import blocks_for

SIZE = ["--tokens=40", "--heads=2", "--head_dim=16", "--runs=2"]


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_measures_every_rate(tmp_path, capsys):
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
        # 4 N^2 D for scores and values; a forward and a backward are three forwards
        forwards = 3 if rows is found["passes"]["forward + backward"] else 1
        assert softmax["flops"] == forwards * 4 * 40 * 40 * 32
        assert softmax["memory_bytes"] > 4 * 4 * 40 * 32
    assert found["machine"]["name"] in printed


def test_torch_and_ours_compute_the_same_work():
    size = Size(40, 2, 16, "float32", "lse")
    q, k, v, *maps = bench_attention.arguments(size, 4)
    assert q.shape == k.shape == v.shape == (1, 40, 2, 16) and maps[0].kernels[0].shape == (2, 16, 32)
    assert size.num_softmax(4) == 10 and size.num_softmax("linear") == 0
    assert size.bound(4) < 4  # phi costs


@pytest.mark.parametrize(("head_dim", "tile"), [(128, 1), (64, 2)])
@pytest.mark.parametrize("passes", ["forward", "forward + backward"])
def test_estimates_scale_to_all_heads_queries_and_keys(passes, head_dim, tile):
    """From few of each. Of a forward, what XLA does is asked of all heads; of a backward, at most that."""
    calls = []

    def estimate(function, q, k, v, *maps, pullback=False):
        pickle.loads(pickle.dumps((function, q, k, v, maps)))  # as a process of its own needs
        assert k.shape == v.shape == (1, k.shape[1], q.shape[2])
        calls.append((*q.shape[1:], k.shape[1], pullback))
        heads = maps[0].log_scale.shape[0]
        waits = 0 if heads == 12 else q.shape[1]
        kernels = heads * (100 + 2 * q.shape[1] + 5 * k.shape[1])
        return {"hybrid_attend.1": kernels, "fusion": 70 + waits + (q.shape[1] + k.shape[1]) * heads}

    attend = functools.partial(hybrid_attention, num_softmax=750, implementation="tpu")
    size = Size(6000, 12, head_dim, "bfloat16", "lse")
    found = whole_layer(estimate, size, 8, attend, passes, (2048, 1024))
    exact, asked = 70 + 12 * (100 + 9 * 6000), [(2048, tile, False), (4096, tile, False)]
    if passes == "forward":
        asked += [(256, 12, False), (512, 12, False)]
        assert found == exact
    else:
        asked += [(2048, tile, True), (3072, tile, True)]
        assert found == 2 * (exact - 70 + 12 / tile * (70 + 6000))
    # All softmax keys, and of the others two numbers.
    keys = (750 + 2048, 750 + 3072)
    halves = zip(asked[::2], asked[1::2], strict=True)
    both = [(n, heads * head_dim, k, back) for half in halves for k in keys for n, heads, back in half]
    assert calls == both


def test_estimates_of_full_softmax_scale_to_all_keys():
    """From few queries and few keys; softmax is of however many keys there are."""
    asked = []

    def estimate(function, q, k, v, *no_maps):
        y = jax.eval_shape(function, q, k, v, *no_maps)
        assert y.shape == q.shape and pickle.loads(pickle.dumps(function))
        asked.append((q.shape[1], k.shape[1]))
        return {"hybrid_attend.1": 7 + q.shape[1] * (3 + 2 * k.shape[1]), "fusion": 5 * k.shape[1]}

    size = Size(20_000, 12, 128, "bfloat16", "lse")
    attend = at_rate(hybrid_attention, size, 1, implementation="xla")
    found = whole_layer(estimate, size, 1, attend, "forward", (2048, 1024))
    assert found == pytest.approx(12 * (7 + 20_000 * (3 + 2 * 20_000) + 5 * 20_000))
    assert set(asked) == {(2048, 8192), (4096, 8192), (2048, 12288), (4096, 12288)}
    assert at_rate(hybrid_attention, size, 8).keywords["num_softmax"] == 2500


def test_an_estimate_takes_whole_blocks():
    for num_softmax, queries in ((8192, 1024), (2048, 2048)):
        blocks = blocks_for("v6e", 16384, num_softmax)
        of_estimate = bench_attention.for_backward(blocks)
        assert of_estimate == dataclasses.replace(blocks, backward_state=queries)
        assert of_estimate.backward_query == queries


def test_the_two_halves_of_a_gradient_are_the_gradient():
    *arrays, query_map, key_map = bench_attention.arguments(Size(40, 2, 16, "float32", "lse"), 4)
    attend = functools.partial(hybrid_attention, num_softmax=10)
    shapes = jax.eval_shape(lambda *inputs: inputs, *arrays, query_map, key_map)
    program, (kept, dy) = pullback_of(attend, *shapes)
    y, pullback = jax.vjp(attend, *arrays, query_map, key_map)
    assert jax.tree.map(lambda x: x.shape, kept) == [x.shape for x in jax.tree.leaves(pullback)]
    assert dy.shape == y.shape
    found = jax.jit(program)(jax.tree.leaves(pullback), arrays[0])
    expected = gradients(attend, *arrays, query_map, key_map)
    for x, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, e, rtol=1e-4, atol=1e-5)


def test_rows_of_all_heads_are_split_and_joined():
    *arrays, query_map, key_map = bench_attention.arguments(Size(40, 2, 16, "float32", "lse"), 4)
    attend = functools.partial(hybrid_attention, num_softmax=10)
    rows = [x.reshape(1, 40, 32) for x in arrays]
    for function in (attend, functools.partial(gradients, attend)):
        expected = jax.tree.leaves(function(*arrays, query_map, key_map))
        found = jax.tree.leaves(bench_attention.of_rows(function, 2, *rows, query_map, key_map))
        assert [x.shape for x in found] == [(1, 40, 32) if x.ndim == 4 else x.shape for x in expected]
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_array_equal(x.ravel(), y.ravel())


def test_gradients_are_those_of_every_input():
    size = Size(40, 2, 16, "float32", "lse")
    inputs = bench_attention.arguments(size, 4)
    found = gradients(functools.partial(hybrid_attention, num_softmax=10), *inputs)
    assert [leaf.shape for leaf in jax.tree.leaves(found)] == [leaf.shape for leaf in jax.tree.leaves(inputs)]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))


def test_search_goes_downhill_and_times_the_backward_for_its_own_sizes():
    asked = []

    def seconds(blocks, passes):
        asked.append(passes)
        query, backward = abs(np.log2(blocks["query"] / 512)), abs(np.log2(blocks["backward_key"] / 64))
        return 1 + (query if passes == "forward" else backward)

    assert search({"query": 128, "backward_key": 256}, seconds) == {"query": 512, "backward_key": 64}
    assert set(asked) == {"forward", "forward + backward"}


def test_blocks_tuned_by_estimates_say_so(monkeypatch):
    kept = []
    monkeypatch.setattr(tuning, "save", lambda *entry: kept.append(entry))
    monkeypatch.setattr(bench_attention, "check_estimates", lambda chip: None)
    cycles = lambda chip, size, rate, attend, passes, blocks: 1 + abs(np.log2(blocks["key"] / 1024))
    monkeypatch.setattr(bench_attention, "estimated", cycles)
    assert main(["bench", "attention", "--tune", "--estimate=v6e", "--rates=8", "--tokens=4096"]) == 0
    ((chip, num_keys, num_softmax, blocks, source),) = kept
    assert (chip, num_keys, num_softmax, source) == ("v6e", 4096, 512, "static estimate")
    assert blocks == vars(blocks_for("v6e", 4096, 512)) | {"key": 1024}


def test_whole_forwards():
    """The same weights at every plan, whose FLOPs bound the speed-up."""
    contenders = bench_attention.forwards(("1R2", "2R8"), SIZES["tiny"], (5, 64, 64), "float32", "lse")
    outputs = [contender["run"]() for contender in contenders]
    assert all(y.shape == (1, 2, 8, 8, 4) and np.isfinite(y).all() for y in outputs)
    rows = bench_attention.measured(contenders, runs=1)
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
def test_refusals(arguments, parts, capsys):
    assert main(["bench", "attention", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("bench:")]
    assert all(part in line for part in parts), line
