"""What a command can end with besides success; the exit codes are part of the interface."""


class InputError(Exception):
    """Bad input. The message is one line: the file or field, what was expected, what was found. Exit code 2."""


class DoesNotFit(Exception):
    """The work does not fit the hardware asked for. Exit code 3."""


class ParityError(Exception):
    """A measured difference exceeds its documented bound. Exit code 4."""
