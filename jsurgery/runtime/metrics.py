"""The metrics of training steps: one line of JSON for each logged step, and TensorBoard events."""

import json
from typing import Any

from etils import epath

from jsurgery.io.files import replacing
from jsurgery.runtime import processes


class Metrics:
    """Scalars of a stage, in `metrics.jsonl` (one object for each logged step, read by the report) and TensorBoard.

    A resumed run drops everything logged after `resume_step`. With several processes, process 0 alone writes.
    """

    def __init__(self, folder: epath.PathLike, resume_step: int = 0):
        self.folder, self.board = epath.Path(folder), None
        if not processes.is_first():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = [row for row in read_metrics(self.folder) if row["step"] <= resume_step]
        from tensorboardX import SummaryWriter  # slow to import: it imports torch if that is installed

        self.board = SummaryWriter(str(self.folder / "tensorboard"))

    def log(self, step: int, **values: Any) -> None:
        if self.board is None:
            return
        row = {"step": step, **{name: float(value) for name, value in values.items()}}
        self.rows.append(row)
        for name, value in row.items():
            if name != "step":
                self.board.add_scalar(name, value, step)

    def flush(self) -> None:
        if self.board is None:
            return
        with replacing(self.folder / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self.board.flush()


def read_metrics(folder: epath.PathLike) -> list[dict[str, float]]:
    path = epath.Path(folder) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
