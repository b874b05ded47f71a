"""What a run chooses for itself before it begins: layers, remat, and the kernel of attention."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpeft.config.schema import Config
from jaxpeft.config.train_config import EvaluationConfig
from jaxpeft.errors import ConfigError
from jaxpeft.models.base import ModelOptions
from jaxpeft.train import auto
from jaxpeft.train.evaluator import metric_of
from jaxpeft.train.setup import prepare
from tests.train.runs import LABELS, write_tokenizer

MakeConfig = Callable[..., Config]


@pytest.fixture
def options(make_config: MakeConfig) -> Callable[..., ModelOptions]:
    return lambda kind="text", **given: prepare(make_config(kind, **given)).model.options


def test_on_a_cpu_nothing_is_computed_again_and_layers_are_unrolled(
    options: Callable[..., ModelOptions],
) -> None:
    found = options()
    assert (found.remat, found.scan_layers, found.attention, found.right_padded) == (
        "none",
        False,
        "xla",
        True,
    )


@pytest.mark.parametrize(
    ("kind", "gigabytes", "remat"), [("text", 10.0, "products"), ("single", 1e-6, "full")]
)
@pytest.mark.representatives("text-*")
def test_remat_is_chosen_by_the_memory_that_is_given(
    options: Callable[..., ModelOptions],
    caplog: pytest.LogCaptureFixture,
    kind: str,
    gigabytes: float,
    remat: str,
) -> None:
    with caplog.at_level(logging.INFO, "jaxpeft"):
        assert options(kind, model__memory_gb=gigabytes).remat == remat
    said = [record.getMessage() for record in caplog.records]
    assert any(
        line.startswith(f"remat {remat}: ") and line.endswith(f"of {gigabytes:.1f} GB")
        for line in said
    )
    assert any("may not fit" in line and "lower train.batch_size" in line for line in said) == (
        remat == "full"
    )


def test_remat_that_is_asked_for_stays(options: Callable[..., ModelOptions]) -> None:
    assert options(model__memory_gb=10.0, model__remat="attention").remat == "attention"


@pytest.mark.parametrize(
    ("given", "scanned"),
    [
        ({}, True),
        ({"train__steps": 200}, False),
        ({"model__scan_layers": False}, False),
        (
            {"kind": "single", "method__bias": "lora_only", "method__layers_to_transform": (0,)},
            False,
        ),
    ],
)
@pytest.mark.representatives("given0-*", "given1-*", "given2-*")
def test_many_layers_for_few_steps_are_scanned(
    options: Callable[..., ModelOptions],
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    scanned: bool,
) -> None:
    monkeypatch.setattr(auto, "_MANY_LAYERS", 1)
    assert options(**given).scan_layers is scanned


def test_a_quantized_base_is_not_stacked_on_a_gpu(
    options: Callable[..., ModelOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "_MANY_LAYERS", 1)
    assert options(model__quant="nf4").scan_layers
    monkeypatch.setattr(auto, "platform", lambda _: "cuda")
    assert not options(model__quant="nf4", model__attention="xla").scan_layers
    assert options(model__attention="xla").scan_layers


def test_a_kernel_of_another_platform_is_refused(options: Callable[..., ModelOptions]) -> None:
    with pytest.raises(
        ConfigError,
        match=r"model\.attention: cudnn runs on cuda, but the devices are cpu; set it to auto",
    ):
        options(model__attention="cudnn")
    assert options(model__attention="xla").attention == "xla"


def test_the_classes_of_a_kept_head_keep_their_ids(
    make_config: MakeConfig, tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    base = AutoConfig.from_pretrained(tiny_models["bert"], id2label=dict(enumerate(LABELS)))
    AutoModelForSequenceClassification.from_config(base).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    made = prepare(make_config(model__path=str(tmp_path / "base")))
    assert made.data.labels == LABELS != tuple(sorted(LABELS))
    kept = load_file(tmp_path / "base" / "model.safetensors")["classifier.weight"]
    assert np.array_equal(np.asarray(made.params["classifier"]["kernel"]).T, kept)


@pytest.mark.parametrize(
    ("problem", "labels", "metric"),
    [
        ("token", ("B-X", "O"), "f1"),
        ("token", ("O", "X"), "tag_f1"),
        ("token", ("NOUN", "VERB"), "tag_f1_macro"),
        ("single_label", ("O", "X"), "accuracy"),
        ("multi_label", ("a", "b"), "f1_micro"),
    ],
)
def test_the_best_step_of_tags_is_not_that_of_most_o(
    problem: str, labels: tuple[str, ...], metric: str
) -> None:
    rows = SimpleNamespace(problem=problem, labels=labels)
    given: Any = SimpleNamespace(config=SimpleNamespace(evaluation=EvaluationConfig()), data=rows)
    assert metric_of(given) == metric
