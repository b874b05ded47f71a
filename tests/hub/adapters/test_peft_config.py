from __future__ import annotations

import json

import pytest

from jaxpeft.errors import AdapterError
from jaxpeft.hub.adapters import peft_config
from jaxpeft.methods import METHODS
from jaxpeft.methods.lora import LoRA
from jaxpeft.methods.unsupported import UNSUPPORTED

TASKS = ("causal_lm", "sequence_classification", "token_classification", "encoder")
MINIMUM = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
HEADS = {"bert": {}, "classifier": {}}
# Every option away from its default, each in the form that JSON gives back.
METHOD = LoRA(
    rank=4,
    alpha=7.5,
    dropout=0.1,
    rslora=True,
    bias="lora_only",
    targets=("q_proj", "down_proj"),
    exclude=("0.self_attn.q_proj",),
    layers_to_transform=(0, 2),
    layers_pattern=("layers",),
    rank_pattern={"q_proj": 2},
    alpha_pattern={"layers.2.mlp.down_proj": 3.0},
    modules_to_save=("embed_tokens",),
)


def peft_lora(**options):
    """Return the content of the adapter_config.json that peft itself writes."""
    from peft import LoraConfig

    content = LoraConfig(**options).to_dict()
    content["inference_mode"] = True
    return json.loads(
        json.dumps(
            content, default=lambda value: sorted(value) if isinstance(value, set) else value.value
        )
    )


def problems(config, head=HEADS):
    with pytest.raises(AdapterError) as caught:
        peft_config.read(config, "a/adapter_config.json", head)
    assert all(problem.startswith("a/adapter_config.json: ") for problem in caught.value.problems)
    return [problem.removeprefix("a/adapter_config.json: ") for problem in caught.value.problems]


# ------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("task", TASKS)
def test_peft_knows_every_key_that_is_written(task):
    from peft import LoraConfig, TaskType

    written = json.loads(
        json.dumps(peft_config.write(METHOD, task, "org/base", "abc", ["classifier"]))
    )
    assert written.keys() <= LoraConfig().to_dict().keys()
    assert written["task_type"] in {str(t.value) for t in TaskType}
    made = LoraConfig(**written)  # a warning about a key would fail the test
    assert (made.r, made.lora_alpha, made.lora_dropout, made.use_rslora, made.bias) == (
        4,
        7.5,
        0.1,
        True,
        "lora_only",
    )
    assert (made.target_modules, made.exclude_modules) == (
        {"q_proj", "down_proj"},
        {"0.self_attn.q_proj"},
    )
    assert (made.layers_to_transform, made.layers_pattern) == ([0, 2], ["layers"])
    assert (made.rank_pattern, made.alpha_pattern) == (
        {"q_proj": 2},
        {"layers.2.mlp.down_proj": 3.0},
    )
    assert (made.base_model_name_or_path, made.revision, made.modules_to_save) == (
        "org/base",
        "abc",
        ["classifier"],
    )
    assert made.inference_mode and made.init_lora_weights is True and not made.fan_in_fan_out


@pytest.mark.parametrize(
    "method",
    [
        METHOD,
        LoRA(),
        LoRA(targets=r".*\.(q|v)_proj", exclude=r".*\.0\..*"),
        LoRA(layers_to_transform=(1,)),
    ],
    ids=["every option", "defaults", "regex", "layers"],
)
def test_what_is_written_is_read_back_the_same(method):
    names = [*method.modules_to_save, "classifier"]
    written = peft_config.write(method, "causal_lm", "base", None, names)
    assert peft_config.read(json.loads(json.dumps(written)), "x", HEADS) == method


OWN = [
    name
    for name, m in METHODS.items()
    if m.peft.type is None and m.peft.layout == "peft" and name != "mixed"
]


@pytest.mark.parametrize("name", OWN)
def test_methods_without_a_peft_counterpart_come_back_by_name(name):
    method = METHODS[name](modules_to_save=("pooler",))
    written = peft_config.write(
        method, "sequence_classification", "base", None, ["classifier", "pooler"]
    )
    assert written["peft_type"] == name.upper()
    assert peft_config.read(json.loads(json.dumps(written)), "x", HEADS) == method


# ------------------------------------------------------------------------------------------ reading


