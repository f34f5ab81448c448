"""The document of results. Commands rewrite its tables, each between two comments that name it."""

from etils import epath

from jsurgery.errors import InputError


def update_results(document: epath.Path, table: str, text: str) -> None:
    """Puts a table between `<!-- begin TABLE -->` and `<!-- end TABLE -->`. Raises InputError if one is missing."""
    begin, end = f"<!-- begin {table} -->", f"<!-- end {table} -->"
    before, opened, rest = document.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise InputError(f"{document}: expected lines {begin} and {end}")
    document.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")
