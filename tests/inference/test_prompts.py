"""Prompts have the tokens that training sees before an answer."""

from __future__ import annotations

from typing import Any

import pytest

from jaxpeft.config.data_config import DataConfig
from jaxpeft.data.chat.dialogs import Completion, Dialog
from jaxpeft.data.examples.make import make_examples
from jaxpeft.data.rows.columns import Columns
from jaxpeft.data.rows.read import Rows
from jaxpeft.data.tokens.row_encoder import RowEncoder
from jaxpeft.errors import ConfigError, DataError
from jaxpeft.inference.prompts import (
    PromptEncoder,
    decode_completion,
    read_prompts,
    with_system,
)
from tests.data.conftest import make_word_tokenizer

CHAT = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e f"},
]
ROWS: list[tuple[Any, dict[str, Any]]] = [
    ("messages", {"messages": CHAT}),
    ("messages", {"messages": [{"role": "system", "content": "f"}, *CHAT[:2]]}),
    ("instruction", {"instruction": "a b", "input": "c", "output": "d"}),
    ("instruction", {"instruction": "a b", "output": "d", "system": "e"}),
    ("prompt_completion", {"prompt": "a b", "completion": " c"}),
    ("prompt_completion", {"question": "a b", "answer": "c"}),
    ("prompt_completion", {"prompt": CHAT[:1], "completion": CHAT[1:2]}),
]


def rows_of(*records: dict[str, Any]) -> Rows:
    return Rows([*records], "rows.jsonl", "0" * 64)


@pytest.mark.parametrize("template", [None, "bos"])
@pytest.mark.parametrize(
    ("kind", "record"), ROWS, ids=[f"{i}-{k}" for i, (k, _) in enumerate(ROWS)]
)
def test_a_prompt_has_the_tokens_before_the_answer_in_training(
    kind: Any, record: dict[str, Any], template: str | None
) -> None:
    tokenizer = make_word_tokenizer(template, bos_token="[CLS]", eos_token="[SEP]")
    options = DataConfig(train="x", chat_template="chatml", separator=" b")
    trained = RowEncoder(options, tokenizer, 1000, use_cache=False)
    rows = rows_of(record)
    examples = make_examples(rows, kind=kind)
    encoder = PromptEncoder(tokenizer, separator=" b", chat_template="chatml")
    (prompt,) = read_prompts(rows, Columns())
    found = encoder(prompt)
    assert found == trained.prompt(examples, 0)
    encoded = trained(examples)
    assert encoded.tokens[: len(found)].tolist() == found
    assert encoded.labels[len(found)] == encoded.tokens[len(found)]  # the answer is next


def test_rows_without_an_answer_can_be_mixed() -> None:
    prompts = read_prompts(
        rows_of(
            {"prompt": "a"},
            {"messages": CHAT[:1]},
            {"instruction": "b", "messages": None},
            {"mine": "c", "prompt": "d"},
        ),
        Columns(),
    )
    assert prompts[0] == Completion("a", "")
    assert [p.messages[-1]["content"] for p in prompts[1:3] if isinstance(p, Dialog)] == [
        "a b",
        "b",
    ]
    (named,) = read_prompts(rows_of({"mine": "c", "prompt": "d"}), Columns(prompt="mine"))
    assert named == Completion("c", "")


def test_rows_that_cannot_be_used_are_told() -> None:
    def fails(*records: dict[str, Any], columns: Columns = Columns()) -> str:  # noqa: B008
        with pytest.raises(DataError) as error:
            read_prompts(rows_of(*records), columns)
        return str(error.value)

    assert fails({"a": 1, "b": 2}) == (
        "rows.jsonl (row 1): has no prompt, messages or instruction; name its column in"
        " data.columns, such as prompt=a. Columns present: a, b"
    )
    assert "'mine'" in fails({"prompt": "x"}, columns=Columns(prompt="mine"))
    found = fails({"prompt": "a"}, {"prompt": 5}, {"messages": []}, {"messages": CHAT[1:2]})
    assert "rows.jsonl (row 2): field 'prompt'" in found
    assert "rows.jsonl (row 3): field 'messages'" in found
    assert "row 4): field 'messages' has no turn before the answer" in found


def test_an_encoder_tells_what_it_lacks() -> None:
    tokenizer = make_word_tokenizer(bos_token="[CLS]", eos_token="[SEP]")
    with pytest.raises(ConfigError, match="the tokenizer has no template"):
        PromptEncoder(tokenizer)(Dialog((CHAT[0],)))
    with pytest.raises(DataError, match="row 3: has no tokens; write a text to continue"):
        PromptEncoder(tokenizer)(Completion("", ""), "row 3")
    strict = "{{ raise_exception('no system turns') }}"
    tokenizer.chat_template = strict
    with pytest.raises(DataError, match=r"the prompt: .*no system turns"):
        PromptEncoder(tokenizer)(Dialog((CHAT[0],)))


def test_a_system_text_is_added_to_chats_without_one() -> None:
    system = {"role": "system", "content": "s"}
    assert with_system(Dialog((CHAT[0],)), "s") == Dialog((system, CHAT[0]))
    own = Dialog(({"role": "system", "content": "t"}, CHAT[0]))
    assert with_system(own, "s") is own
    assert with_system(Completion("a", ""), "s") == Completion("a", "")


def test_the_text_of_new_tokens_keeps_its_first_space_and_leaves_out_half_characters() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    prompt = tokenizer("one")["input_ids"]
    tokens = tokenizer(" two é")["input_ids"]
    assert decode_completion(tokenizer, prompt, tokens) == " two é"
    assert decode_completion(tokenizer, prompt, tokens[:-1], partial=True) == " two "
    assert decode_completion(tokenizer, prompt, tokens[:-1]) == " two \ufffd"
