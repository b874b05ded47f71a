"""Encoding: the arrays, what they are keyed by, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import tempfile
from pathlib import Path

import numpy as np
import pytest

from jaxpeft.data.examples.make import make_examples
from jaxpeft.data.tokens.encode import encode, fingerprint, pad_id
from jaxpeft.data.tokens.tokenize import TokenizeOptions
from jaxpeft.errors import ConfigError, DataError
from tests.data.chat.chats import CHATS, PARIS, TEMPLATES, USER, tokenizer_of
from tests.data.chat.families import FAMILIES, TOOL, said, thought, user

# The package has the function under the module's name.
MODULE = importlib.import_module("jaxpeft.data.tokens.encode")
VOCABULARY = 42
OFF = {"max_length": 8, "vocab_size": VOCABULARY, "use_cache": False}


def test_classification_is_stored_ragged(classified, bert):
    made = encode(classified(("a b", "x"), ("c d e", "y"), ("f", "x")), bert, **OFF)
    assert (made.tokens.dtype, made.offsets.tolist(), len(made)) == (np.int32, [0, 4, 9, 12], 3)
    assert made.tokens[4:9].tolist() == bert("c d e")["input_ids"]
    assert (made.labels.tolist(), made.labels.dtype) == ([0, 1, 0], np.int32)
    assert made.type_ids.tolist() == [0] * 12
    assert not made.per_token
    assert made.counts == {
        "dropped": 0,
        "learned": 0,
        "rows": 3,
        "sequences": 3,
        "tokens": 12,
        "truncated": 0,
        "unlearned": 0,
    }
    assert (made.cache, made.label_names, made.max_length) == ("off", ("x", "y"), 8)


def test_text_is_stored_with_a_label_a_token(documents, llama):
    made = encode(documents("a b c d e f g h i j", "k"), llama, **OFF)
    assert made.lengths.tolist() == [8, 3, 2]
    assert made.source.tolist() == [0, 0, 1]
    assert made.per_token
    assert (made.labels == made.tokens).all()
    assert made.type_ids is None
    assert made.counts == {
        "dropped": 0,
        "learned": 13,
        "rows": 2,
        "sequences": 3,
        "tokens": 13,
        "truncated": 0,
        "unlearned": 0,
    }


def test_token_classification_is_stored_with_a_label_a_token(rows_of, bert):
    rows = rows_of({"tokens": ["a", "b"], "tags": ["O", "X"]}, {"tokens": ["c"], "tags": ["X"]})
    made = encode(make_examples(rows, kind="token_classification"), bert, **OFF)
    assert made.labels.tolist() == [-100, 0, 1, -100, -100, 1, -100]


def test_progress_counts_rows(documents, plain, monkeypatch):
    seen = []
    monkeypatch.setattr(MODULE, "BATCH", 2)
    encode(
        documents(*"abcde"), plain, progress=lambda done, total: seen.append((done, total)), **OFF
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_batches_of_the_tokenizer_change_nothing(classified, minilm, monkeypatch):
    examples = classified(("a long sentence", "x"), ("one", "y"), ("hello there", "x"))
    options = OFF | {"vocab_size": 30522}
    whole = encode(examples, minilm, **options)
    monkeypatch.setattr(MODULE, "BATCH", 1)
    parts = encode(examples, minilm, **options)
    for field in ("tokens", "offsets", "labels", "type_ids", "source"):
        assert np.array_equal(getattr(whole, field), getattr(parts, field))


def test_a_row_that_fails_in_a_later_batch_is_told_and_nothing_hangs(rows_of, plain, monkeypatch):
    monkeypatch.setattr(MODULE, "BATCH", 2)
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": good} for _ in range(20)]
    for at in (5, 9, 13):
        rows[at] = {"messages": [{"role": "user", "content": "fail"}, good[1]]}
    template = (
        "{% for m in messages %}{% if m.content == 'fail' %}{{ raise_exception('no') }}{% endif"
        " %}{{ m.content }} {% endfor %}"
    )
    examples = make_examples(rows_of(*rows), kind="messages")
    with pytest.raises(DataError, match=r"\(row 6\): the chat template fails: no"):
        encode(examples, plain, chat_template=write_template(template), **OFF)


def write_template(source):
    file = Path(tempfile.mkdtemp()) / "mine.jinja"
    file.write_text(source)
    return str(file)


def test_the_fingerprint_follows_tokenizer_template_options_and_data(classified, bert, plain):
    examples, options = classified(("a", "x"), ("b", "y")), TokenizeOptions(8, False, False)
    prints = [fingerprint(examples, bert, options)]
    prints.append(fingerprint(examples, plain, options))
    prints.append(fingerprint(examples, bert, dataclasses.replace(options, max_length=9)))
    prints.append(fingerprint(classified(("a", "x"), ("b", "z")), bert, options))
    bert.add_tokens(["new"])
    prints.append(fingerprint(examples, bert, options))
    bert.chat_template = "{{ messages }}"
    prints.append(fingerprint(examples, bert, options))
    bert.add_special_tokens({"sep_token": "a"})
    prints.append(fingerprint(examples, bert, options))
    assert len(set(prints)) == len(prints)


def test_the_fingerprint_does_not_follow_the_tokenizer_s_last_call(classified, bert):
    examples, options = classified(("a", "x"), ("b", "y")), TokenizeOptions(8, False, False)
    before = fingerprint(examples, bert, options)
    bert(["a b c", "d"], truncation=True, max_length=3, padding=True)
    assert fingerprint(examples, bert, options) == before


def test_a_token_beyond_the_model_s_vocabulary_is_refused(documents, plain):
    with pytest.raises(DataError) as caught:
        encode(documents("a 9"), plain, max_length=8, vocab_size=41, use_cache=False)
    assert (
        str(caught.value)
        == "tokenizer 'TokenizersBackend': its vocabulary has 42 tokens, the model's 41, and the"
        " data contains token 41 ('9'); use the model's own tokenizer"
    )


def test_a_row_without_a_token_is_refused(documents, plain):
    from tokenizers import normalizers

    plain.backend_tokenizer.model.unk_token = "[NONE]"
    plain.backend_tokenizer.normalizer = normalizers.Replace("?", "")
    with pytest.raises(DataError) as caught:
        encode(documents("a", "?"), plain, **OFF)
    assert (
        str(caught.value)
        == "rows.jsonl:2:1 (row 2): the tokenizer 'TokenizersBackend' returns no tokens: '?';"
        " remove the row"
    )


def test_options_that_do_not_fit_are_refused_at_once(classified, documents, bert):
    with pytest.raises(ConfigError) as caught:
        encode(documents("a"), bert, max_length=1, vocab_size=42, add_bos=True, add_eos=True)
    assert str(caught.value).splitlines() == [
        "add_bos=True, but the tokenizer 'TokenizersBackend' has no bos_token; remove it",
        "add_eos=True, but the tokenizer 'TokenizersBackend' has no eos_token; remove it",
        "max_length=1 leaves no room for text; set at least 2",
    ]
    with pytest.raises(ConfigError) as caught:
        encode(classified(("a", "x"), ("b", "y")), bert, max_length=2, vocab_size=42, add_eos=True)
    assert str(caught.value).splitlines() == [
        "add_eos=True is for text, not for classification; remove it",
        "max_length=2 leaves no room for text; set at least 3",
    ]


def test_a_slow_tokenizer_is_refused(documents, plain, monkeypatch):
    monkeypatch.setattr(type(plain), "is_fast", False)
    with pytest.raises(
        ConfigError, match=r"not a fast tokenizer; use one that has a tokenizer.json"
    ):
        encode(documents("a"), plain, **OFF)


@pytest.mark.parametrize("split", [False, True], ids=["as RoBERTa's", "as Llama 3's"])
@pytest.mark.parametrize("ready", [False, True])
def test_words_keep_the_space_that_is_part_of_them(rows_of, split, ready):
    """The tokens of words are those of the text that they make, as with a tokenizer loaded with
    add_prefix_space=True.
    """
    from tokenizers import Regex, pre_tokenizers

    tokenizer = copy.deepcopy(tokenizer_of("bytes"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=ready, use_regex=not split)
    pattern = pre_tokenizers.Split(Regex(r"'\w+| ?\w+|[^\w\s]+|\s+"), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pattern, level]) if split else level
    )
    words = ["the", "capital", "of", "France's"]
    examples = make_examples(
        rows_of({"tokens": words, "tags": list("ABAC")}), kind="token_classification"
    )
    made = encode(examples, tokenizer, **OFF | {"max_length": 32, "vocab_size": 600})
    if not (split and ready):  # there, each piece of a word gets a space
        assert made.tokens.tolist() == tokenizer(" " + " ".join(words))["input_ids"]
    assert [label for label in made.labels.tolist() if label != -100] == [0, 1, 0, 2]


def test_the_pad_id_is_the_tokenizer_s_where_the_model_knows_it(plain, bert):
    assert (pad_id(plain, 42), pad_id(bert, 42)) == (0, 0)
    plain.pad_token = "</s>"
    assert (pad_id(plain, 42), pad_id(plain, 5)) == (5, 0)
    plain.pad_token = None
    assert pad_id(plain, 42) == 0


def test_no_row_that_is_left_is_refused_whatever_may_be_dropped(rows_of, plain):
    rows = rows_of(*({"prompt": "a b c d e f g h i", "completion": " j"} for _ in range(3)))
    with pytest.raises(DataError) as caught:
        encode(make_examples(rows, kind="prompt_completion"), plain, most_dropped=1.0, **OFF)
    assert "3 of 3 rows (100.0%) have no token in the loss among their first 8, such as " in str(
        caught.value
    )
    assert str(caught.value).endswith(
        "no rows remain: increase data.max_length, or shorten the prompts"
    )


def chats_of(rows_of, *chats):
    return make_examples(rows_of(*({"messages": list(chat)} for chat in chats)), kind="messages")


def test_a_chat_of_several_rows_keeps_its_place_and_is_counted_once(rows_of, tmp_path, caplog):
    tokenizer = copy.deepcopy(tokenizer_of("bytes"))
    tokenizer.chat_template = TEMPLATES["thoughts"]
    chats = [
        CHATS["three turns"],
        CHATS["one turn"],
        [*CHATS["one turn"], {**USER}, {**PARIS, "tool_calls": None}],
    ]
    options = {"max_length": 512, "vocab_size": 600, "cache_dir": tmp_path}
    made = encode(chats_of(rows_of, *chats), tokenizer, **options)
    assert made.source.tolist() == [0, 0, 0, 1, 2, 2]
    counts = {
        name: made.counts[name]
        for name in ("rows", "sequences", "dropped", "truncated", "unlearned")
    }
    assert counts == {"rows": 3, "sequences": 6, "dropped": 0, "truncated": 0, "unlearned": 0}
    again = encode(chats_of(rows_of, *chats), tokenizer, **options)
    assert (again.cache, again.counts, again.tokens.tolist()) == (
        "hit",
        made.counts,
        made.tokens.tolist(),
    )
    short = encode(
        chats_of(rows_of, *chats), tokenizer, **options | {"max_length": int(made.lengths[0])}
    )
    assert short.counts["dropped"] == 0  # the first answer of each chat is there
    assert short.counts["truncated"] == 3  # chats, though five rows are cut
    assert not caplog.messages


def test_what_is_not_learned_of_answers_is_counted_and_told(rows_of, caplog):
    tokenizer = copy.deepcopy(tokenizer_of("bytes"))
    tokenizer.chat_template = FAMILIES["opened"]
    turns = [user("Add 2."), said("2"), user("Add 3."), thought(5)]
    made = encode(
        chats_of(rows_of, turns, turns), tokenizer, max_length=512, vocab_size=600, use_cache=False
    )
    assert (made.counts["unlearned"], made.counts["sequences"]) == (2, 2)
    assert caplog.messages == [
        (
            r"rows.jsonl: an answer is excluded from the loss: generation starts turn 2 with '<think>\n', but its"
            r" content does not, in 2 rows"
        )
    ]
    with pytest.raises(
        DataError,
        match=(
            r"rows.jsonl:2:1 \(row 2\): generation starts turn 2 .*; write the reasoning into the"
            r" content"
        ),
    ):
        encode(
            chats_of(rows_of, turns, turns[:2]),
            tokenizer,
            max_length=512,
            vocab_size=600,
            use_cache=False,
        )


def test_chats_with_tools_are_written_by_the_template_that_has_them(rows_of):
    tokenizer = copy.deepcopy(tokenizer_of("bytes"))
    tokenizer.chat_template = {
        "default": TEMPLATES["marks"],
        "tool_use": "{{ tools[0].function.name }} " + TEMPLATES["marks"],
    }
    chats = [{"messages": [USER, PARIS]}, {"messages": [USER, PARIS], "tools": [TOOL]}]
    made = encode(
        make_examples(rows_of(*chats), kind="messages"),
        tokenizer,
        max_length=512,
        vocab_size=600,
        use_cache=False,
    )
    plain, tools = (
        tokenizer.decode(made.tokens[a:b])
        for a, b in zip(made.offsets, made.offsets[1:], strict=False)
    )
    assert tools == "weather " + plain
