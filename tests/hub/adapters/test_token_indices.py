"""LoRA and trainable tokens in one folder of PEFT, `trainable_token_indices`: both ways against the
real peft.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxpeft
from jaxpeft.errors import AdapterError
from jaxpeft.hub.adapters import peft_config
from tests.conformance.conftest import moved
from tests.hub.helpers import peft_load
from tests.methods.interop import case_of, exported, gap, imported, quiet
from tests.models.conftest import reference  # noqa: F401 - a fixture

pytestmark = quiet
TOKENS = (5, 3, 9)


def tied(reference: Any, on: bool) -> Any:
    """Return the models of a reference with the head tied to the embedding."""
    return lambda kind, task: reference(kind, task, **({"tie_word_embeddings": True} if on else {}))


def both(tokens: Any = None, **options: Any) -> Any:
    return jaxpeft.Mixed(methods=(jaxpeft.LoRA(rank=4, alpha=8.0, **options), tokens or trained()))


def trained(**options: Any) -> Any:
    return jaxpeft.TrainableTokens(tokens=TOKENS, **options)


@pytest.mark.parametrize(("kind", "on"), [("llama", False), ("llama", True), ("bert", False)])
@pytest.mark.representatives("llama-True")
def test_the_real_peft_reads_what_is_saved(
    reference: Any, tmp_path: Path, kind: str, on: bool
) -> None:
    assert exported(tied(reference, on), tmp_path, case_of(both(), kind, "LoraConfig")) < 1e-4
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert list(config["trainable_token_indices"].values()) == [list(TOKENS)]
    assert not any("embed" in name for name in config["target_modules"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "jaxpeft.json",
    ]


@pytest.mark.parametrize(
    ("kind", "on", "given"),
    [
        ("llama", False, list(TOKENS)),
        ("llama", True, list(TOKENS)),
        ("llama", False, {"embed_tokens": [5, 3], "lm_head": [9, 1, 4]}),
        ("llama", True, {"embed_tokens": [5, 3], "lm_head": [5, 3]}),
        ("bert", False, {"word_embeddings": list(TOKENS)}),
    ],
)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.representatives("False-bert-False-given4")
def test_what_the_real_peft_saved_is_read(
    reference: Any,
    tmp_path: Path,
    kind: str,
    on: bool,
    given: Any,
    dora: bool,
) -> None:
    linear = ["query", "value"] if kind == "bert" else ["q_proj", "down_proj"]
    case = case_of(
        both(),
        kind,
        "LoraConfig",
        r=4,
        lora_alpha=8,
        target_modules=linear,
        use_dora=dora,
        trainable_token_indices=given,
    )
    far, method = imported(tied(reference, on), tmp_path, case)
    assert far < 1e-4
    names = [part.name for part in method.parts()]
    assert names[0] == ("dora" if dora else "lora")
    assert set(names[1:]) == {"trainable_tokens"}
    assert method.parts()[1].tokens == tuple(
        given if isinstance(given, list) else next(iter(given.values()))
    )


def test_it_is_saved_as_it_was_read(reference: Any, tmp_path: Path) -> None:
    torch_model = reference("llama", "causal_lm")
    model, base = torch_model.load(scan_layers=True)
    given = jaxpeft.Mixed(
        methods=(
            jaxpeft.LoRA(rank=2, targets="all-linear", exclude=("lm_head",)),
            trained(),
            jaxpeft.TrainableTokens(tokens=(1,), targets=("lm_head",)),
        ),
        modules_to_save=("norm",),
    )
    params = moved(given, jaxpeft.rewrite(given, base, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path / "a", given, params, model)
    method, loaded = jaxpeft.load_adapter(tmp_path / "a", model, base)
    jaxpeft.save_adapter(tmp_path / "b", method, loaded, model)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    case = case_of(given, "llama", "LoraConfig")
    from tests.conformance.test_peft import ours, theirs

    wanted = theirs(case, peft_load(torch_model.folder, case.task, tmp_path / "a"))
    assert gap(wanted, ours(case, model, loaded), torch_model, case) < 1e-4


def test_the_other_spelling_beside_the_right_one_is_not_taken_for_it(
    reference: Any, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    model, base = reference("llama", "causal_lm").load()
    jaxpeft.save_adapter(tmp_path, both(), jaxpeft.rewrite(both(), base, jax.random.key(0)), model)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    other = "base_model.model.model.embed_tokens.trainable_tokens_delta"
    save_file(tensors | {other: np.zeros((3, 32), np.float32)}, file)
    with pytest.raises(AdapterError, match=f"extra: {re.escape(other)}$"):
        jaxpeft.load_adapter(tmp_path, model, base)


def test_an_adapter_takes_the_place_of_one_of_several_folders(
    reference: Any, tmp_path: Path
) -> None:
    model, base = reference("llama", "causal_lm").load()
    for method in (jaxpeft.Mixed(methods=(jaxpeft.IA3(), trained())), both()):
        jaxpeft.save_adapter(
            tmp_path, method, jaxpeft.rewrite(method, base, jax.random.key(0)), model
        )
    found, _ = jaxpeft.load_adapter(tmp_path, model, base)
    assert [part.name for part in found.parts()] == ["lora", "trainable_tokens"]


def test_two_methods_that_peft_has_no_one_folder_for_have_one_each(
    reference: Any, tmp_path: Path
) -> None:
    model, base = reference("llama", "causal_lm").load()
    method = jaxpeft.Mixed(methods=(jaxpeft.IA3(), trained()))
    jaxpeft.save_adapter(tmp_path, method, jaxpeft.rewrite(method, base, jax.random.key(0)), model)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "ia3",
        "jaxpeft_parts.json",
        "trainable_tokens",
    ]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            "5",
            (
                "trainable_token_indices: must be token ids, or a mapping from module"
                " names to token ids, is '5'"
            ),
        ),
        ([1.5], "trainable_token_indices: must be token ids"),
        ([-1], "trainable_token_indices: must be token ids"),
        ({"embed_tokens": 3}, "trainable_token_indices: must be token ids"),
        ([3, 3], "tokens: lists a token twice"),
        (
            {"embed_tokens": [1], "lm_head": [2]},
            "lm_head is tied to the embedding, but has other tokens",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(given: Any, problem: str) -> None:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    config["trainable_token_indices"] = given
    with pytest.raises(AdapterError, match=re.escape(problem)) as error:
        peft_config.read(config, "adapter_config.json", {"model": {}})
    assert str(error.value).startswith("adapter_config.json: ")


def test_a_token_that_the_model_has_not_and_a_missing_tensor_are_named(
    reference: Any, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    model, base = reference("llama", "causal_lm").load()
    method = both()
    jaxpeft.save_adapter(tmp_path, method, jaxpeft.rewrite(method, base, jax.random.key(0)), model)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    (name,) = (name for name in tensors if "token_adapter" in name)
    assert name == "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    save_file({key: np.ascontiguousarray(t) for key, t in tensors.items() if key != name}, file)
    with pytest.raises(
        AdapterError,
        match=(
            r"missing:"
            r" base_model\.model\.model\.embed_tokens\.token_adapter\.trainable_tokens_delta"
        ),
    ):
        jaxpeft.load_adapter(tmp_path, model, base)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["trainable_token_indices"] = [10_000]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(jaxpeft.JaxpeftError, match="10000 is outside the"):
        jaxpeft.load_adapter(tmp_path, model, base)
