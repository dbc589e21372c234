"""Checkpoints: the state, the data position and the config of one step, together, by Orbax."""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from audiolm_jax.objective import Objective, State

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of a training workdir; a context manager that waits for the last save."""

    def __init__(self, workdir: pathlib.Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(
            (workdir / FOLDER).resolve(), item_names=("state", "data", "config"), options=options
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_):
        self._manager.close()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: State, data_position: dict[str, Any], description: dict[str, Any]):
        """Starts saving; the state may be donated once this returns.

        Args:
          step: of the state.
          state: arrays.
          data_position: where the training input stands.
          description: the config and what the data were made with, so that a checkpoint explains itself.
        """
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data_position),
            config=ocp.args.JsonSave(description),
        )
        self._manager.save(step, args=arguments)

    def wait(self):
        """Returns once the last save is complete on disk."""
        self._manager.wait_until_finished()

    def description(self, step: int) -> dict[str, Any]:
        """What `save` was given."""
        arguments = ocp.args.Composite(config=ocp.args.JsonRestore())
        return self._manager.restore(step, args=arguments)["config"]

    def restore(self, step: int, abstract_state: State) -> tuple[State, dict[str, Any]]:
        """The state, laid out as `abstract_state`'s shardings say, and the data position."""
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=arguments)
        return restored["state"], restored["data"]


def find_checkpoint(folder: pathlib.Path) -> pathlib.Path | None:
    """The last complete checkpoint of a workdir, or the folder itself where it is a checkpoint; else None."""
    if (folder / "state").is_dir() and (folder / "config").is_dir():
        return folder
    steps = [path for path in (folder / FOLDER).glob("*") if path.name.isdigit()]
    return max(steps, key=lambda path: int(path.name), default=None)


def read_description(checkpoint: pathlib.Path) -> dict[str, Any]:
    """What `Checkpoints.save` was given as the description of this checkpoint."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore((checkpoint / "config").resolve())


def restore_weights(folder: pathlib.Path, abstract_state: State, objective: Objective) -> State:
    """Only what inference needs of one checkpoint (`objective.weights`), as NumPy arrays.

    Args:
      folder: `WORKDIR/checkpoints/STEP`.
      abstract_state: unboxed, as the objective's `init` gives it.
      objective: whose checkpoint it is.
    """
    wanted = objective.weights(abstract_state)
    skipped = {name: jax.tree.map(lambda _: ocp.PLACEHOLDER, tree) for name, tree in abstract_state.items()}
    target = {**skipped, **wanted}
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            (folder / "state").resolve(), args=ocp.args.PyTreeRestore(item=target, restore_args=restore_args)
        )
    return {name: restored[name] for name in wanted}
