"""One format of an export, in a process of its own: its libraries change settings that the others' would not survive.

python -m jsurgery.export.worker FORMAT FOLDER [CHOICE ...]
"""

import importlib
import logging
import pathlib
import sys
import warnings
from collections.abc import Sequence

from jsurgery.errors import InputError

from .child_process import divert, end_with_parent
from .parts import ExportJob

LOG = "{}.log"  # of a format


def main(arguments: Sequence[str]) -> int:
    end_with_parent()
    format, folder, *choices = arguments
    divert(pathlib.Path(folder) / LOG.format(format))
    logging.disable(logging.WARNING)  # what the libraries miss or will change, none of it for whoever runs this
    warnings.simplefilter("ignore")
    try:
        module = importlib.import_module(f"jsurgery.export.{format}")
        module.export(ExportJob.read(folder), pathlib.Path(folder), tuple(choices))
    except InputError as error:
        (pathlib.Path(folder) / "error.txt").write_text(str(error))  # for the command to tell
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
