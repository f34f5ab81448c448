"""Finds clips with their captions: in a folder, or in an index as people write them.

A row that cannot be used becomes a clip with a problem, which names it. Only an index without one usable row is
refused. Imports no JAX, except to say what was left out.
"""

import collections
import csv
import io
import itertools
import json
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from jsurgery.data.video_reader import Clip
from jsurgery.errors import InputError
from jsurgery.io.files import decode_text

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".webm")  # of the videos that are looked for in a folder
# Of other videos and animations, which are counted and left out.
OTHER_SUFFIXES = (
    ".3gp", ".asf", ".flv", ".gif", ".m2ts", ".mpeg", ".mts", ".mxf", ".ogv", ".rmvb", ".ts", ".vob", ".webp", ".wmv",
)  # fmt: skip
INDEXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
# Names of columns, the first of these that a row has counts. They are compared without case.
PATH_COLUMNS = (
    "path", "video", "video_path", "file_name", "filename", "file", "file_path", "filepath", "media_path", "videos",
)  # fmt: skip
CAPTION_COLUMNS = ("cap", "caption", "text", "prompt", "description", "captions")
DELIMITERS = ",;\t|"
# Files of a folder that hold the captions of its clips: an index, or two lists of as many lines.
FOLDER_INDEXES = ("metadata.jsonl", "metadata.csv", "metadata.json")
VIDEO_LIST, CAPTION_LISTS = "videos.txt", ("prompts.txt", "prompt.txt", "captions.txt")
NO_CAPTION = "no caption"
LONGEST_FIELD = 1 << 20  # characters
Row = dict[Any, Any] | str  # a row, or what is wrong with it


def find_clips(videos: str, root: str | None = None) -> list[Clip]:
    """The clips of a folder (each with its caption in a .txt beside it) or of an index of INDEXES.

    A row of an index has a path (PATH_COLUMNS), relative to `root` (default: the folder of the index), and a caption
    (CAPTION_COLUMNS), or a list whose first entry counts. A folder without a .txt beside any video may have an index of
    FOLDER_INDEXES, or VIDEO_LIST and one of CAPTION_LISTS. A path that leads out of `root`, and a row that cannot be
    read, gives a clip with a `problem`. Raises InputError for an index in which no row can be read.
    """
    source = epath.Path(videos)
    if not source.exists():
        raise InputError(f"--videos={videos}: no such file or folder")
    if source.is_dir():
        clips = _clips_of_folder(source)
        if not any(clip.caption for clip in clips) and (found := _rows_of_folder(source)) is not None:
            clips = _indexed_clips(*found, root)
    else:
        clips = _indexed_clips(source, _read_rows(source), root)
    if not clips:
        raise InputError(f"--videos={videos}: expected clips ({', '.join(SUFFIXES)}) or an index of them, found none")
    return clips


def check_usable(clips: Sequence[Clip], limit: float) -> None:
    """Raises InputError if more than the fraction `limit` of the clips has a problem, as is known before decoding."""
    faulty = [clip for clip in clips if clip.problem]
    if len(faulty) > limit * len(clips):
        captions = f"; captions are in NAME.txt beside each video, or in {FOLDER_INDEXES[1]}"
        raise InputError(
            f"config.data.max_skipped: {limit}; {len(faulty)} of {len(clips)} clips cannot be used, such as "
            f"{faulty[0].path} ({faulty[0].problem}){captions if faulty[0].problem == NO_CAPTION else ''}"
        )


def _rows_of_folder(folder: epath.Path) -> tuple[epath.Path, list[Row]] | None:
    """(a file with the captions of a folder's clips, its rows), or None without one."""
    for index in (folder / name for name in FOLDER_INDEXES):
        if index.exists():
            return index, _read_rows(index)
    captions = next((folder / name for name in CAPTION_LISTS if (folder / name).exists()), None)
    videos = folder / VIDEO_LIST
    if captions is None or not videos.exists():
        return None
    lines = lambda file: decode_text(file.read_bytes(), errors="replace").rstrip().split("\n")
    names, texts = lines(videos), lines(captions)
    if len(names) != len(texts):
        raise InputError(f"{videos}: {len(names)} lines, but {captions.name} has {len(texts)}")
    return videos, [{"path": name, "caption": text} for name, text in zip(names, texts, strict=True)]


