"""The types of PEFT's adapters that no method reads, and why."""

from __future__ import annotations

from collections.abc import Mapping

UNSUPPORTED: Mapping[str, str] = {
    "ADAMSS": (
        "the files do not say which outputs are in which subspace; PEFT clusters them again with"
        " scikit-learn, whose result other libraries do not reproduce"
    ),
    "ADAPTION_PROMPT": (
        "its prompts have an attention of their own in each layer, with a gate; the attention of"
        " the models has one softmax, over virtual tokens as well"
    ),
    "CPT": (
        "its loss also weights the labels inside of the prompt, and a loss here has only those of"
        " the rows; for inference, save the prompt as PROMPT_TUNING"
    ),
    "FROD": (
        "modules of the same kind share a matrix, one for each kind, and a method's shared leaves"
        " have fixed names, the same for all modules"
    ),
    "LILY": (
        "its weights are averaged over all tokens of a batch, so that the output for a row depends"
        " on the other rows and on padding, and generation token by token differs"
    ),
    "MULTITASK_PROMPT_TUNING": (
        "each row needs the number of its task, and the models have no such input; save the prompt"
        " of one task as PROMPT_TUNING"
    ),
    "POLY": "each row needs the number of its task, and the models have no such input",
    "PSOFT": (
        "the files do not contain the singular vectors that they refer to; PEFT computes them"
        " again, and their signs differ between libraries and devices"
    ),
    "SHADOW": "it runs a second, smaller model beside the base",
    "TINYLORA": (
        "its vectors are numbered in the order of torch's modules, which a tree of parameters does"
        " not have"
    ),
    "XLORA": (
        "it runs the base twice: hidden states of the first pass weight several LoRA adapters in"
        " the second one"
    ),
}
"""Reasons by `peft_type`."""
