"""The records of finished batches, kept until the whole is written: stopped work goes on after the last of them."""

from collections.abc import Iterable, Iterator, Sequence

from etils import epath

from jsurgery.data.shards import Record, Records, shard_path, write_shard


class BatchFiles:
    """A folder with a file of records for each finished batch of `items`, the numbers of what is made.

    Batches of another `size` are other batches: they do not count as finished.
    """

    def __init__(self, folder: epath.Path, items: range, size: int):
        self.folder, self.items, self.size = folder, items, size
        self.files = folder / f"batches_of_{size}"

    def batches(self) -> Iterator[tuple[int, range]]:
        """The number of each batch, and its items."""
        return enumerate(self.items[start : start + self.size] for start in range(0, len(self.items), self.size))

    def finished(self) -> list[int]:
        """The numbers of the finished batches."""
        return [number for number, _ in self.batches() if shard_path(self.files, number).exists()]

    def write(self, number: int, records: Sequence[Record]) -> None:
        write_shard(shard_path(self.files, number), records)

    def records(self, positions: Iterable[int] | None = None) -> list[Record]:
        """The records at these positions in `items`, by default all of them, once all batches are finished."""
        found = Records(self.files)
        assert len(found) == len(self.items), f"{self.files}: expected {len(self.items)} records, found {len(found)}"
        return [found[position] for position in (range(len(found)) if positions is None else positions)]

    def remove(self) -> None:
        if self.folder.exists():
            self.folder.rmtree()
