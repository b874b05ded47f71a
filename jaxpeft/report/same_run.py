"""Whether an evaluation is of a run's adapter."""

from __future__ import annotations

from pathlib import Path

from jaxpeft.errors import ConfigError
from jaxpeft.hub.sources import folder_sha256
from jaxpeft.report.evaluation_file import Evaluation
from jaxpeft.report.run_folder import RunFolder

_TASKS = {"lm": "causal_lm", "token": "token_classification"}
_CLASSIFICATION = "sequence_classification"


def find_other(run: RunFolder, found: Evaluation) -> str:
    """Return why an evaluation is not of the run's adapter; empty if it is.

    The weights of the adapter decide, so that either folder may have moved. A file of an earlier
    version has no hashes; the folders decide then.

    Args:
        run: the run.
        found: the evaluation.

    Raises:
        ConfigError: The evaluation is of another task.
    """
    _require_one_task(run, found)
    own = run.folder / "adapter"
    hashes = folder_sha256(own)
    if found.adapter is not None and hashes:
        same = found.adapter.sha256 == hashes
    else:
        path = Path(found.adapter.path if found.adapter else found.model).expanduser().resolve()
        same = path in (run.folder.resolve(), own.resolve())
    if same:
        return ""
    return f"the evaluation is of {found.model}, which is not the adapter of this run, {own}"


def _require_one_task(run: RunFolder, found: Evaluation) -> None:
    own, start = run.config.model.task, run.start.problem
    task = _TASKS.get(found.problem, _CLASSIFICATION)
    if found.problem and (task != own or (start and start != found.problem)):
        raise ConfigError(
            f"--evaluation {found.file}: is of {task} ({found.problem}), but the run {run.folder}"
            f" is of {own}{f' ({start})' if start else ''}; give an evaluation of this run's"
            " adapter"
        )
