"""The table of what vLLM accepts."""

from __future__ import annotations

import pytest

from jaxpeft.errors import ExportError
from jaxpeft.export.vllm_rules import CLASSES, ServingClass, max_rank, parse_name

MODULE = "model.layers.0.self_attn.q_proj"
LLAMA, QWEN = CLASSES["llama"], CLASSES["qwen3"]
COMPOSITE = ServingClass("Composite", text_model="language_model.")


@pytest.mark.parametrize(
    ("serving", "name", "wanted"),
    [
        (LLAMA, f"base_model.model.{MODULE}.lora_A.weight", (MODULE, "a")),
        (LLAMA, f"base_model.model.{MODULE}.lora_B.weight", (MODULE, "b")),
        (LLAMA, "base_model.model.lm_head.lora_B.weight", ("lm_head", "b")),
        (
            LLAMA,
            "base_model.model.model.embed_tokens.lora_embedding_A",
            ("model.embed_tokens", "a"),
        ),
        (
            COMPOSITE,
            f"base_model.model.language_model.{MODULE}.lora_A.weight",
            (f"language_model.{MODULE}", "a"),
        ),
    ],
)
def test_a_name_is_parsed_as_vllm_does(serving, name, wanted):
    assert parse_name(name, serving) == wanted


@pytest.mark.parametrize(
    ("serving", "name", "why"),
    [
        (LLAMA, f"base_model.model.{MODULE}.lora_magnitude_vector", "is not the name of a LoRA"),
        (LLAMA, f"base_model.model.{MODULE}.lora_B.bias", "is not the name of a LoRA tensor"),
        (LLAMA, f"{MODULE}.lora_A.weight", "is not the name of a LoRA tensor in vLLM"),
        (LLAMA, "base_model.model.model.norm.lora_A.weight", "LlamaForCausalLM of vLLM has no"),
        (LLAMA, "base_model.model.layers.0.self_attn.q_proj.lora_A.weight", "would ignore it"),
        (QWEN, "base_model.model.lm_head.lora_A.weight", "Qwen3ForCausalLM of vLLM has no module"),
        # a no-op of the worst kind: it loads, and changes nothing
        (COMPOSITE, f"base_model.model.{MODULE}.lora_A.weight", "would ignore it"),
    ],
)
def test_what_vllm_refuses_or_ignores_is_an_error(serving, name, why):
    with pytest.raises(ExportError, match=why):
        parse_name(name, serving)


@pytest.mark.parametrize(("rank", "wanted"), [(1, 1), (2, 8), (16, 16), (257, 320), (512, 512)])
def test_the_rank_of_the_server_is_the_next_that_it_allows(rank, wanted):
    assert max_rank(rank) == wanted
