"""The files of an export. Beside each lies a JSON record of how it was made."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

from jsurgery.io.files import write_json
from jsurgery.io.hashes import size_and_sha256
from jsurgery.runtime.progress import clock, say

from .formats import SUFFIXES


@dataclasses.dataclass(frozen=True)
class Artefact:
    """A part in one format and precision: a file, and a JSON record beside it, which is written last."""

    folder: pathlib.Path
    format: str
    precision: str
    part: str
    variant: str = ""  # the chip, of formats that compile for one

    @property
    def path(self) -> pathlib.Path:
        name = ".".join(filter(None, (self.part, self.variant, self.precision)))
        return self.folder / self.format / (name + SUFFIXES[self.format])

    @property
    def record_path(self) -> pathlib.Path:
        return self.path.with_name(self.path.name + ".json")

    def record(self, fingerprint: str) -> dict[str, Any] | None:
        """The artefact's record; None if a file is missing, is not complete or was made by another job."""
        if not self.record_path.exists() or not self.path.exists():
            return None
        record = json.loads(self.record_path.read_text())
        same = record["made_with"] == fingerprint and record["bytes"] == self.path.stat().st_size
        return record if same else None

    def finish(self, fingerprint: str, written: pathlib.Path, facts: dict[str, Any]) -> dict[str, Any]:
        """Renames the finished temporary file `written` and writes the record, which it returns."""
        size, sha256 = size_and_sha256(written)
        written.replace(self.path)
        record = {
            "part": self.part,
            "format": self.format,
            "precision": self.precision,
            **({"chip": self.variant} if self.variant else {}),
            "file": f"{self.format}/{self.path.name}",
            "bytes": size,
            "sha256": sha256,
            "made_with": fingerprint,
            **facts,
        }
        write_json(self.record_path, record)
        return record


def make_all(
    fingerprint: str, artefacts: Iterable[Artefact], make: Callable[[Artefact, pathlib.Path], dict[str, Any]]
) -> None:
    """Makes the artefacts that are missing. `make(artefact, file)` writes the file and returns facts for its record."""
    artefacts = list(artefacts)
    for number, artefact in enumerate(artefacts, start=1):
        if artefact.record(fingerprint) is not None:
            continue
        began = time.monotonic()
        artefact.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = artefact.path.with_name(f"tmp.{artefact.path.name}")
        facts = make(artefact, temporary)
        record = artefact.finish(fingerprint, temporary, facts)
        note = f"{record['bytes'] / 1e6:.1f} MB"
        if record.get("relative_error") is not None:
            note += f", error {record['relative_error']:.1e}"
        took = clock(time.monotonic() - began)
        say(f"export: {artefact.format} {number}/{len(artefacts)}  {artefact.path.name}  {note}, {took}")
