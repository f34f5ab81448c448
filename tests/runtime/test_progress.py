from jsurgery.runtime.metrics import Metrics, read_metrics
from jsurgery.runtime.progress import Progress, clock


def test_resuming_drops_metrics_of_later_steps(tmp_path):
    metrics = Metrics(tmp_path)
    for step in (10, 20, 30):
        metrics.log(step, loss=1 / step)
    metrics.flush()
    again = Metrics(tmp_path, resume_step=20)
    again.log(30, loss=5.0)
    again.flush()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(10, 0.1), (20, 0.05), (30, 5.0)]
    assert list((tmp_path / "tensorboard").iterdir())


def test_last_line_of_progress_shows_steps_and_duration(capsys):
    progress = Progress("distill", 4, start=2)
    assert list(progress.over(range(2, 4))) == [2, 3]
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("distill: 4/4") and "took" in line


def test_clock_formats_durations():
    assert [clock(s) for s in (5, 65, 3700)] == ["5s", "1m05s", "1h01m"]
