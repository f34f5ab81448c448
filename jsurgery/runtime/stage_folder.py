"""Stages of a run: which files a stage leaves, what they depend on, and whether they are there already."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from jsurgery.config import recorded_fields
from jsurgery.errors import InputError
from jsurgery.io.fields import describe_changes
from jsurgery.io.files import read_object, shortened, write_json
from jsurgery.runtime import processes
from jsurgery.runtime.lock import locked
from jsurgery.runtime.progress import say

MARKER = "stage.json"
FORMAT_VERSION = 1  # of what stages leave; to be raised when another version could misread it


class StageFolder:
    """A stage's folder in the workdir and the marker that says with what it was made; its last writing ends the stage.

    `fields` are the config fields (or whole sections, but for the fields of `without`) that change the result, `after`
    the stages whose results it reads.
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
        self.made_with = json.loads(json.dumps(made_with))  # as it will be read

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.made_with, sort_keys=True).encode()).hexdigest()[:16]

    def done(self) -> bool:
        """Whether the stage has ended with this config. Raises InputError when it was begun with another one."""
        found = read_marker(self.folder)
        if found is None:
            return False
        if found["made_with"] != self.made_with:
            changes = describe_changes(found["made_with"], self.made_with)
            raise InputError(f"{self.folder / MARKER}: made with another config: {changes}; use another --workdir")
        return found["complete"]

    def begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._mark(complete=False)

    def end(self) -> None:
        self._mark(complete=True)

    def _mark(self, complete: bool) -> None:
        marker = {"stage": self.name, "format_version": FORMAT_VERSION, "complete": complete}
        write_json(self.folder / MARKER, marker | {"made_with": self.made_with})

    def run(self, work, *arguments: Any, all_processes: bool = False) -> None:
        """Runs `work` unless the stage is done already, and says which.

        With several processes, process 0 alone looks, works and marks while the others wait; with `all_processes` they
        all work.
        Raises InputError when another run is at it.
        """

        def perform() -> None:
            work(*arguments)  # its result is nobody's

        done = processes.on_first(self.done)
        if not done:
            with locked(self.folder):
                done = processes.on_first(self.done)  # another run may have ended it by now
                if not done:
                    processes.on_first(self.begin)
                    perform() if all_processes else processes.on_first(perform)
                    processes.on_first(self.end)
                    return
        say(f"{self.name}: up to date, skipped")


def read_marker(folder: epath.Path) -> dict[str, Any] | None:
    """The marker of a stage's folder, with `complete` and `made_with`; None where there is none.

    Raises InputError for a damaged marker and for that of another format version.
    """
    marker = folder / MARKER
    if not marker.exists():
        return None
    found = read_object(marker, "the marker of a stage")
    if (version := found.get("format_version", 1)) != FORMAT_VERSION:
        raise InputError(
            f"{marker}: made by another version: of format {version!r}, this jsurgery makes {FORMAT_VERSION}; "
            "use another --workdir"
        )
    if not isinstance(found.get("made_with"), dict) or not isinstance(found.get("complete"), bool):
        raise InputError(f"{marker}: damaged: expected the marker of a stage, found {shortened(found)}")
    return found
