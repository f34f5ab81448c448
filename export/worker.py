"""One format of an export, in a process of its own: its libraries change settings that the others' would not survive.

python -m jsurgery.export.worker FORMAT FOLDER [CHOICE ...]
"""

import importlib
import logging
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jsurgery.errors import InputError
from jsurgery.runtime.progress import clock, say

from .parent import end_with_parent
from .parts import Artefact, Job

Make = Callable[[Artefact, pathlib.Path], dict[str, Any]]
LOG = "{}.log"  # of a format


def make_all(job: Job, artefacts: Iterable[Artefact], make: Make) -> None:
    """`make(artefact, file)` for each that is not there yet: it writes the file and returns what is recorded of it."""
    artefacts = list(artefacts)
    for number, artefact in enumerate(artefacts, start=1):
        if artefact.record(job.fingerprint) is not None:
            continue
        began = time.monotonic()
        artefact.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = artefact.path.with_name(f"tmp.{artefact.path.name}")
        facts = make(artefact, temporary)
        found = artefact.finish(job.fingerprint, temporary, facts)
        note = f"{found['bytes'] / 1e6:.1f} MB"
        if found.get("relative_error") is not None:
            note += f", error {found['relative_error']:.1e}"
        took = clock(time.monotonic() - began)
        say(f"export: {artefact.format} {number}/{len(artefacts)}  {artefact.path.name}  {note}, {took}")


def divert(file: pathlib.Path) -> None:
    """What native libraries print goes to a file; Python's own lines stay where they were."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    with file.open("wb") as log:
        os.dup2(log.fileno(), 2)


def main(arguments: Sequence[str]) -> int:
    end_with_parent()
    format, folder, *choices = arguments
    divert(pathlib.Path(folder) / LOG.format(format))
    logging.disable(logging.WARNING)  # what the libraries miss or will change, none of it for whoever runs this
    warnings.simplefilter("ignore")
    try:
        module = importlib.import_module(f"jsurgery.export.{format}")
        module.export(Job.read(folder), pathlib.Path(folder), tuple(choices))
    except InputError as error:
        (pathlib.Path(folder) / "error.txt").write_text(str(error))  # for the command to tell
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
