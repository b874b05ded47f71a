"""The choice of sites against torch `peft`'s own, and the refusals that it lacks."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft import LoRA, models
from jaxpeft.core.targets import Targets, find_sites, resolve
from jaxpeft.errors import ConfigError, TargetError
from jaxpeft.models.base import ModelOptions, abstract_params
from jaxpeft.transforms.rewrite import rewrite
from tests.models.conftest import tiny_config

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": ["self_attn.q_proj", "lm_head"]}),
    ("llama", {"target_modules": ["model.layers.1.mlp.down_proj"]}),
    ("llama", {"target_modules": r".*\.(q|k)_proj"}),
    ("llama", {"target_modules": r"model\.layers\.1\..*proj"}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj", "o_proj"]}),
    ("llama", {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.0\..*"}),
    ("bert", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": ["query", "dense"]}),
    ("bert", {"target_modules": ["output.dense"]}),
    ("bert", {"target_modules": r".*attention.*\.(query|value)"}),
]


def tree(kind: str, *, scan: bool = False) -> Any:
    task, labels = ("causal_lm", None) if kind == "llama" else ("sequence_classification", 3)
    model = models.build(
        tiny_config(kind), ModelOptions(task, labels, jnp.float32, scan_layers=scan)
    )
    return abstract_params(model)


def ours(params: Any, options: dict[str, Any]) -> set[str]:
    def plain(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    layers, pattern = options.get("layers_to_transform"), options.get("layers_pattern")
    wanted = Targets(
        plain(options["target_modules"]),
        plain(options.get("exclude_modules", ())),
        (layers,) if isinstance(layers, int) else plain(layers),
        (pattern,) if pattern else (),
    )
    chosen = resolve(params, wanted)
    return {
        name
        for site, flags in chosen.items()
        for name, on in zip(site.names, flags, strict=True)
        if on
    }


def pefts(kind: str, options: dict[str, Any]) -> set[str]:
    import transformers
    from peft import LoraConfig, TaskType, get_peft_model

    values = tiny_config(kind, num_labels=3)
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    causal = kind == "llama"
    loader = (
        transformers.AutoModelForCausalLM
        if causal
        else transformers.AutoModelForSequenceClassification
    )
    task = TaskType.CAUSAL_LM if causal else TaskType.SEQ_CLS
    model = get_peft_model(loader.from_config(config), LoraConfig(r=4, task_type=task, **options))
    start, end = "base_model.model.", ".lora_A.default.weight"
    return {
        name.removeprefix(start).removesuffix(end)
        for name, _ in model.named_parameters()
        if name.endswith(end)
    }


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_the_sites_are_those_that_peft_adapts(
    kind: str, options: dict[str, Any], scan: bool
) -> None:
    assert ours(tree(kind, scan=scan), options) == pefts(kind, options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"targets": ("q_prj",)}, r"targets: 'q_prj' matches no site; did you mean 'q_proj'"),
        (
            {"targets": ("q_proj", "qproj", "zzz")},
            r"'qproj' matches no site[\s\S]*'zzz' matches no site",
        ),
        (
            {"targets": "q_proj"},
            r"the regular expression 'q_proj' matches no full site name; the model has 16 site",
        ),
        (
            {"targets": ("q_proj",), "layers_to_transform": (1, 7)},
            r"no layer 7; the model has 0 to 1",
        ),
        ({"targets": ("q_proj",), "exclude": ("q_proj",)}, r"match no site"),
        ({"rank_pattern": {"q_prj": 2}}, r"rank_pattern: 'q_prj' matches no adapted site"),
        ({"alpha_pattern": {"zz": 2.0}}, r"alpha_pattern: 'zz' matches no adapted site"),
        ({"modules_to_save": ("embed",)}, r"modules_to_save: 'embed' matches no module"),
    ],
)
def test_what_matches_nothing_is_refused_with_the_nearest_names(
    options: dict[str, Any], text: str
) -> None:
    import jax

    with pytest.raises(TargetError, match=text):
        jax.eval_shape(lambda p: rewrite(LoRA(**options), p, jax.random.key(0)), tree("llama"))


def test_a_partial_match_prints_a_coverage_table(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        jax.eval_shape(
            lambda p: rewrite(
                LoRA(targets=("q_proj",), layers_to_transform=(1,)), p, jax.random.key(0)
            ),
            tree("llama"),
        )
    assert "adapted only in some layers" in caplog.text
    assert "1 of    2  model.layers.*.self_attn.q_proj" in caplog.text
    assert "0 of    2  model.layers.*.mlp.up_proj" in caplog.text


@pytest.mark.parametrize(
    "exclude", [("down_prj", "o_proj"), r".*\.down_prj"], ids=["list", "regex"]
)
def test_an_exclude_that_matches_nothing_is_warned_of_with_the_nearest_name(
    exclude: Any, caplog: pytest.LogCaptureFixture
) -> None:
    method = LoRA(targets="all-linear", exclude_modules=exclude)
    jax.eval_shape(lambda p: rewrite(method, p, jax.random.key(0)), tree("llama"))
    (text,) = (record.getMessage() for record in caplog.records if "exclude" in record.getMessage())
    wrong = exclude if isinstance(exclude, str) else exclude[0]
    assert text.startswith(f"lora.exclude: {wrong!r} matches no site of this model")
    assert isinstance(exclude, str) or "did you mean 'down_proj'" in text


def test_an_exclude_that_matches_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    method = LoRA(targets="all-linear", exclude=("o_proj", "lm_head", "embed_tokens"))
    jax.eval_shape(lambda p: rewrite(method, p, jax.random.key(0)), tree("llama"))
    assert "exclude" not in caplog.text


def test_sites_have_hugging_faces_names_and_flaxs_shapes() -> None:
    site = next(s for s in find_sites(tree("llama", scan=True)) if s.path[-1] == "gate_proj")
    assert site.names == ("model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj")
    assert (site.shape, site.layers, site.kind) == ((32, 48), (2,), "linear")


def test_every_wrong_option_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        LoRA(
            rank=0,
            alpha="8",
            dropout=1.0,
            bias="some",
            layers_to_transform=(-1,),
            rank_pattern={"q": 0},
        )  # type: ignore[arg-type]
    text = "\n".join(caught.value.problems)
    for field in (
        "lora.rank",
        "lora.alpha",
        "lora.dropout",
        "lora.bias",
        "lora.layers_to_transform",
        "rank_pattern",
    ):
        assert field in text
    with pytest.raises(
        ConfigError, match="layers_to_transform: cannot be used with a regular expression"
    ):
        LoRA(targets=".*q_proj", layers_to_transform=(0,))


def test_lists_sets_and_numpy_numbers_are_taken_as_peft_takes_them() -> None:
    same = LoRA(
        rank=4,
        targets=("k_proj", "q_proj"),
        layers_to_transform=(1,),
        exclude=("x",),
        modules_to_save=("norm",),
    )
    made: Any = LoRA(
        rank=np.int64(4),
        targets={"q_proj", "k_proj"},
        layers_to_transform=[1],
        exclude=["x"],
        modules_to_save=["norm"],
    )  # type: ignore[arg-type]
    assert made == same
    assert hash(made.targets) == hash(same.targets)
    number = LoRA(targets=["q_proj", "k_proj"], layers_to_transform=1)  # type: ignore[arg-type]
    assert number.where(()).layers_to_transform == (1,)


@pytest.mark.parametrize(
    "options",
    [
        {"targets": "*.q_proj"},
        {"exclude": "("},
        {"rank_pattern": {"*.q": 4}},
        {"alpha_pattern": {"[": 4.0}},
        {"layers_to_transform": (1,), "targets": ("q",), "layers_pattern": ("(",)},
    ],
)
def test_what_is_no_regular_expression_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"lora\.\w+: .* is not a regular expression"):
        LoRA(**options)
