"""The folder of a stage, with a marker that records what its files depend on and whether they are complete."""

import datetime
import hashlib
import json
import pathlib
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from jsurgery.config import recorded_fields
from jsurgery.errors import InputError, shortened
from jsurgery.io.fields import describe_changes
from jsurgery.io.files import read_object, write_json
from jsurgery.runtime import processes
from jsurgery.runtime.lock import locked
from jsurgery.runtime.machine import describe_machine
from jsurgery.runtime.progress import say

MARKER = "stage.json"
FORMAT_VERSION = 1  # of the files of stages; raise it when another version of jsurgery could misread them


class StageFolder:
    """A stage's folder in the workdir. Its marker, stage.json, is written first and, when the stage ends, again.

    The marker records the config fields that change the result: `fields` are fields or whole sections, `without` are
    fields of these sections that do not count. It also records the stages whose results the stage reads (`after`) and
    further `inputs`. Of a stage that `run` has ended it also tells how (`made_by`), for those who read the results.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        name: str,
        config: ConfigDict,
        fields: Sequence[str],
        after: Sequence["StageFolder"] = (),
        without: Sequence[str] = (),
        **inputs: str,
    ):
        self.name, self.folder = name, epath.Path(workdir) / name
        made_with = recorded_fields(config, fields, without) | inputs
        made_with |= {f"stage {stage.name}": stage.fingerprint for stage in after}
        self.made_with = json.loads(json.dumps(made_with))  # as read_marker will return it

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.made_with, sort_keys=True).encode()).hexdigest()[:16]

    def done(self) -> bool:
        """Whether the stage has ended with this config. Raises InputError if it was begun with another config."""
        marker = read_marker(self.folder)
        if marker is None:
            return False
        if marker["made_with"] != self.made_with:
            changes = describe_changes(marker["made_with"], self.made_with)
            raise InputError(f"{self.folder / MARKER}: made with another config: {changes}; use another --workdir")
        return marker["complete"]

    def begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._mark(complete=False)

    def end(self, **more: Any) -> None:
        self._mark(complete=True, **more)

    def _mark(self, complete: bool, **more: Any) -> None:
        marker = {"stage": self.name, "format_version": FORMAT_VERSION, "complete": complete}
        write_json(self.folder / MARKER, marker | {"made_with": self.made_with} | more)

    def run(self, work, *arguments: Any, all_processes: bool = False) -> None:
        """Runs `work` unless the stage is done already; then says that it was skipped.

        With several processes, process 0 alone works while the others wait; with `all_processes` all of them work.
        Process 0 reads and writes the marker in both cases. Raises InputError if another run works on the stage.
        """

        def perform() -> None:
            work(*arguments)  # no return: `on_first` would send the result to all processes as JSON

        done = processes.on_first(self.done)
        if not done:
            with locked(self.folder):
                done = processes.on_first(self.done)  # another run may have finished it meanwhile
                if not done:
                    resumed, began = processes.on_first((self.folder / MARKER).exists), time.monotonic()
                    processes.on_first(self.begin)
                    perform() if all_processes else processes.on_first(perform)
                    processes.on_first(lambda: self.end(made_by=made_by(time.monotonic() - began, resumed)))
                    return
        say(f"{self.name}: up to date, skipped")


def made_by(seconds: float, resumed: bool) -> dict[str, Any]:
    """How a stage was made: the command, the machine, when it ended, and the `seconds` of wall time.

    If it was `resumed`, the seconds are those of the command that ended it.
    """
    program = pathlib.Path(sys.argv[0]).name.replace("__main__.py", "jsurgery")
    return {
        "command": shlex.join([program, *sys.argv[1:]]),
        "machine": describe_machine(),
        "ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "resumed": resumed,
    }


def read_marker(folder: epath.Path) -> dict[str, Any] | None:
    """The marker of a stage's folder, with `complete` and `made_with`; None if the folder has no marker.

    Raises InputError for a damaged marker, and for one of another format version.
    """
    path = folder / MARKER
    if not path.exists():
        return None
    marker = read_object(path, "the marker of a stage")
    if (version := marker.get("format_version", 1)) != FORMAT_VERSION:
        raise InputError(
            f"{path}: made by another version of jsurgery: expected format {FORMAT_VERSION}, found {version!r}; "
            "use another --workdir"
        )
    if not isinstance(marker.get("made_with"), dict) or not isinstance(marker.get("complete"), bool):
        raise InputError(f"{path}: damaged: expected the marker of a stage, found {shortened(marker)}")
    return marker
