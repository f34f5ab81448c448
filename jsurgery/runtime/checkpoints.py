"""Training state in Orbax: written asynchronously, sealed by a manifest, resumed from the newest, sharded as asked."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from etils import epath

from jsurgery.errors import InputError, file_system_reason
from jsurgery.io.hashes import MANIFEST, find_damage, write_manifest
from jsurgery.runtime import processes
from jsurgery.runtime.progress import say


class Checkpoints:
    """Checkpoints of one stage's training state, any pytree of arrays, each in a folder named by its step.

    Every `every` steps one is due; the `keep` newest stay, and those of the multiples of `keep_every` (0: no others).
    Orbax commits a checkpoint in the background, then process 0 hashes its files: with the manifest, written last, it
    is whole. One without is what a kill in the middle of a save left, and as good as not there.
    `on_damage` is what to do when a whole checkpoint is not as it was written: "stop", or go on from an "older" one.

    Leaving the `with` block waits for the save under way. Raises InputError, here or at the next save, where the file
    system refuses one: what was saved before is still there.
    """

    def __init__(self, folder: epath.PathLike, *, every: int, keep: int, keep_every: int = 0, on_damage: str = "stop"):
        self.folder = epath.Path(folder)
        if "://" not in str(folder):  # `resolve` takes a bucket for a folder of the working directory
            self.folder = self.folder.resolve()
        self.every, self.keep, self.keep_every, self.on_damage = every, keep, keep_every, on_damage
        self.saved: int | None = None  # the newest step, under way or whole
        self._orbax = ocp.StandardCheckpointer()
        self._background, self._sealing = ThreadPoolExecutor(1), None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
        elif self._sealing is not None:  # the other processes may have had no error, and would not answer
            wait([self._sealing])

    def complete_steps(self) -> list[int]:
        """Steps of the checkpoints that have a manifest, ascending."""
        numbered = [path for path in self._folders() if path.name.isdecimal()]
        return sorted(int(path.name) for path in numbered if (path / MANIFEST).exists())

    def restore(self, state: Any) -> tuple[int, Any]:
        """(step, state) of the newest whole checkpoint, placed like `state`; (0, state) when there is none.

        All its files are compared with the manifest first. Raises InputError naming those that are damaged.
        """
        step = processes.on_first(self._intact)
        if step is None:
            return 0, state
        self.saved = step
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        return step, self._orbax.restore(self.folder / str(step), abstract)

    def save(self, step: int, state: Any, *, last: bool = False, check: Callable[[], None] = lambda: None) -> None:
        """Saves when the interval asks for it, or when this is the last step; `check` may object just before."""
        if step == self.saved or (step % self.every and not last):
            return
        check()
        self.wait()
        with self._explained(step):
            if processes.is_first():
                (self.folder / str(step) / MANIFEST).unlink(missing_ok=True)  # of one that was damaged
            self._orbax.save(self.folder / str(step), state, force=True)
        self.saved, self._sealing = step, self._background.submit(self._seal, step)

    def wait(self) -> None:
        """Until the save under way is whole, or has failed."""
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            processes.on_all(lambda: self._outcome(sealing))

    def close(self) -> None:
        self.wait()
        self._background.shutdown()
        self._orbax.close()

    def _outcome(self, sealing: Future) -> None:
        with self._explained(self.saved):
            sealing.result()

    @contextlib.contextmanager
    def _explained(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if (reason := file_system_reason(error)) is None:
                raise
            whole = self.complete_steps()
            left = f"the checkpoint of step {whole[-1]} is still there" if whole else "no checkpoint was written before"
            raise InputError(f"{self.folder / str(step)}: could not be saved: {reason}; {left}") from error

    def _seal(self, step: int) -> None:
        self._orbax.wait_until_finished()
        if processes.is_first():
            write_manifest(self.folder / str(step))
            self._prune()

    def _prune(self) -> None:
        """Removes what is neither new nor to be kept, leftovers of kills among it."""
        whole = self.complete_steps()
        stay = {*whole[-self.keep :], *(step for step in whole if self.keep_every and step % self.keep_every == 0)}
        for path in self._folders():
            if path.name not in map(str, stay):
                (path / MANIFEST).unlink(missing_ok=True)  # from here on it is not whole
                path.rmtree()

    def _folders(self) -> list[epath.Path]:
        return [path for path in self.folder.iterdir() if path.is_dir()] if self.folder.is_dir() else []

    def _intact(self) -> int | None:
        for path in self._folders():
            if not (path / MANIFEST).exists():
                say(f"{path}: has no {MANIFEST}: its saving was cut short; not used")
        whole, passed, told = self.complete_steps(), list[epath.Path](), ""
        for step in reversed(whole):
            path = self.folder / str(step)
            if not (found := find_damage(path)):
                for path in passed:
                    (path / MANIFEST).unlink()
                self._prune()
                return step
            passed.append(path)
            told = f"{path}: damaged: {', '.join(found[:4])}" + (f" and {len(found) - 4} more" * (len(found) > 4))
            if self.on_damage == "stop":
                hint = "config.checkpoint.on_damage=older goes on from an older one"
                raise InputError(f"{told}; restore the file, or remove the folder; {hint}")
            say(f"{told}; trying an older one")
        if whole:
            raise InputError(f"{self.folder}: no checkpoint is intact; {told}; remove the folder to begin anew")
        return None
