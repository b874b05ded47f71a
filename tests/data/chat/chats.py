"""What the tests of chats share: templates of several families, and tokenizers of two kinds that
know their marks.
"""

from __future__ import annotations

import functools
from typing import Any

TEMPLATES = {
    # each turn between marks, as Qwen's
    "marks": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content']"
        " }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{%"
        " endif %}"
    ),
    # the user's turn in brackets, a system turn inside the first, as Llama 2's and Mistral's
    "brackets": (
        "{{ bos_token }}{% set system = '' %}{% if messages and messages[0]['role'] == 'system'"
        " %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set"
        " messages = messages[1:] %}{% endif %}{% for message in messages %}{% if message['role']"
        " == 'user' %}[INST] {{ (system if loop.first else '') + message['content'] | trim }}"
        " [/INST]{% else %} {{ message['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    # a header for each turn, as Llama 3's; it asks for the day
    "headers": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role +"
        " '<|end_header_id|>\n\n' }}{% if m.role == 'system' %}{{ 'Today is ' + strftime_now('%d %b"
        " %Y') + '. ' }}{% endif %}{{ m.content | trim + '<|eot_id|>' }}{% endfor %}{% if"
        " add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%"
        " endif %}"
    ),
    # other names of the roles, and none for the system, as Gemma's
    "turns": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no"
        " system turns') }}{% endif %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{"
        " raise_exception('roles must alternate') }}{% endif %}<start_of_turn>{{ 'model' if m.role"
        " == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if"
        " add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    # thoughts are written in the last turn only, as Qwen3's
    "thoughts": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last"
        " %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content"
        " }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{%"
        " endif %}"
    ),
    # plain words, with nothing to mark an end, and a generation tag
    "plain": (
        "{% for m in messages %}{% if m.role == 'assistant' %}Answer: {% generation %}{{ m.content"
        " }}{% endgeneration %}{{ '\n' if not loop.last else '' }}{% else %}{{ m.role | title }}:"
        " {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}Answer: {% endif %}"
    ),
}
MARKS = [
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]
CORPUS = [
    "What is the capital of France? Paris is the capital of France.",
    "user assistant system model Answer: User: Question: Today is Monday. 42 17 100 1999",
    (
        "[INST] Add 2 and 3. [/INST] The sum of 2 and 3 is 5. <think>\nI add the"
        " numbers.\n</think>\n\n"
    ),
    "Thanks! Tell me more, please...\n\nYes, of course:\n- one\n- two\n- three",
] * 4


@functools.cache
def tokenizer_of(kind: str) -> Any:
    """Train a small tokenizer: `bytes` splits as GPT-2's, `metaspace` marks the beginning of a
    text, as Llama 2's.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    alphabet = sorted({c for text in CORPUS for c in text})
    if kind == "bytes":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        core.decoder = decoders.Metaspace()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        extra_special_tokens=MARKS[3:],
    )


USER = {"role": "user", "content": "What is the capital of France?"}
PARIS = {
    "role": "assistant",
    "content": "Paris is the capital of France.",
    "reasoning_content": "I know it.",
}
MORE = {"role": "user", "content": "Thanks! Tell me more, please..."}
LIST = {
    "role": "assistant",
    "content": "Yes, of course:\n- one\n- two",
    "reasoning_content": "I add.",
}
SUM = {"role": "assistant", "content": "42"}
SYSTEM = {"role": "system", "content": "Answer in one sentence."}
CHATS: dict[str, tuple[dict[str, str], ...]] = {
    "one turn": (USER, PARIS),
    "a number": (USER, SUM),
    "two turns": (USER, PARIS, MORE, LIST),
    "three turns": (USER, SUM, MORE, PARIS, USER, LIST),
    "ends with the user": (USER, PARIS, MORE),
    "system": (SYSTEM, USER, PARIS, MORE, SUM),
}
