"""The measurements of one seed in one file, a line of JSON for each measured stage."""

import json
import os
from typing import Any

from etils import epath

from jsurgery.errors import InputError, shortened
from jsurgery.io.fields import describe_changes
from jsurgery.io.files import replacing
from jsurgery.runtime.stage_folder import StageFolder

LINE = {"stage": str, "made_with": dict, "files": dict}


class MeasurementFile:
    """Lines {"stage": its name, "made_with": {setting: value}, "files": {file name: content}}, one for each stage.

    The file is always replaced whole, so that a killed run leaves no half line. Runs that measure different seeds may
    work at the same time, each on its own file.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        self._lines: dict[str, dict[str, Any]] | None = None  # by stage; None before the file was read

    def read(self, stage: StageFolder) -> dict[str, Any]:
        """The contents of a stage's files by file name, not to be changed; none if the stage was not measured.

        Raises InputError if the file is damaged, or if the stage was measured with other settings.
        """
        if self._lines is None:
            self._lines = self._read_lines()
        line = self._lines.get(stage.name, {"made_with": stage.made_with, "files": {}})
        if line["made_with"] != stage.made_with:
            changes = describe_changes(line["made_with"], stage.made_with)
            raise InputError(
                f"{self.path}: {stage.name}: made with another config: {changes}; use another --measurements folder"
            )
        return line["files"]

    def add(self, stage: StageFolder, files: dict[str, Any]) -> None:
        """Writes further files of a stage, which keeps those that it has."""
        self._lines = self._read_lines()  # another run may have added lines
        content = json.loads(json.dumps(files))  # as later runs read it
        line = {"stage": stage.name, "made_with": stage.made_with, "files": self.read(stage) | content}
        self._lines[stage.name] = line
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path, f"{self.path.name}.{os.getpid()}.tmp") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self._lines.values()))

    def _read_lines(self) -> dict[str, dict[str, Any]]:
        lines: dict[str, dict[str, Any]] = {}
        if not self.path.exists():
            return lines
        for number, text in enumerate(self.path.read_bytes().splitlines() or [b""], 1):
            where = f"{self.path}: line {number}"
            try:
                line = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{where}: damaged or cut ({error}); without this line, its stage is measured again"
                ) from None
            keys_fit = isinstance(line, dict) and line.keys() == LINE.keys()
            if not keys_fit or not all(isinstance(line[key], kind) for key, kind in LINE.items()):
                raise InputError(f"{where}: expected an object of {', '.join(LINE)}, found {shortened(line)}")
            if line["stage"] in lines:
                raise InputError(f"{where}: expected one line for each stage, found a second of {line['stage']}")
            lines[line["stage"]] = line
        return lines