def _absolute(path: epath.Path) -> epath.Path:
    """The path without links and `..`. epath's `resolve` would take a path on gs:// for a local one."""
    if str(path).startswith("gs://"):
        return epath.Path("gs://" + posixpath.normpath(str(path).removeprefix("gs://")))
    return path.resolve()


def _indexed_clips(index: epath.Path, rows: Sequence[Row], root: str | None) -> list[Clip]:
    folder = _absolute(index.parent if root is None else epath.Path(root))
    return [_indexed_clip(index, number, row, folder) for number, row in enumerate(rows, 1)]


def _clips_of_folder(folder: epath.Path) -> list[Clip]:
    found, others, hidden = [], collections.Counter(), 0
    for path in _walk(folder):
        suffix = path.suffix.lower()
        if any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts):
            hidden += suffix in SUFFIXES  # the Mac's twins of files, checkpoints of notebooks, bins
        elif suffix in SUFFIXES:
            found.append(path)
        else:
            others[suffix] += suffix in OTHER_SUFFIXES
    left_out = [f"{count} {suffix}" for suffix, count in sorted(others.items()) if count]
    left_out += [f"{hidden} hidden"] if hidden else []
    if left_out:
        from jsurgery.runtime.progress import say

        say(f"{folder}: {', '.join(left_out)} left out; taken are {', '.join(SUFFIXES)}")
    return [_clip(path, _read_caption(path.with_suffix(".txt"))) for path in found]


def _walk(folder: epath.Path, above: tuple[str, ...] = ()) -> Iterator[epath.Path]:
    above = (*above, _resolved(folder))
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if _resolved(path) not in above:  # a link to a folder above would not end
                yield from _walk(path, above)
        else:
            yield path


def _resolved(path: epath.Path) -> str:
    """The path without links, which epath's `resolve` leaves in."""
    return str(path) if "://" in str(path) else os.path.realpath(path)


def _read_caption(path: epath.Path) -> str:
    return decode_text(path.read_bytes(), errors="replace") if path.exists() else ""


def _clip(path: epath.PathLike, caption: Any, problem: str = "") -> Clip:
    if isinstance(caption, list | tuple):
        caption = caption[0] if caption else ""
    caption = caption.strip() if isinstance(caption, str) else ""
    if caption and not problem and caption != caption.encode(errors="replace").decode():
        problem = "caption is not UTF-8"
    return Clip(str(path), caption, problem or ("" if caption else NO_CAPTION))


def _value(row: dict[Any, Any], columns: Sequence[str]) -> Any:
    """The value of the first of the columns that the row has and that is not empty; None without one."""
    named = {name.strip().lower(): value for name, value in row.items() if isinstance(name, str)}
    return next((named[column] for column in columns if named.get(column)), None)


def _indexed_clip(index: epath.Path, number: int, row: Row, folder: epath.Path) -> Clip:
    if isinstance(row, str):
        return Clip(f"{index}: row {number}", "", row)
    name, caption = _value(row, PATH_COLUMNS), _value(row, CAPTION_COLUMNS)
    if None in row:
        return Clip(f"{index}: row {number}", "", "more values than columns; a text with the delimiter needs quotes")
    if not isinstance(name, str):
        return Clip(f"{index}: row {number}", "", f"expected a path ({', '.join(PATH_COLUMNS)}), found {str(row)[:80]}")
    if "://" in name and not name.startswith("gs://"):
        return _clip(name, caption, "an address, not a file")
    try:
        path = _absolute(epath.Path(name) if name.startswith("gs://") else folder / name)
        name.encode()
    except (ValueError, OSError, RuntimeError) as error:  # null bytes, lone surrogates, circular links
        return _clip(folder / repr(name), caption, f"no path: {error}")
    return _clip(path, caption, "" if path.is_relative_to(folder) else f"outside of {folder}")


