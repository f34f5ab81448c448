"""Files of prompts."""

from etils import epath

from jsurgery.errors import InputError


def read_prompts(path: str, flag: str = "--prompts_file=") -> list[str]:
    """The lines of a file that are not blank; `flag` begins the name of the file in complaints."""
    try:
        lines = epath.Path(path).read_text().removeprefix("\ufeff").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{flag}{path}: expected a text file in UTF-8 ({error})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{flag}{path}: expected one prompt a line, found none")
    return prompts
