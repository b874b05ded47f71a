"""What is planned is the run itself: its model, its leaves, its batch and its step, from a
`config.json` alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxpeft.config.schema import Config
from jaxpeft.core import paths, training_hooks
from jaxpeft.plan.subject import Subject, subject
from jaxpeft.train.begin import rewrite_base
from jaxpeft.train.setup import Setup, prepare
from jaxpeft.train.step import make_train_step

MakeConfig = Callable[..., Config]
LABELED = {"data__labels": ("red", "green", "blue")}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("text", {"model__dtype": "bfloat16"}),
    "scanned, the file's dtype": ("text", {"model__scan_layers": True}),
    "more tokens": ("text", {"model__vocab_size": 120, "model__compute_dtype": "bfloat16"}),
    "packed, in parts": ("text", {"data__packing": True, "train__accumulation": 2}),
    "a new head": ("single", {**LABELED, "model__dtype": "float16"}),
    "a regression, scanned": (
        "regression",
        {"data__problem": "regression", "model__scan_layers": True},
    ),
    "nf4": ("text", {"model__quant": "nf4", "model__dtype": "bfloat16"}),
    "nf4 of a classifier, scanned": (
        "single",
        {**LABELED, "model__quant": "nf4", "model__scan_layers": True},
    ),
    "int4 of some": (
        "text",
        {
            "model__quant": "int4",
            "model__quant_targets": ("q_proj", "down_proj"),
            "model__quant_group": 16,
            "model__vocab_size": 120,
            "model__scan_layers": True,
        },
    ),
    "fp8 of all but some": ("text", {"model__quant": "fp8", "model__quant_exclude": ("o_proj",)}),
}


def both(config: Config) -> tuple[Subject, Setup]:
    """Return the plan of a config and the run."""
    setup = prepare(config)
    options, described = (
        setup.model.options,
        json.loads((Path(config.model.path) / "config.json").read_text()),
    )
    return (
        subject(config, described, options.attention, options.remat, scan=options.scan_layers),
        setup,
    )


def shapes(tree: Any) -> dict[str, Any]:
    """Return shape and dtype of every leaf, by its path."""
    return {paths.text(path): (leaf.shape, leaf.dtype) for path, leaf in paths.walk(tree)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.representatives(
    "llama",
    "nf4 of a classifier, scanned",
    "a regression, scanned",
    "more tokens",
    "scanned, the file's dtype",
    "packed, in parts",
)
def test_a_plan_has_the_leaves_of_the_run(make_config: MakeConfig, case: str) -> None:
    kind, given = CASES[case]
    planned, run = both(make_config(kind, **given))
    trainable, frozen = rewrite_base(run, run.config.method)
    assert planned.model.options == run.model.options
    assert planned.model.config == run.model.config
    assert shapes(planned.base) == shapes(run.params)
    assert shapes(planned.state.trainable) == shapes(trainable)
    assert shapes(planned.frozen) == shapes(frozen)
    made = shapes(run.data.batches.sample())
    assert made.items() <= shapes(planned.batch).items()
    assert planned.batch.keys() - made.keys() <= {
        "token_type_ids"
    }  # which the tokenizer decides on, and no file here


@pytest.mark.parametrize("case", ["nf4", "a new head", "packed, in parts"])
@pytest.mark.representatives("packed, in parts")
def test_the_step_is_the_runs_own(make_config: MakeConfig, case: str) -> None:
    kind, given = CASES[case]
    planned, run = both(
        make_config(kind, **given, train__label_smoothing=0.1 if kind == "single" else 0.0)
    )
    method, parts = run.config.method, run.config.train.accumulation

    def program(model: Any, loss: Any) -> str:
        step = make_train_step(
            model, loss, planned.optimizer, parts, partial(training_hooks.penalty, method)
        )
        return str(jax.make_jaxpr(step)(planned.state, planned.frozen, planned.batch))

    assert program(planned.model, planned.loss) == program(run.model, run.loss)