def _read_rows(index: epath.Path) -> list[Row]:
    """The rows of an index. Raises InputError if it has rows and none of them has a path and a caption."""
    suffix = index.suffix.lower()
    if suffix not in INDEXES:
        raise InputError(f"--videos={index}: expected a folder, or a file of {', '.join(INDEXES)}")
    if suffix == ".parquet":
        rows = _read_parquet(index)
    else:
        try:
            text = decode_text(index.read_bytes(), errors="surrogateescape")
        except (OSError, ValueError) as error:
            raise InputError(f"{index}: expected text in UTF-8 ({error})") from None
        rows = {".jsonl": _read_jsonl, ".json": _read_json}.get(suffix, _read_csv)(text, index)
    for columns, what in ((PATH_COLUMNS, "a path"), (CAPTION_COLUMNS, "a caption")):
        usable = (isinstance(row, dict) and _value(row, columns) is not None for row in rows)
        if rows and not any(usable):
            first = next((row for row in rows if isinstance(row, dict)), rows[0])
            found = ", ".join(map(str, first)) if isinstance(first, dict) else f"row 1: {first}"
            found = found[:200] or "no columns"
            raise InputError(f"{index}: expected a column with {what} ({', '.join(columns)}), found {found}")
    return rows


def _read_jsonl(text: str, index: epath.Path) -> list[Row]:
    # Not splitlines: JSON may hold U+2028 as it is.
    return [_parsed(line) for line in text.split("\n") if line.strip()]


def _read_json(text: str, index: epath.Path) -> list[Row]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{index}: expected JSON ({error})") from None
    if isinstance(rows, dict):  # {"data": […]} and the like
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else rows
    if not isinstance(rows, list):
        raise InputError(f"{index}: expected a JSON list, found {str(rows)[:80]!r}")
    return [row if isinstance(row, dict) else f"expected an object, found {str(row)[:80]!r}" for row in rows]


def _parsed(line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"expected JSON ({error})"
    return row if isinstance(row, dict) else f"expected an object, found {str(row)[:80]!r}"


def _read_csv(text: str, index: epath.Path) -> list[Row]:
    """Rows between commas, semicolons, tabs or bars, whichever divides the header line into known columns.

    Quotes that are not closed would join all later rows into one: the lines are then read one by one.
    """
    csv.field_size_limit(LONGEST_FIELD)
    header, rest = (*re.split(r"\r\n|\n|\r", text.lstrip("\r\n"), maxsplit=1), "")[:2]
    known = {*PATH_COLUMNS, *CAPTION_COLUMNS}
    count = lambda delimiter: sum(name.strip(' "').lower() in known for name in header.split(delimiter))
    delimiter = max(DELIMITERS, key=count)
    names = next(iter(csv.reader([header], delimiter=delimiter)), [])
    try:
        rows: list[Row] = list(_dictionaries(names, io.StringIO(rest, newline=""), delimiter))
    except csv.Error:
        lines = re.split(r"\r\n|\n|\r", rest)
        rows = list(itertools.chain.from_iterable(_read_line(names, line, delimiter) for line in lines))
    return rows


def _dictionaries(names: list[str], lines: Any, delimiter: str) -> Iterator[Row]:
    yield from csv.DictReader(lines, names, strict=True, delimiter=delimiter)


def _read_line(names: list[str], line: str, delimiter: str) -> list[Row]:
    try:
        return list(_dictionaries(names, [line], delimiter))
    except csv.Error as error:
        return [f"expected CSV ({error}): {line[:80]}"]


def _read_parquet(index: epath.Path) -> list[Row]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            f"--videos={index}: reading parquet needs pyarrow: `pip install 'jsurgery[parquet]'`"
        ) from None
    known = {*PATH_COLUMNS, *CAPTION_COLUMNS}
    try:
        with index.open("rb") as file:
            table = pyarrow.parquet.ParquetFile(file)
            names = [name for name in table.schema_arrow.names if name.strip().lower() in known]
            if not names:
                raise InputError(f"{index}: expected columns of {', '.join(PATH_COLUMNS)}, found others")
            return table.read(names).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{index}: expected a parquet file ({error})") from None
