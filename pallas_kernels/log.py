"""What the log says where a kernel does not take the arguments, so that another implementation has to."""

import functools
import logging


@functools.cache
def once(line: str) -> None:
    """Logs a warning, unless this process has logged the same line before."""
    logging.getLogger("pallas_kernels").warning(line)
