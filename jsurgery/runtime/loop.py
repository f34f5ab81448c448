"""The loop of every stage that trains: it resumes, checks that numbers are finite, logs, saves, and obeys signals."""

from collections.abc import Callable
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from jsurgery.runtime.checkpoints import Checkpoints
from jsurgery.runtime.guard import Guard
from jsurgery.runtime.mesh import to_host
from jsurgery.runtime.metrics import Metrics
from jsurgery.runtime.preemption import Preemption
from jsurgery.runtime.profiler import Profiler
from jsurgery.runtime.progress import Progress


def run_steps(
    stage: str,
    config: ConfigDict,
    state: Any,
    update: Callable[[Any, int], tuple[Any, Any, Any]],
    *,
    steps: int,
    checkpoints: epath.Path,
    metrics: epath.Path,
    format_metrics: Callable[[Any], tuple[dict[str, Any], str]],
    likely_cause: Callable[[int, Any, Any, Any], str],
    validate: Callable[[Any], dict[str, float]] | None = None,
    profile: epath.Path | None = None,
) -> Any:
    """The state after `steps` steps. `state` is the state of step 0; a restored checkpoint is sharded like it.

    Args:
        update: (state, step) -> (state, numbers, details). It keeps the state if one of the numbers is not finite.
        checkpoints: the folder of the checkpoints.
        metrics: the folder of the logged metrics.
        format_metrics: (numbers as NumPy arrays) -> (values to log, a note for the progress line); called every
            `log_every` steps.
        likely_cause: (step, numbers, details, newest state) -> a text on where non-finite numbers may come from.
        validate: (state) -> more values to log; called every `config.checkpoint.every` steps.
        profile: the folder for a profiler trace of `config.profile` steps.

    Raises:
        InputError: a checkpoint is damaged or cannot be written.
        Diverged: more than `config.max_skipped` steps were not finite.
        Terminated, Interrupted: a signal came; the current step is saved.
    """
    saved = Checkpoints(checkpoints, **config.checkpoint)
    start, state = saved.restore(state)
    log, progress, profiler = Metrics(metrics, start), Progress(stage, steps, start), Profiler(profile, config.profile)
    guard = Guard(stage, config.max_skipped, lambda step, numbers, details: likely_cause(step, numbers, details, state))
    with saved, Preemption(stage) as preemption:
        for step in profiler.over(progress.over(range(start, steps))):
            state, numbers, details = update(state, step)
            guard.record(step, numbers, details)
            profiler.result = numbers
            if (step + 1) % config.log_every == 0:
                row, progress.note = format_metrics(to_host(numbers))
                log.log(step + 1, **row, **guard.metrics)
                log.flush()
            if validate is not None and (step + 1) % config.checkpoint.every == 0:
                log.log(step + 1, **validate(state))
                log.flush()
            last = preemption.should_stop() or step + 1 == steps
            saved.save(step + 1, state, last=last, check=guard.check_last)
            preemption.stop_if_asked()
    log.flush()
    return state
