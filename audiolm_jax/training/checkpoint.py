"""Checkpoints: the state, the data position and the config of one step, together, by Orbax."""

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN, PreservationPolicy

from audiolm_jax import files
from audiolm_jax.objective import State

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of a training workdir, the latest and the best; a context manager that waits for the last save.

    Every process of a run takes part in saving and restoring.
    """

    def __init__(self, workdir: epath.Path, keep: int, keep_best: int):
        kept: list[PreservationPolicy] = [LatestN(keep)]
        if keep_best:
            best = BestN(
                get_metric_fn=lambda metrics: metrics["eval_loss"],
                reverse=True,
                n=keep_best,
                keep_checkpoints_without_metrics=False,
            )
            kept.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(kept),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(
            files.absolute(workdir / FOLDER), item_names=("state", "data", "config"), options=options
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_):
        self._manager.close()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: State,
        data_position: dict[str, Any],
        description: dict[str, Any],
        eval_loss: float | None,
    ):
        """Starts saving; the state may be donated once this returns.

        Args:
          step: of the state.
          state: arrays.
          data_position: where the training input stands.
          description: the config and what the data were made with, so that a checkpoint explains itself.
          eval_loss: the held-out loss of this very state, by which the best are kept; None where it was not measured.
        """
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data_position),
            config=ocp.args.JsonSave(description),
        )
        self._manager.save(step, args=arguments, metrics=None if eval_loss is None else {"eval_loss": eval_loss})

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


def find_checkpoint(folder: epath.Path) -> epath.Path | None:
    """The last complete checkpoint of a workdir, or the folder itself where it is a checkpoint; else None."""
    if (folder / "state").is_dir() and (folder / "config").is_dir():
        return folder
    numbered = [path for path in (folder / FOLDER).glob("*") if path.name.isdigit()]
    # In a bucket a checkpoint lies under its name while it is written.
    steps = [path for path in numbered if ocp.utils.is_checkpoint_finalized(path)]
    return max(steps, key=lambda path: int(path.name), default=None)


def read_description(checkpoint: epath.Path) -> dict[str, Any]:
    """What `Checkpoints.save` was given as the description of this checkpoint."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore(files.absolute(checkpoint / "config"))


def restore_weights(folder: epath.Path, abstract_state: State, wanted: State) -> State:
    """Some entries of one checkpoint's state, as NumPy arrays; nothing else is read.

    Args:
      folder: `WORKDIR/checkpoints/STEP`.
      abstract_state: unboxed, of the whole state.
      wanted: those of its entries that are to be read.
    """
    skipped = {name: jax.tree.map(lambda _: ocp.PLACEHOLDER, tree) for name, tree in abstract_state.items()}
    target = {**skipped, **wanted}
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            files.absolute(folder / "state"), args=ocp.args.PyTreeRestore(item=target, restore_args=restore_args)
        )
    return {name: restored[name] for name in wanted}