def test_absent_keys_mean_what_they_mean_in_peft():
    from peft import LoraConfig

    method = peft_config.read(MINIMUM, "x", {})
    peft = LoraConfig(r=4, target_modules=["q_proj"])
    assert (
        (method.rank, method.alpha, method.dropout)
        == (peft.r, peft.lora_alpha, peft.lora_dropout)
        == (4, 8, 0.0)
    )
    assert (method.rslora, method.bias) == (peft.use_rslora, peft.bias)
    assert method == LoRA(rank=4, alpha=8, targets=("q_proj",))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {}),
        (
            {"r": 2, "lora_alpha": 32, "lora_dropout": 0.05},
            {"rank": 2, "alpha": 32.0, "dropout": 0.05},
        ),
        ({"use_rslora": True}, {"rslora": True}),
        ({"bias": "all"}, {"bias": "all"}),
        ({"target_modules": r".*\.q_proj"}, {"targets": r".*\.q_proj"}),
        ({"target_modules": "all-linear"}, {"targets": "all-linear"}),
        ({"exclude_modules": ["lm_head", "down_proj"]}, {"exclude": ("down_proj", "lm_head")}),
        ({"exclude_modules": r".*\.0\..*"}, {"exclude": r".*\.0\..*"}),
        ({"layers_to_transform": 1}, {"layers_to_transform": (1,)}),
        (
            {"layers_to_transform": [0, 1], "layers_pattern": "h"},
            {"layers_to_transform": (0, 1), "layers_pattern": ("h",)},
        ),
        (
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3.0}},
        ),
        ({"init_lora_weights": "gaussian"}, {}),
        ({"init_lora_weights": False}, {}),
        ({"init_lora_weights": "eva"}, {}),
        ({"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}, {}),
        ({"modules_to_save": ["pooler", "pre_classifier"]}, {"modules_to_save": ("pooler",)}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_peft_writes_is_read(options, wanted):
    if options.get("init_lora_weights") == "eva":
        from peft import EvaConfig

        options = {**options, "eva_config": EvaConfig()}
    config = peft_lora(**({"target_modules": ["q_proj"]} | options))
    assert peft_config.read(config, "x", HEADS) == LoRA(
        **({"alpha": 8.0, "targets": ("q_proj",)} | wanted)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"use_qalora": True},
            "use_qalora: True is not supported by the lora method; nothing was loaded",
        ),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: True is not supported"),
        ({"trainable_token_indices": "3"}, "trainable_token_indices: must be token ids"),
        (
            {"target_parameters": ["mlp.experts"]},
            "target_parameters: ['mlp.experts'] is not supported",
        ),
        (
            {"layer_replication": [[0, 2]]},
            (
                "layer_replication: [[0, 2]] is not supported by the lora method; nothing was loaded;"
                " its layers share the weights of the base, and a leaf of the base belongs to one"
            ),
        ),
        (
            {"alora_invocation_tokens": [1]},
            (
                "alora_invocation_tokens: [1] is not supported by the lora method; nothing was loaded;"
                " it applies from the invocation tokens on, and a site sees its inputs, but not which"
            ),
        ),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights: 'pissa' changed the base at initialization; save the adapter conv",
        ),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights: 'pissa_niter_4' changed the base",
        ),
        ({"init_lora_weights": "olora"}, "init_lora_weights: 'olora' changed the base"),
        ({"init_lora_weights": "corda"}, "init_lora_weights: 'corda' changed the base"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights: 'lora_ga' changed the base"),
    ],
    ids=lambda value: (
        " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_what_is_not_supported_is_refused(options, message):
    (problem,) = problems(peft_lora(target_modules=["q_proj"]) | options)
    assert problem.startswith(message)


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_rank_and_alpha_must_be_there(key):
    (problem,) = problems({k: v for k, v in MINIMUM.items() if k != key})
    assert problem.startswith(f"{key}: is not set; use the value of the adapter's training")


def test_a_setting_of_a_later_peft_is_refused_when_it_is_on():
    (problem,) = problems({**MINIMUM, "use_quantum": True, "use_flux": False, "flux_config": None})
    assert problem.startswith("use_quantum: True is not supported")


def test_every_problem_comes_at_once():
    config = {
        "peft_type": "LORA",
        "r": 0,
        "lora_alpha": "8",
        "lora_dropout": 1.0,
        "bias": "some",
        "use_qalora": True,
    }
    found = problems({**config, "init_lora_weights": "pissa", "rank_pattern": {"q_proj": 0}})
    starts = [
        "use_qalora: ",
        "init_lora_weights: 'pissa'",
        "target_modules: is not set; name the modules",
    ]
    starts += [
        "lora.rank: must be at least 1, is 0",
        "lora.alpha: must be a number, is '8'",
        "lora.dropout: must be below",
    ]
    starts += ["lora.bias: must be one of", "lora.rank_pattern: must be at least 1, is 0"]
    assert len(found) == len(starts)
    for start in starts:
        assert any(problem.startswith(start) for problem in found), start


def test_options_that_exclude_each_other_are_refused():
    (problem,) = problems({**MINIMUM, "target_modules": ".*q_proj", "layers_to_transform": [0]})
    assert problem.startswith(
        "lora.layers_to_transform: cannot be used with a regular expression in targets"
    )


@pytest.mark.parametrize("kind", ["POLY", "lora", None, ["LORA"]])
def test_another_kind_of_adapter_is_refused_with_what_is_supported(kind):
    (problem,) = problems({**MINIMUM, "peft_type": kind})
    assert problem.startswith(f"peft_type {str(kind)!r} is not supported (supported: LORA, ")
    for name, method in METHODS.items():
        assert (method.peft.type or name.upper()) in problem


@pytest.mark.slow  # it imports peft
def test_each_type_of_pefts_is_read_or_refused_with_a_reason():
    from peft import PeftType

    read = {method.peft.type for method in METHODS.values()} - {None}
    assert not read & UNSUPPORTED.keys()
    assert {str(kind.value) for kind in PeftType} == read | UNSUPPORTED.keys()


@pytest.mark.parametrize("empty", [None, [], ""])
def test_an_empty_layers_pattern_is_none(empty):
    assert peft_config.read({**MINIMUM, "layers_pattern": empty}, "x", {}) == LoRA(
        rank=4, alpha=8, targets=("q_proj",)
    )


def test_an_unknown_setting_of_another_method_is_refused():
    (problem,) = problems({"peft_type": "FULL", "use_dora": True})
    assert problem.startswith("use_dora: True is not supported")


def test_every_method_reads_and_writes_the_exclusions_that_peft_has():
    import dataclasses

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    known = {
        name: dict(method.peft.names(method)).get("exclude_modules")
        for name, method in METHODS.items()
        if method.peft.type
        and "exclude_modules" in {f.name for f in dataclasses.fields(kinds[method.peft.type])}
    }
    assert len(known) > 15
    assert known == dict.fromkeys(known, "exclude")
