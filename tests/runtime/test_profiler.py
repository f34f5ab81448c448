"""The profiler traces the steps after the first, or fewer than requested if the run ends earlier."""

import jax
import jax.numpy as jnp
import pytest

from jsurgery.runtime.profiler import Profiler


@pytest.mark.parametrize(("traced", "expected"), [(2, [1, 2]), (9, [1, 2, 3, 4]), (0, [])])
def test_the_steps_after_the_first_are_traced(tmp_path, monkeypatch, traced, expected):
    tracing, traced_steps = [], []
    start, stop = jax.profiler.start_trace, jax.profiler.stop_trace
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: (tracing.append(True), start(folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (tracing.clear(), stop()))
    profiler = Profiler(tmp_path / "profile", traced)
    for step in profiler.over(range(5)):
        traced_steps += [step] if tracing else []
        profiler.result = jnp.ones(3) + step
    assert traced_steps == expected and not tracing
    files = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(files) == bool(expected) and all(file.stat().st_size > 0 for file in files)


def test_a_single_step_leaves_no_trace(tmp_path):
    profiler = Profiler(tmp_path / "profile", 3)
    assert list(profiler.over(range(1))) == [0]
    assert not (tmp_path / "profile").exists()
