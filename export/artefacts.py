"""The files that an export leaves, each with a record of how it was made."""

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
    """A part in one format and precision: a file, and beside it a JSON that is written last."""

    folder: pathlib.Path
    format: str
    precision: str
    part: str
    variant: str = ""  # of a compiled format: the chip

    @property
    def path(self) -> pathlib.Path:
        name = ".".join(filter(None, (self.part, self.variant, self.precision)))
        return self.folder / self.format / (name + SUFFIXES[self.format])

    @property
    def record_path(self) -> pathlib.Path:
        return self.path.with_name(self.path.name + ".json")

    def record(self, fingerprint: str) -> dict[str, Any] | None:
        """What was recorded of it, if it is there and whole and was made by this job."""
        if not self.record_path.exists() or not self.path.exists():
            return None
        found = json.loads(self.record_path.read_text())
        same = found["made_with"] == fingerprint and found["bytes"] == self.path.stat().st_size
        return found if same else None

    def finish(self, fingerprint: str, written: pathlib.Path, facts: dict[str, Any]) -> dict[str, Any]:
        """Gives the file written under a temporary name its own, and records it."""
        size, sha256 = size_and_sha256(written)
        written.replace(self.path)
        found = {
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
        write_json(self.record_path, found)
        return found


Make = Callable[[Artefact, pathlib.Path], dict[str, Any]]


def make_all(fingerprint: str, artefacts: Iterable[Artefact], make: Make) -> None:
    """`make(artefact, file)` for each that is not there yet: it writes the file and returns what is recorded of it."""
    artefacts = list(artefacts)
    for number, artefact in enumerate(artefacts, start=1):
        if artefact.record(fingerprint) is not None:
            continue
        began = time.monotonic()
        artefact.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = artefact.path.with_name(f"tmp.{artefact.path.name}")
        facts = make(artefact, temporary)
        found = artefact.finish(fingerprint, temporary, facts)
        note = f"{found['bytes'] / 1e6:.1f} MB"
        if found.get("relative_error") is not None:
            note += f", error {found['relative_error']:.1e}"
        took = clock(time.monotonic() - began)
        say(f"export: {artefact.format} {number}/{len(artefacts)}  {artefact.path.name}  {note}, {took}")
