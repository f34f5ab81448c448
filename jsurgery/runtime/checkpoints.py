"""Checkpoints of a training state: Orbax writes them in the background, a manifest of hashes completes each."""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from etils import epath

from jsurgery.errors import InputError, file_system_reason
from jsurgery.io.hashes import MANIFEST, find_damage, write_manifest
from jsurgery.runtime import processes
from jsurgery.runtime.agreement import Agreement
from jsurgery.runtime.progress import say


class Checkpoints:
    """Checkpoints of one stage's training state, any pytree of arrays, each in a folder named by its step.

    A checkpoint is due every `every` steps and, unless `minutes` is 0, in the first step that ends so long after the
    last save began. The clock of process 0 decides that; several processes save one step later. The newest `keep`
    checkpoints stay, and those whose step is a multiple of `keep_every` (0: no others). While a successor is written,
    one more is there: fine-tuning 1.42 B parameters with keep=1 takes twice 17 GB, twice 23 GB with averaged weights.
    Orbax writes a checkpoint in the background. Then process 0 hashes its files and writes the manifest, which makes
    the checkpoint complete. A checkpoint without a manifest comes from a save that was cut short, and is ignored.
    `on_damage` says what to do if the files of a complete checkpoint do not match its manifest: "stop", or resume from
    an "older" checkpoint.

    Leaving the `with` block waits for the save in progress. Raises InputError, there or at the next save, if the file
    system refuses a save; earlier checkpoints stay.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        every: int,
        keep: int,
        keep_every: int = 0,
        minutes: float = 0,
        on_damage: str = "stop",
    ):
        self.folder = epath.Path(folder)
        if "://" not in str(folder):  # `resolve` would take gs:// for a relative path
            self.folder = self.folder.resolve()
        self.every, self.keep, self.keep_every, self.on_damage = every, keep, keep_every, on_damage
        self.minutes, self._began, self._late = minutes, time.monotonic(), Agreement(processes.several())
        self.saved: int | None = None  # the newest step that is saved or being saved
        self._orbax = ocp.StandardCheckpointer()
        self._background, self._sealing = ThreadPoolExecutor(1), None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
        elif self._sealing is not None:  # `close` would wait for the others, which may have had no error
            wait([self._sealing])

    def complete_steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        numbered = [path for path in self._folders() if path.name.isdecimal()]
        return sorted(int(path.name) for path in numbered if (path / MANIFEST).exists())

    def restore(self, state: Any) -> tuple[int, Any]:
        """(step, state) of the newest complete checkpoint, sharded like `state`; (0, state) if there is none.

        First compares all files of the checkpoint with its manifest. Raises InputError naming the damaged files.
        """
        step = processes.on_first(self._newest_intact)
        if step is None:
            return 0, state
        self.saved = step
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        return step, self._orbax.restore(self.folder / str(step), abstract)

    def save(self, step: int, state: Any, *, last: bool = False, check: Callable[[], None] = lambda: None) -> None:
        """Saves if a checkpoint is due or this is the `last` step. Calls `check` first, which may raise an error.

        All processes must call it in every step.
        """
        due = self._is_late() or step % self.every == 0
        if step == self.saved or not (due or last):
            return
        check()
        self.wait()
        with self._explained(step):
            if processes.is_first():
                (self.folder / str(step) / MANIFEST).unlink(missing_ok=True)  # of a damaged checkpoint
            self._orbax.save(self.folder / str(step), state, force=True)
        self.saved, self._sealing = step, self._background.submit(self._seal, step)
        self._began = time.monotonic()
        self._late.forget()

    def _is_late(self) -> bool:
        """Whether the last save began too long ago. All processes must call it once in every step."""
        if not self.minutes:
            return False
        return bool(self._late.largest(processes.is_first() and time.monotonic() - self._began >= 60 * self.minutes))

    def wait(self) -> None:
        """Waits until the save in progress is complete, or has failed."""
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
            steps = self.complete_steps()
            left = f"the checkpoint of step {steps[-1]} is still there" if steps else "there is no earlier checkpoint"
            raise InputError(f"{self.folder / str(step)}: could not be saved: {reason}; {left}") from error

    def _seal(self, step: int) -> None:
        self._orbax.wait_until_finished()
        if processes.is_first():
            write_manifest(self.folder / str(step))
            self._prune()

    def _prune(self) -> None:
        """Removes all checkpoints that are not to be kept, and what interrupted saves left."""
        steps = self.complete_steps()
        stay = {*steps[-self.keep :], *(step for step in steps if self.keep_every and step % self.keep_every == 0)}
        for path in self._folders():
            if path.name not in map(str, stay):
                (path / MANIFEST).unlink(missing_ok=True)  # a kill from here on leaves an incomplete checkpoint
                path.rmtree()

    def _folders(self) -> list[epath.Path]:
        return [path for path in self.folder.iterdir() if path.is_dir()] if self.folder.is_dir() else []

    def _newest_intact(self) -> int | None:
        """The step of the newest checkpoint whose files match its manifest; later ones are removed."""
        for path in self._folders():
            if not (path / MANIFEST).exists():
                say(f"{path}: ignored, because it has no {MANIFEST}: its saving was cut short")
        steps, damaged, message = self.complete_steps(), list[epath.Path](), ""
        for step in reversed(steps):
            path = self.folder / str(step)
            if not (files := find_damage(path)):
                for path in damaged:
                    (path / MANIFEST).unlink()
                self._prune()
                return step
            damaged.append(path)
            message = f"{path}: damaged: {', '.join(files[:4])}" + (f" and {len(files) - 4} more" * (len(files) > 4))
            if self.on_damage == "stop":
                hint = "config.checkpoint.on_damage=older resumes from an older checkpoint"
                raise InputError(f"{message}; restore the file, or remove the folder; {hint}")
            say(f"{message}; trying an older checkpoint")
        if steps:
            raise InputError(f"{self.folder}: no checkpoint is intact; {message}; remove the folder to start again")
        return None
