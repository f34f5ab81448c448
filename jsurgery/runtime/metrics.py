"""The metrics of training steps: a line of JSON each, and TensorBoard's events."""

import json
from typing import Any

from etils import epath

from jsurgery.io.files import replacing
from jsurgery.runtime import processes


class Metrics:
    """Scalars of a stage: `metrics.jsonl` (one object a logged step, read by the report) and TensorBoard events.

    A resumed run drops what was logged after the step that it restarts from. Of several processes the first writes.
    """

    def __init__(self, folder: epath.PathLike, resume_step: int = 0):
        self.folder, self.board = epath.Path(folder), None
        if not processes.is_first():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(self.folder) if row["step"] <= resume_step]
        self.rows = kept
        from tensorboardX import SummaryWriter  # takes seconds where torch is installed, which it then imports

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
