"""Saving and restoring a run with Orbax: adapter, optimizer, step, key and data position; never the
base.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxpeft.checkpoint import manifest
from jaxpeft.checkpoint.identity import differences
from jaxpeft.errors import CheckpointError, ConfigError, DamagedError
from jaxpeft.processes.peers import ALONE, SEEN, Peers, wait_until_seen

_log = logging.getLogger(__name__)
ASIDE = ".set-aside"
MOST_SHOWN = 3


class Checkpoints:
    """The checkpoints of one run.

    A checkpoint holds `state`, once there was an evaluation `best`, and `fixed` (trees of arrays),
    and a manifest with the plain values `meta` (the run's identity and its progress). The data
    position is the step: batches are a function of seed and step. What is not good (see `manifest`)
    is never used; where it is newer than the step that a run goes on from, it is put aside under
    another name.

    Of several processes each writes its part of the arrays; process 0 alone writes manifests,
    deletes, and says which step is the newest: what a host sees of a shared folder may be behind.

    Args:
        folder: of the run's checkpoints.
        keep: how many of the newest to keep.
        peers: the processes of the run.
    """

    def __init__(self, folder: Path, keep: int, peers: Peers = ALONE) -> None:
        self._folder, self._keep, self._peers = folder.absolute(), keep, peers

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        # Saved before training goes on: an adapter is small, and the manifest can follow at once.
        # Deleted by us: an old step may go only once the new one is committed.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None, create=True, enable_async_checkpointing=False
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def save(
        self,
        step: int,
        state: Any,
        best: Any | None,
        meta: Mapping[str, Any],
        fixed: Mapping[str, Any] | None = None,
    ) -> None:
        """Save a step: arrays, then the manifest, which commits it; then old steps are deleted.

        Args:
            step: optimizer steps done.
            state: tree of arrays.
            best: tree of arrays, or None while there is none.
            meta: plain JSON values.
            fixed: arrays by name that do not change during the run and cannot be made again with
                certainty.

        Raises:
            CheckpointError: it could not be written; the steps saved before are as they were.
        """
        target = self._folder / str(step)
        if self._peers.agree(f"whether step {step} is saved", (target / manifest.NAME).is_file):
            return
        items: dict[str, Any] = {"state": ocp.args.StandardSave(state)}
        if best is not None:
            items["best"] = ocp.args.StandardSave(best)
        if fixed:
            items["fixed"] = ocp.args.StandardSave(dict(fixed))
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            if self._peers.first:
                manifest.write(target, step, meta)
                self._delete_old()
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{target}: could not be saved ({type(error).__name__}:"
                f" {str(error).splitlines()[0][:200]}); make room or repair the disk, and run the"
                " same command again: it resumes from the newest checkpoint"
            ) from error

    def _delete_old(self) -> None:
        for step in self._steps()[self._keep :]:
            # without its manifest first, so that a half-deleted step is none
            (self._folder / str(step) / manifest.NAME).unlink(missing_ok=True)
            shutil.rmtree(self._folder / str(step))

    def _steps(self) -> list[int]:
        """List the steps that there are folders of, the newest first."""
        there = self._folder.iterdir() if self._folder.is_dir() else ()
        names = [path.name for path in there if path.is_dir() and path.name.isdecimal()]
        return sorted((int(name) for name in names if name == str(int(name))), reverse=True)

    def latest(self) -> int | None:
        """Return the newest good step, None where none was ever saved; say which newer ones are not
        good, and why.

        Raises:
            DamagedError: steps were saved, and none of them is good.
            CheckpointError: another process than the first does not see that step.
        """
        step = self._peers.agree("the newest saved step", self._newest)
        if (
            step is not None
            and not self._peers.first
            and not wait_until_seen(self._folder / str(step) / manifest.NAME)
        ):
            raise CheckpointError(
                f"{self._folder / str(step)}: is the newest saved step for process 0, and process"
                f" {self._peers.process} does not see it after {SEEN:.0f} s: its view of the folder"
                " is stale, or another folder; start all of them again, or give one --workdir that"
                " all hosts share"
            )
        return step

    def _newest(self) -> int | None:
        bad: list[tuple[int, str]] = []
        for step in self._steps():
            why = manifest.problem(self._folder / str(step), step)
            if why is None:
                for other, reason in bad:
                    _log.warning(
                        "%s: %s; resuming from step %d", self._folder / str(other), reason, step
                    )
                if not manifest.is_numbered(self._folder / str(step)):
                    told = (
                        "was saved by an earlier version, which did not record its number: its name"
                        " is trusted"
                    )
                    _log.warning("%s: %s", self._folder / str(step), told)
                return step
            bad.append((step, why))
        if any(why != manifest.UNFINISHED for _, why in bad):
            rows = [f"{self._folder / str(step)}: {why}" for step, why in bad]
            fix = (
                "no checkpoint is intact; restore one from a copy, or give another --workdir to"
                " start a new run"
            )
            raise DamagedError([*rows, fix])
        for step, why in bad:
            _log.warning("%s: %s; starting from scratch", self._folder / str(step), why)
        return None

    def put_aside(self, after: int | None) -> None:
        """Put the folders of steps beyond the one that is gone on from under another name, so that
        they can be saved again.

        Args:
            after: that step, None for a new run.
        """
        for step in self._steps() if self._peers.first else ():
            if after is None or step > after:
                source, n = self._folder / str(step), 0
                while (target := source.with_name(f"{step}{ASIDE}{n or ''}")).exists():
                    n += 1
                source.rename(target)
        self._peers.wait("what was put aside")

    def read_meta(self, step: int) -> dict[str, Any]:
        """Read the plain values of a good step."""
        return self._peers.agree(
            f"what step {step} is of", lambda: manifest.read(self._folder / str(step))
        )

    def check_identity(
        self, step: int, identity: Mapping[str, Any], allowed: Sequence[str] = ()
    ) -> None:
        """Refuse to resume another run.

        Args:
            step: the step to go on from.
            identity: of this run.
            allowed: fields that may differ; said in a warning where they do.

        Raises:
            ConfigError: names every field that changed since the checkpoint, up to a few.
        """
        rows, let = differences(self.read_meta(step)["identity"], identity, allowed)
        if rows:
            more = [f"and {len(rows) - MOST_SHOWN} more"] if len(rows) > MOST_SHOWN else []
            shown = "".join(f"\n  {row}" for row in [*rows[:MOST_SHOWN], *more])
            raise ConfigError(
                f"{self._folder} holds step {step} of another run; undo these changes, allow one by"
                f" --allow-change=FIELD, or give another --workdir to start a new run:{shown}"
            )
        for row in let if self._peers.first else ():
            _log.warning("resuming from step %d with another %s", step, row)

    def restore(
        self, step: int, state: Any, best: Any, fixed: Mapping[str, Any] | None = None
    ) -> tuple[Any, Any | None, dict[str, Any]]:
        """Restore the arrays of a step, onto the devices of the examples.

        Args:
            step: which.
            state: the tree of arrays to restore into, for structure, dtype and sharding.
            best: the same for `best`.
            fixed: the same for the arrays that do not change.

        Returns:
            `(state, best or None, fixed)`.

        Raises:
            CheckpointError: the files cannot be read, or hold other leaves.
        """
        has_best = self._peers.agree(
            "whether there is a best tree", (self._folder / str(step) / "best").is_dir
        )
        wanted: dict[str, Any] = {"state": ocp.args.StandardRestore(_abstract(state))}
        if has_best:
            wanted["best"] = ocp.args.StandardRestore(_abstract(best))
        if fixed:
            wanted["fixed"] = ocp.args.StandardRestore(_abstract(dict(fixed)))
        with self._reading(step):
            restored: Any = self._manager.restore(step, args=ocp.args.Composite(**wanted))
        return (
            restored["state"],
            restored["best"] if has_best else None,
            dict(restored["fixed"]) if fixed else {},
        )

    @contextmanager
    def _reading(self, step: int) -> Generator[None]:
        try:
            yield
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(
                f"{self._folder / str(step)}: cannot be read ({type(error).__name__}:"
                f" {str(error).splitlines()[0][:200]}); remove this folder to resume from the one"
                " before it"
            ) from error

    def close(self) -> None:
        """Free Orbax's threads."""
        if "_manager" in self.__dict__:
            self._manager.close()


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
