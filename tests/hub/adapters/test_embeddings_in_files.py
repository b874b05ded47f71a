"""What PEFT writes of embeddings and heads beside an adapter, tied or not, with tokens added or
not: the logits are PEFT's.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft
from jaxpeft.errors import AdapterError
from tests.hub.helpers import edit_json, torch_base
from tests.models.conftest import forward

CAUSAL = "causal_lm"
QV = ["q_proj", "v_proj"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


def adapted(
    folder: Any,
    out: Any,
    *,
    kind: str = "LoraConfig",
    tokens: int = 0,
    whole: Any = "auto",
    move: Any = (),
    **options: Any,
) -> Any:
    """Make an adapter in peft, of a base with tokens added, whose leaves of these names are moved;
    saves it.
    """
    import peft
    import torch

    torch.manual_seed(2)
    base = torch_base(folder, CAUSAL)
    if tokens:
        base.resize_token_embeddings(tokens, mean_resizing=False)
    model = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            if leaf.requires_grad or any(part in name for part in move):
                leaf.add_(0.2 * torch.randn_like(leaf))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(
            out, **({"save_embedding_layers": whole} if kind == "LoraConfig" else {})
        )
    return model


def difference(torch_model: Any, model: Any, params: Any, vocab: int) -> float:
    """Return the largest difference of the logits, over the largest of them."""
    import torch

    ids = np.random.default_rng(0).integers(0, vocab, (3, 11))
    with torch.no_grad():
        theirs = torch_model(torch.from_numpy(ids)).logits.numpy()
    ours = np.asarray(forward(model, params, ids, None))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


LOADED = {
    "added tokens": (False, {"tokens": 120, "whole": True, "target_modules": QV}),
    "added tokens, trained": (
        False,
        {"tokens": 120, "whole": True, "target_modules": QV, "move": ("embed_tokens", "lm_head")},
    ),
    "added tokens, tied": (
        True,
        {"tokens": 120, "whole": True, "target_modules": QV, "move": ("embed_tokens",)},
    ),
    "embeddings as they are": (False, {"whole": True, "target_modules": QV}),
    "embeddings changed": (
        False,
        {"whole": True, "target_modules": QV, "move": ("embed_tokens", "lm_head")},
    ),
    "embeddings changed, tied": (
        True,
        {"whole": True, "target_modules": QV, "move": ("embed_tokens",)},
    ),
    "embedding adapted": (False, {"target_modules": [*QV, "embed_tokens"]}),
    "embedding adapted, tied": (True, {"target_modules": [*QV, "embed_tokens"]}),
    "rows of tokens": (False, {"kind": "TrainableTokensConfig", "token_indices": [3, 7]}),
    "rows of tokens, tied": (True, {"kind": "TrainableTokensConfig", "token_indices": [3, 7]}),
    "rows beside LoRA, tied": (True, {"target_modules": QV, "trainable_token_indices": [3, 7]}),
    "added tokens, embedding adapted, tied": (
        True,
        {"tokens": 120, "target_modules": [*QV, "embed_tokens"]},
    ),
    "added tokens, embedding adapted by DoRA, tied": (
        True,
        {"tokens": 120, "target_modules": [*QV, "embed_tokens"], "use_dora": True},
    ),
    "added tokens, both adapted": (
        False,
        {"tokens": 120, "target_modules": [*QV, "embed_tokens", "lm_head"]},
    ),
    "added tokens, embedding adapted, head whole": (
        False,
        {"tokens": 120, "target_modules": [*QV, "embed_tokens"], "modules_to_save": ["lm_head"]},
    ),
    "added tokens, their rows, tied": (
        True,
        {"tokens": 120, "kind": "TrainableTokensConfig", "token_indices": [110, 7]},
    ),
    "added tokens, their rows beside LoRA": (
        False,
        {"tokens": 120, "target_modules": QV, "trainable_token_indices": [110, 7]},
    ),
    "added tokens, their rows beside LoRA, tied": (
        True,
        {"tokens": 120, "target_modules": QV, "trainable_token_indices": [110, 7]},
    ),
    "added tokens, rows of both beside LoRA": (
        False,
        {
            "tokens": 120,
            "target_modules": QV,
            "trainable_token_indices": {"embed_tokens": [110, 7], "lm_head": [3]},
        },
    ),
    "tied by its option": (
        True,
        {"target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(("tied", "options"), LOADED.values(), ids=LOADED)
@pytest.mark.representatives("embeddings changed, tied-True", "*rows of both*-True")
def test_it_computes_what_peft_does(reference, tmp_path, tied, options, scan):
    folder = reference("llama", CAUSAL, tie_word_embeddings=tied).folder
    theirs = adapted(folder, tmp_path / "a", **options)
    tokens = options.get("tokens") or None
    model, base = jaxpeft.load(folder, task=CAUSAL, vocab_size=tokens, scan_layers=scan)
    method, params = jaxpeft.load_adapter(tmp_path / "a", model, base)
    assert difference(theirs, model, params, model.config.vocab_size) < 1e-5
    # what was read whole is written again
    jaxpeft.save_adapter(tmp_path / "b", method, params, model)
    _, again = jaxpeft.load_adapter(tmp_path / "b", model, base)
    assert difference(theirs, model, again, model.config.vocab_size) < 1e-5
    if tokens and any(
        ".base_layer." in name for name in load_file(tmp_path / "a" / "adapter_model.safetensors")
    ):
        assert difference(reloaded(folder, tmp_path / "b", tokens), model, params, tokens) < 1e-5


def reloaded(folder: Any, adapter: Any, tokens: int) -> Any:
    """Load an adapter in peft onto a base with tokens added, whose new rows are others than those
    of `adapted`.
    """
    from peft import PeftModel

    base = torch_base(folder, CAUSAL)
    base.resize_token_embeddings(tokens, mean_resizing=False)
    with warnings.catch_warnings():  # of a tied head's rows, which peft has by the embedding's
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        return PeftModel.from_pretrained(base, adapter).eval()


REFUSED = {
    "head of its own": (
        {"target_modules": [*QV, "lm_head"]},
        r"lm_head\.\S+: .* this model ties its head to the embedding",
    ),
    "head and embedding": (
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        r"lm_head\.\S+: .* ties its head to the",
    ),
    "head whole": (
        {"target_modules": QV, "modules_to_save": ["lm_head"]},
        r"lm_head\.weight: .* ties its head to the embedding",
    ),
    "embedding whole": (
        {"target_modules": QV, "modules_to_save": ["embed_tokens"]},
        r"PEFT untied them, but this model ties them",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_head_that_was_trained_apart_is_refused_by_the_tie(reference, tmp_path, options, message):
    folder = reference("llama", CAUSAL, tie_word_embeddings=True).folder
    adapted(folder, tmp_path / "a", **options)
    with pytest.raises(AdapterError, match=message):
        jaxpeft.load_adapter(tmp_path / "a", *jaxpeft.load(folder, task=CAUSAL))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"whole": True, "target_modules": QV}, "weight"),
        ({"target_modules": [*QV, "embed_tokens"]}, "base_layer.weight"),
        (
            {"target_modules": QV, "trainable_token_indices": [110]},
            "token_adapter.base_layer.weight",
        ),
    ],
)
def test_a_base_with_too_few_tokens_is_told_how_many(reference, tmp_path, options, name):
    folder = reference("qwen2", CAUSAL).folder
    adapted(folder, tmp_path / "a", tokens=120, **options)
    told = (
        rf"embed_tokens\.{re.escape(name)} is \[120, 32\], must be .*; load the base with"
        r" vocab_size=120"
    )
    with pytest.raises(AdapterError, match=told):
        jaxpeft.load_adapter(tmp_path / "a", *jaxpeft.load(folder, task=CAUSAL))


# ------------------------------------------------------------------------------------ other methods


@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor:UserWarning")
@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning")
@pytest.mark.parametrize(
    "size", [{"boft_block_size": 4}, {"boft_block_size": 0, "boft_block_num": 4}]
)
@pytest.mark.representatives("size1")
def test_boft_of_two_factors_from_a_peft_without_cuda_has_one(reference, tmp_path, size):
    folder = reference("llama", CAUSAL).folder
    theirs = adapted(
        folder,
        tmp_path / "a",
        kind="BOFTConfig",
        boft_n_butterfly_factor=2,
        target_modules=QV,
        **size,
    )
    model, base = jaxpeft.load(folder, task=CAUSAL)
    method, params = jaxpeft.load_adapter(tmp_path / "a", model, base)
    assert method.factors == 1
    assert difference(theirs, model, params, model.config.vocab_size) < 1e-5


@pytest.mark.parametrize(
    "kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"]
)
def test_virtual_tokens_without_a_task_are_refused_for_peft_leaves_them_out(
    reference, tmp_path, kind
):
    import torch

    folder = reference("llama", CAUSAL).folder
    theirs = adapted(folder, tmp_path / "a", kind=kind, num_virtual_tokens=4)
    model, base = jaxpeft.load(folder, task=CAUSAL)
    jaxpeft.load_adapter(tmp_path / "a", model, base)
    edit_json(tmp_path / "a" / "adapter_config.json", lambda config: config.update(task_type=None))
    with pytest.raises(
        AdapterError, match="task_type: is not set, so PEFT would ignore the virtual tokens"
    ):
        jaxpeft.load_adapter(tmp_path / "a", model, base)
    from peft import PeftModel

    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        bare = (
            PeftModel.from_pretrained(torch_base(folder, CAUSAL), tmp_path / "a").eval()(ids).logits
        )
        plain = torch_base(folder, CAUSAL)(ids).logits
        assert torch.equal(bare, plain)
        assert not torch.allclose(theirs(ids).logits[:, -ids.shape[1] :], plain, atol=1e-2)


HUGE = {
    "rank": ("LoraConfig", {"target_modules": QV}, {"r": 10**8}),
    "rank pattern": ("LoraConfig", {"target_modules": QV}, {"rank_pattern": {"q_proj": 10**8}}),
    "virtual tokens": (
        "PromptTuningConfig",
        {"num_virtual_tokens": 4},
        {"num_virtual_tokens": 10**8},
    ),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 4}, {"num_virtual_tokens": 10**8}),
    "vera": ("VeraConfig", {"target_modules": ["q_proj"]}, {"r": 10**8}),
}


@pytest.mark.parametrize(("kind", "options", "change"), HUGE.values(), ids=HUGE)
def test_a_size_that_the_file_does_not_have_takes_no_memory(
    reference, tmp_path, kind, options, change
):
    import resource

    folder = reference("llama", CAUSAL).folder
    adapted(folder, tmp_path / "a", kind=kind, **options)
    edit_json(tmp_path / "a" / "adapter_config.json", lambda config: config.update(change))
    model, base = jaxpeft.load(folder, task=CAUSAL)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterError, match=r"misshaped: .* must be \[.*100000000"):
        jaxpeft.load_adapter(tmp_path / "a", model, base)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_a_copy_that_differs_is_no_copy(reference, tmp_path):
    folder = reference("llama", CAUSAL, tie_word_embeddings=True).folder
    adapted(folder, tmp_path / "a", kind="TrainableTokensConfig", token_indices=[3, 7])
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    ((name, rows),) = ((name, rows) for name, rows in tensors.items() if "embed_tokens" in name)
    head = name.replace("model.embed_tokens", "lm_head")
    save_file(tensors | {head: rows + np.float32(1)}, file)
    model, base = jaxpeft.load(folder, task=CAUSAL)
    with pytest.raises(
        AdapterError, match=r"lm_head\.trainable_tokens_delta: .* ties its head to the embedding"
    ):
        jaxpeft.load_adapter(tmp_path / "a", model, base)
    assert jax.tree.leaves(base)
