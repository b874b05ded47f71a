"""Worker process of one run of a comparison: `python -m jaxpeft.compare.worker`, started by the
comparison.

It reads its job as a line of JSON from standard input. When standard input closes, the comparison
has exited or was killed, so the run saves and stops.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxpeft import atomic, data
from jaxpeft.command.running import set_up_logging
from jaxpeft.compare.runs import other_rows
from jaxpeft.config.files import parse_config
from jaxpeft.config.schema import Config, as_dict
from jaxpeft.data.tokens.row_encoder import RowEncoder, evaluated_lengths, one_length
from jaxpeft.errors import ConfigError
from jaxpeft.evaluation.forgetting import Forgetting, centroid_accuracy, embeddings
from jaxpeft.logs import log_time
from jaxpeft.processes.exit_codes import run_guarded
from jaxpeft.processes.lock import lock_folder
from jaxpeft.processes.signals import Stopped, StopRequest
from jaxpeft.sharding.mesh import evaluation_rows
from jaxpeft.train import cpu, job, next_steps, optimizers, records
from jaxpeft.train.begin import check_resumable
from jaxpeft.train.evaluator import Evaluator, metric_of
from jaxpeft.train.progress import memory_gb
from jaxpeft.train.run import RunResult
from jaxpeft.train.setup import Setup, prepare


def run(
    config: Config,
    folder: Path,
    stop: StopRequest,
    allowed: Sequence[str] = (),
    *,
    before: bool = False,
) -> dict[str, Any]:
    """Train the method of a config, and measure it.

    Writes to `folder`: `config.json`, `metrics.jsonl`, `adapter/` and `result.json`; checkpoints
    are deleted once `result.json` is written.

    Args:
        config: a checked config.
        folder: folder of the run; resumes from checkpoints in it.
        stop: stop request.
        allowed: config fields that may differ from the checkpoint's.
        before: whether to evaluate before training too.

    Returns:
        The contents of `result.json`.

    Raises:
        JaxpeftError: an input is invalid.
        Stopped: on request, after saving.
    """
    records.check(config.log)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        setup = prepare(config)
        stop.raise_if_requested()
        check_resumable(setup, config.method, folder, allowed)
        job.log_setup(setup)
        evaluator = Evaluator(setup, stop.raise_if_requested)
        look = job.Before(setup, evaluator, folder / records.BEFORE) if before else None
        options = optimizers.options_for(config)
        result = job.fit(setup, config.method, options, folder, stop, evaluator, allowed, look)
        peak = memory_gb()
        lost = _measure_forgetting(setup, result, evaluator, stop)
        measured = {
            "metric": metric_of(setup),
            "split": result.split,
            "before": look.figures if look is not None else None,
            "test": result.test,
            "steps": result.steps,
            "best_step": result.best_step,
            "seconds": round(result.seconds, 2),
            "trainable_parameters": result.trainable_parameters,
            "total_parameters": result.total_parameters,
            "peak_memory_gb": round(peak, 3),
            "adapter_bytes": sum(
                file.stat().st_size for file in (folder / "adapter").rglob("*.safetensors")
            ),
            "forgetting": (
                lost
                and {
                    "measure": lost.measure,
                    "before": lost.before,
                    "after": lost.after,
                    "lost": lost.lost,
                }
            ),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "prediction": next_steps.prediction(setup, folder / "adapter"),
            "config": as_dict(config),
        }
        atomic.write_text(folder / records.RESULT, json.dumps(measured, indent=2) + "\n")
        # large for a full fine-tune, and no longer needed
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return measured


def _measure_forgetting(
    setup: Setup, result: RunResult, evaluator: Evaluator, stop: StopRequest
) -> Forgetting | None:
    """Measure the base and the adapted model on the config's forgetting rows."""
    config = setup.config
    examples = other_rows(config)
    if examples is None:
        return None
    with log_time(f"measuring forgetting on {examples.rows.name}") as note:
        encoding = RowEncoder(config.data, setup.data.tokenizer, setup.model.config.vocab_size)
        split = encoding(examples, check_dropped=False)
        if config.model.task == "causal_lm":
            before, after = (
                evaluator(*parts, split)["loss"]
                for parts in (({}, setup.params), (result.trainable, result.frozen))
            )
            found = Forgetting("loss", before, after)
        else:

            def accuracy(params: Mapping[str, Any]) -> float:
                lengths = evaluated_lengths(config, setup.data.train, split)
                batches = data.eval_batches(
                    split,
                    evaluation_rows(config, setup.mesh),
                    lengths,
                    setup.data.pad_id,
                    pad_to=one_length(config),
                )
                return centroid_accuracy(
                    *embeddings(setup.model, params, _stop_when_requested(batches, stop))
                )

            found = Forgetting("centroid_accuracy", accuracy(setup.params), accuracy(result.params))
        note(f"{found.measure} {found.before:.4f} before, {found.after:.4f} after")
    return found


def _stop_when_requested(batches: Any, stop: StopRequest) -> Any:
    for batch in batches:
        stop.raise_if_requested()
        yield batch


def main() -> int:
    """Run the job read from standard input; return the exit code."""
    line = sys.stdin.readline()
    if not line:
        return 0  # the comparison ended before this run's turn
    request = json.loads(line)
    # an imported library has added its own handler, which would prevent ours
    logging.getLogger().handlers.clear()
    set_up_logging(hushed=not request["traceback"])
    return run_guarded(lambda: _run(request), show_traceback=request["traceback"])


def _run(request: Mapping[str, Any]) -> int:
    config, problems = parse_config(request["config"])
    if config is None:
        raise ConfigError(problems)
    with StopRequest() as stop:
        threading.Thread(target=_stop_with_the_comparison, daemon=True).start()
        cpu.keep_memory()
        try:
            run(config, Path(request["folder"]), stop, request["allowed"], before=request["before"])
        except Stopped as stopped:
            return stopped.exit_code
    return 0


def _stop_with_the_comparison() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
