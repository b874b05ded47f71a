"""Saving and restoring a run with Orbax: adapter, optimizer, step, key and data position; never the base."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxpeft.checkpoint.identity import differences
from jaxpeft.errors import CheckpointError, ConfigError

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run.

    A checkpoint holds `state` and, once there was an evaluation, `best` (trees of arrays), and `meta` (plain values: the
    run's identity and its progress). The data position is the step: batches are a function of seed and step.

    Args:
        folder: of the run's checkpoints.
        keep: how many of the newest to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, state: Any, best: Any | None, meta: Mapping[str, Any]) -> None:
        """Saves a step in the background; arrays are copied off the device before it returns.

        Args:
            step: optimizer steps done.
            state: tree of arrays.
            best: tree of arrays, or None while there is none.
            meta: plain JSON values.
        """
        if step in self._manager.all_steps():
            return
        items: dict[str, Any] = {"state": ocp.args.StandardSave(state), "meta": ocp.args.JsonSave(dict(meta))}
        if best is not None:
            items["best"] = ocp.args.StandardSave(best)
        with self._writing(step):
            self._manager.save(step, args=ocp.args.Composite(**items))

    def latest(self) -> int | None:
        """Gives the newest step that is saved, or None."""
        return self._manager.latest_step()

    def read_meta(self, step: int) -> dict[str, Any]:
        """Reads the plain values of a step.

        Raises:
            CheckpointError: they cannot be read.
        """
        return self._restore(step, meta=ocp.args.JsonRestore())["meta"]

    def check_identity(self, step: int, identity: Mapping[str, Any]) -> None:
        """Refuses to resume another run.

        Raises:
            ConfigError: a row for every field that changed since the checkpoint.
        """
        rows = differences(self.read_meta(step)["identity"], identity)
        if rows:
            head = (
                f"{self._folder} holds step {step} of another run; to resume it, undo these changes; "
                "to start anew, give another --workdir:"
            )
            raise ConfigError([head, *(f"  {row}" for row in rows)])

    def restore(self, step: int, state: Any, best: Any) -> tuple[Any, Any | None]:
        """Restores the arrays of a step, onto the devices of the examples.

        Args:
            step: which.
            state: the tree of arrays to restore into, for structure, dtype and sharding.
            best: the same for `best`.

        Returns:
            `(state, best or None)`.

        Raises:
            CheckpointError: the files cannot be read, or hold other leaves.
        """
        has_best = bool(self.read_meta(step)["progress"].get("best_step") is not None)
        wanted: dict[str, Any] = {"state": ocp.args.StandardRestore(_abstract(state))}
        if has_best:
            wanted["best"] = ocp.args.StandardRestore(_abstract(best))
        restored = self._restore(step, **wanted)
        return restored["state"], restored["best"] if has_best else None

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(
                f"{self._folder / str(step)}: cannot be read ({type(error).__name__}: {str(error).splitlines()[0][:200]}); "
                "remove this folder to resume from the one before it"
            ) from error

    def wait(self) -> None:
        """Waits for the saves in the background.

        Raises:
            CheckpointError: one of them failed.
        """
        with self._writing(None):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and frees Orbax's threads.

        Raises:
            CheckpointError: a save in the background failed.
        """
        with self._writing(None):
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    @contextmanager
    def _writing(self, step: int | None) -> Generator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            what = "a checkpoint" if step is None else f"step {step}"
            raise CheckpointError(
                f"{self._folder}: {what} could not be saved ({type(error).__name__}: {str(error).splitlines()[0][:200]}); "
                "make room or mend the disk, and give the same command again: it goes on from the newest saved step"
            ) from error


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
