"""Traces hold the steps after the first, whether or not there are as many as asked for."""

import jax
import jax.numpy as jnp
import pytest

from jsurgery.runtime.profiler import Profiler


@pytest.mark.parametrize(("traced", "expected"), [(2, [1, 2]), (9, [1, 2, 3, 4]), (0, [])])
def test_the_steps_after_the_first_are_traced(tmp_path, monkeypatch, traced, expected):
    tracing, seen = [], []
    start, stop = jax.profiler.start_trace, jax.profiler.stop_trace
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: (tracing.append(True), start(folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (tracing.clear(), stop()))
    profiler = Profiler(tmp_path / "profile", traced)
    for step in profiler.over(range(5)):
        seen += [step] if tracing else []
        profiler.result = jnp.ones(3) + step
    assert seen == expected and not tracing
    files = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(files) == bool(expected) and all(file.stat().st_size > 0 for file in files)


def test_one_step_is_too_few(tmp_path):
    profiler = Profiler(tmp_path / "profile", 3)
    assert list(profiler.over(range(1))) == [0]
    assert not (tmp_path / "profile").exists()
