"""Prompts: the lines of a file, or captions of procedural clips."""

from etils import epath
from ml_collections import ConfigDict

from jsurgery.data import sprites
from jsurgery.errors import InputError
from jsurgery.io.files import decode_text

SPRITE_PROMPTS = 10_000_000  # scenes numbered from here on are prompts; training clips are numbered from 0


def read_prompts(path: str, flag: str = "--prompts_file=") -> list[str]:
    """The lines of a file that are not blank. Raises InputError naming the file as `flag` + `path`."""
    try:
        lines = decode_text(epath.Path(path).read_bytes()).split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{flag}{path}: expected a text file in UTF-8 or UTF-16 ({error})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{flag}{path}: expected one prompt a line, found none")
    return prompts


def load_prompts(config: ConfigDict, count: int, *, skip: int = 0) -> list[str]:
    """`count` prompts after the first `skip`: lines of the file `config.prompts`, or captions of procedural clips.

    Raises InputError if there are too few.
    """
    if config.prompts == "sprites":
        numbers = range(SPRITE_PROMPTS + skip, SPRITE_PROMPTS + skip + count)
        return [sprites.scene_at(config.seed, i, two_sprites=config.data.two_sprites).caption for i in numbers]
    path = epath.Path(config.prompts)
    if not path.exists():
        raise InputError(f"config.prompts: {config.prompts}: no such file; expected one prompt a line, or 'sprites'")
    lines = read_prompts(config.prompts, flag="config.prompts: ")
    if len(lines) < skip + count:
        raise InputError(f"config.prompts: {config.prompts}: expected {skip + count} prompts, found {len(lines)}")
    return lines[skip : skip + count]
