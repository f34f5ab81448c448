"""Training state in Orbax: written asynchronously, resumed from the newest, sharded as it was asked for."""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath


class Checkpoints:
    """Checkpoints of one stage's training state, any pytree of arrays."""

    def __init__(self, folder: epath.PathLike, *, every: int, keep: int):
        options = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=keep)
        self.manager = ocp.CheckpointManager(epath.Path(folder).resolve(), options=options)

    def restore(self, state: Any) -> tuple[int, Any]:
        """(step, state) of the newest checkpoint, placed like `state`; (0, state) when there is none."""
        step = self.manager.latest_step()
        if step is None:
            return 0, state
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        return step, self.manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def save(self, step: int, state: Any, *, last: bool = False) -> None:
        """Saves when the interval asks for it, or when this is the last step."""
        self.manager.save(step, args=ocp.args.StandardSave(state), force=last and self.manager.latest_step() != step)

    def close(self) -> None:
        self.manager.wait_until_finished()
        self.manager.close()
