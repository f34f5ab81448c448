"""Makes one format of an export in a process of its own, since its libraries change settings that others rely on.

python -m jsurgery.export.worker FORMAT FOLDER [CHOICE ...]
"""

import gc
import importlib
import logging
import pathlib
import sys
import warnings
from collections.abc import Sequence

from jsurgery.errors import InputError

from .child_process import divert, end_with_parent
from .parts import ExportJob

LOG = "{}.log"  # file name, by format


def main(arguments: Sequence[str]) -> int:
    """Runs the format's `export`. Exit code 2: bad input, described in `error.txt` in the export folder."""
    end_with_parent()
    format, folder, *choices = arguments
    divert(pathlib.Path(folder) / LOG.format(format))
    # The libraries warn of optional packages and of coming changes, which the user cannot act on.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    try:
        module = importlib.import_module(f"jsurgery.export.{format}")
        # Conversions create millions of Python objects. Searching them all for garbage would take a tenth of the time.
        gc.freeze()
        gc.set_threshold(10_000, 10, 10)
        module.export(ExportJob.read(folder), pathlib.Path(folder), tuple(choices))
    except InputError as error:
        (pathlib.Path(folder) / "error.txt").write_text(str(error))  # the command reports it
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
