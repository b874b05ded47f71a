"""Save and restore a run with Orbax: adapter, optimizer state, step, random key and data position,
but never the base.
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

    A checkpoint contains the array trees `state`, `best` (after the first evaluation) and `fixed`,
    and a manifest with the plain values `meta` (identity, progress and data position of the run).
    An invalid checkpoint (see `manifest`) is never used; if it is newer than the step that a run
    resumes from, it is renamed.

    Each process writes its part of the arrays. Only process 0 writes manifests, deletes checkpoints
    and determines the newest step, since other hosts may see an outdated shared folder.

    Args:
        folder: folder of the checkpoints.
        keep: number of newest checkpoints to keep.
        peers: processes of the run.
    """

    def __init__(self, folder: Path, keep: int, peers: Peers = ALONE) -> None:
        self._folder, self._keep, self._peers = folder.absolute(), keep, peers

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        # Save synchronously: adapters are small, and the manifest can follow immediately.
        # Delete old steps ourselves, only after the new one is committed.
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
        """Save a step: the arrays, then the manifest, which commits it; then delete old steps.

        Args:
            step: number of optimizer steps done.
            state: tree of arrays.
            best: tree of arrays, or None.
            meta: plain JSON values.
            fixed: arrays by name that do not change during the run but may not be reproducible.

        Raises:
            CheckpointError: writing failed; earlier checkpoints are unchanged.
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
                f" {str(error).splitlines()[0][:200]}); free or repair the disk, and run the same"
                " command again: it resumes from the newest checkpoint"
            ) from error

    def _delete_old(self) -> None:
        for step in self._steps()[self._keep :]:
            # delete the manifest first, so that a half-deleted step is invalid
            (self._folder / str(step) / manifest.NAME).unlink(missing_ok=True)
            shutil.rmtree(self._folder / str(step))

    def _steps(self) -> list[int]:
        """List the steps that have a folder, newest first."""
        entries = self._folder.iterdir() if self._folder.is_dir() else ()
        names = [path.name for path in entries if path.is_dir() and path.name.isdecimal()]
        return sorted((int(name) for name in names if name == str(int(name))), reverse=True)

    def latest(self) -> int | None:
        """Return the newest valid step, or None if none was saved; warn about newer invalid ones.

        Raises:
            DamagedError: steps were saved, but none is valid.
            CheckpointError: a process other than process 0 does not see that step.
        """
        step = self._peers.agree("the newest saved step", self._newest)
        if (
            step is not None
            and not self._peers.first
            and not wait_until_seen(self._folder / str(step) / manifest.NAME)
        ):
            raise CheckpointError(
                f"{self._folder / str(step)}: is the newest checkpoint of process 0, but process"
                f" {self._peers.process} does not see it after {SEEN:.0f} s; start all processes"
                " again, or give a --workdir that all hosts share"
            )
        return step

    def _newest(self) -> int | None:
        invalid: list[tuple[int, str]] = []
        for step in self._steps():
            why = manifest.problem(self._folder / str(step), step)
            if why is None:
                for other, reason in invalid:
                    _log.warning(
                        "%s: %s; resuming from step %d", self._folder / str(other), reason, step
                    )
                if not manifest.is_numbered(self._folder / str(step)):
                    _log.warning(
                        "%s: was saved by an earlier version, which did not record the step; using"
                        " the folder name as the step",
                        self._folder / str(step),
                    )
                return step
            invalid.append((step, why))
        if any(why != manifest.UNFINISHED for _, why in invalid):
            rows = [f"{self._folder / str(step)}: {why}" for step, why in invalid]
            fix = (
                "no checkpoint is intact; restore one from a backup, or give another --workdir to"
                " start a new run"
            )
            raise DamagedError([*rows, fix])
        for step, why in invalid:
            _log.warning("%s: %s; starting from scratch", self._folder / str(step), why)
        return None

    def put_aside(self, after: int | None) -> None:
        """Rename the folders of steps after the one to resume from, so that these steps can be
        saved again.

        Args:
            after: step to resume from, None for a new run.
        """
        for step in self._steps() if self._peers.first else ():
            if after is None or step > after:
                source, n = self._folder / str(step), 0
                while (target := source.with_name(f"{step}{ASIDE}{n or ''}")).exists():
                    n += 1
                source.rename(target)
        self._peers.wait("what was put aside")

    def read_meta(self, step: int) -> dict[str, Any]:
        """Read the plain values of a valid step."""
        return self._peers.agree(
            f"what step {step} is of", lambda: manifest.read(self._folder / str(step))
        )

    def check_identity(
        self, step: int, identity: Mapping[str, Any], allowed: Sequence[str] = ()
    ) -> None:
        """Refuse to resume another run.

        Args:
            step: step to resume from.
            identity: identity of this run.
            allowed: fields that may differ, with a warning.

        Raises:
            ConfigError: lists the fields that have changed since the checkpoint, up to a limit.
        """
        rows, permitted = differences(self.read_meta(step)["identity"], identity, allowed)
        if rows:
            more = [f"and {len(rows) - MOST_SHOWN} more"] if len(rows) > MOST_SHOWN else []
            shown = "".join(f"\n  {row}" for row in [*rows[:MOST_SHOWN], *more])
            raise ConfigError(
                f"{self._folder} contains step {step} of another run; undo these changes, allow"
                " them with --allow-change=FIELD, or give another --workdir to start a new"
                f" run:{shown}"
            )
        for row in permitted if self._peers.first else ():
            _log.warning("resuming from step %d with a changed %s", step, row)

    def restore(
        self, step: int, state: Any, best: Any, fixed: Mapping[str, Any] | None = None
    ) -> tuple[Any, Any | None, dict[str, Any]]:
        """Restore the arrays of a step, with the structure, dtypes and shardings of the arguments.

        Args:
            step: step to restore.
            state: example of `state`.
            best: example of `best`.
            fixed: example of `fixed`.

        Returns:
            `(state, best or None, fixed)`.

        Raises:
            CheckpointError: the files cannot be read, or contain other leaves.
        """
        has_best = self._peers.agree(
            "whether there is a best tree", (self._folder / str(step) / "best").is_dir
        )
        items: dict[str, Any] = {"state": ocp.args.StandardRestore(_abstract(state))}
        if has_best:
            items["best"] = ocp.args.StandardRestore(_abstract(best))
        if fixed:
            items["fixed"] = ocp.args.StandardRestore(_abstract(dict(fixed)))
        with self._report_damage(step):
            restored: Any = self._manager.restore(step, args=ocp.args.Composite(**items))
        return (
            restored["state"],
            restored["best"] if has_best else None,
            dict(restored["fixed"]) if fixed else {},
        )

    @contextmanager
    def _report_damage(self, step: int) -> Generator[None]:
        try:
            yield
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(
                f"{self._folder / str(step)}: cannot be read ({type(error).__name__}:"
                f" {str(error).splitlines()[0][:200]}); remove this folder to resume from the"
                " previous checkpoint"
            ) from error

    def close(self) -> None:
        """Free Orbax's threads."""
        if "_manager" in self.__dict__:
            self._manager.close()


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
