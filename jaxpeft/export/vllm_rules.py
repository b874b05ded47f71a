"""What vLLM's LoRA loader accepts, as one table.

The rules are those of vLLM's source (github.com/vllm-project/vllm), at the commits in parentheses:

* `vllm/lora/peft_helper.py`, `PEFTHelper` (as documented in November 2026): the fields of
  `adapter_config.json`. `modules_to_save` and DoRA are errors, and `bias` is `none`. The scale is
  alpha / r, or alpha / sqrt(r) with `use_rslora`, for all modules: `rank_pattern` and
  `alpha_pattern` are not read.
* `vllm/lora/utils.py`, `parse_fine_tuned_lora_name`: the names of tensors.
* `vllm/lora/lora_model.py`, `from_local_checkpoint` (0306474): the last component of a module's
  name must be one that the model class lists. A module that the model does not have is ignored
  without a message.
* `vllm/config/lora.py`, `MaxLoRARanks` (01230b4): the values of `--max-lora-rank`, 16 by default.
* `vllm/model_executor/models/qwen2.py` (013a279), `qwen3.py` (002456d) and `llama.py`:
  `packed_modules_mapping` and `embedding_modules` of the classes; those of Qwen list no embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxpeft.errors import ExportError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of `--max-lora-rank`."""
_PREFIX = "base_model.model."
_ENDS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
}
_LINEAR = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})


@dataclass(frozen=True)
class ServingClass:
    """A model class of vLLM, as its LoRA loader sees it.

    Attributes:
        name: name of the class.
        modules: last components of the names of modules that can have a LoRA in its layers.
        embeddings: the same, of modules outside of the layers.
        text_model: what stands in front of `model.layers` in the class: `language_model.` of one
            whose text model is a part of a multimodal one.
    """

    name: str
    modules: frozenset[str] = _LINEAR
    embeddings: frozenset[str] = frozenset()
    text_model: str = ""

    def accepts(self, module: str) -> bool:
        """Return whether the class has a module of this name that can have a LoRA."""
        own = module.removeprefix(self.text_model)
        last = own.rpartition(".")[2]
        if self.text_model and own == module:
            return False
        return (own.startswith("model.layers.") and last in self.modules) or (
            own in ("model.embed_tokens", "lm_head") and last in self.embeddings
        )


CLASSES: Mapping[str, ServingClass] = {
    "llama": ServingClass("LlamaForCausalLM", embeddings=frozenset({"embed_tokens", "lm_head"})),
    "mistral": ServingClass(
        "MistralForCausalLM", embeddings=frozenset({"embed_tokens", "lm_head"})
    ),
    "qwen2": ServingClass("Qwen2ForCausalLM"),
    "qwen3": ServingClass("Qwen3ForCausalLM"),
}
"""The class that serves a `model_type`."""


def max_rank(rank: int) -> int:
    """Return the smallest value of `--max-lora-rank` for a rank."""
    return next(one for one in RANKS if one >= rank)


def parse_name(name: str, serving: ServingClass) -> tuple[str, str]:
    """Return the module of a tensor, and `a` or `b`.

    Args:
        name: name of a tensor in `adapter_model.safetensors`.
        serving: the class that loads it.

    Raises:
        ExportError: vLLM does not know the name, or has no such module and ignores it.
    """
    end = next((end for end in _ENDS if name.endswith(end)), None)
    if not name.startswith(_PREFIX) or end is None:
        raise ExportError(f"{name}: is not the name of a LoRA tensor in vLLM")
    module = name.removeprefix(_PREFIX).removesuffix(end)
    if not serving.accepts(module):
        raise ExportError(
            f"{name}: {serving.name} of vLLM has no module {module} that can have a LoRA, and would"
            " ignore it"
        )
    return module, _ENDS[end]
