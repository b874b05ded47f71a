"""Texts to token ids: templates, pairs, words, chunks, BOS and EOS."""

from __future__ import annotations

from itertools import chain

import pytest

from jaxpeft.data.examples.make import make_examples
from jaxpeft.data.tokens.tokenize import TokenizeOptions, tokenize

BOS, EOS, CLS, SEP = 4, 5, 2, 3


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def run(examples, tokenizer, max_length=8, add_bos=False, add_eos=False):
    return tokenize(
        examples, tokenizer, 0, len(examples), TokenizeOptions(max_length, add_bos, add_eos)
    )


def test_sentences_are_cut_and_the_cut_ones_counted(classified, bert):
    batch = run(classified(("a b", "x"), ("a b c d e f g", "y")), bert, max_length=5)
    assert batch.ids == [[CLS, *ids(bert, "a b"), SEP], [CLS, *ids(bert, "a b c"), SEP]]
    assert (batch.truncated, batch.types, batch.source) == (1, [[0] * 4, [0] * 5], [0, 1])


def test_pairs_have_token_types_and_the_longer_is_cut(rows_of, bert):
    rows = rows_of(
        {"text": "a b c d e", "text_pair": "f", "label": 0},
        {"text": "a", "text_pair": "b", "label": 1},
    )
    batch = run(make_examples(rows, kind="classification"), bert, max_length=7)
    assert batch.ids[0] == [CLS, *ids(bert, "a b c"), SEP, *ids(bert, "f"), SEP]
    assert batch.types == [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert batch.truncated == 1


def test_a_tag_is_on_the_first_subtoken_only(rows_of, minilm):
    words = ["unforgettably", "cat"]
    examples = make_examples(
        rows_of({"tokens": words, "tags": ["B", "A"]}), kind="token_classification"
    )
    batch = run(examples, minilm, max_length=16)
    pieces = len(ids(minilm, "unforgettably"))
    assert pieces > 1
    assert batch.labels == [[-100, 1, *[-100] * (pieces - 1), 0, -100]]
    assert batch.ids == [minilm("unforgettably cat")["input_ids"]]


def test_tags_of_words_that_are_cut_off_are_gone(rows_of, bert):
    examples = make_examples(
        rows_of({"tokens": list("abcd"), "tags": list("wxyz")}), kind="token_classification"
    )
    batch = run(examples, bert, max_length=4)
    assert (batch.labels, batch.truncated) == ([[-100, 0, 1, -100]], 1)


def test_documents_are_split_and_nothing_is_lost(documents, plain):
    texts = ["a b c d e f g", "a", "a b c"]
    batch = run(documents(*texts), plain, max_length=3)
    assert [len(i) for i in batch.ids] == [3, 3, 1, 1, 3]
    assert batch.source == [0, 0, 0, 1, 2]
    assert list(chain(*batch.ids)) == list(chain(*(ids(plain, text) for text in texts)))
    assert (batch.labels, batch.truncated) == (batch.ids, 0)


@pytest.mark.parametrize("add_bos", [False, True])
def test_bos_is_never_doubled(documents, llama, add_bos):
    (row,) = run(documents("a b"), llama, add_bos=add_bos).ids
    assert row == [BOS, *ids(llama, "a b")]
    (row,) = run(documents("<s> a b"), llama, add_bos=add_bos).ids
    assert row == [BOS, *ids(llama, "a b")]


def test_bos_and_eos_are_added_where_the_template_does_not(documents, plain):
    (row,) = run(documents("a b"), plain, add_bos=True, add_eos=True).ids
    assert row == [BOS, *ids(plain, "a b"), EOS]
    (row,) = run(documents("a b </s>"), plain, add_eos=True).ids
    assert row == [*ids(plain, "a b"), EOS]
    (row,) = run(documents("a b"), plain).ids
    assert row == ids(plain, "a b")


def test_ends_stand_only_at_the_ends_of_a_document(documents, llama):
    batch = run(documents("a b c d e"), llama, max_length=3, add_eos=True)
    assert batch.ids == [[BOS, *ids(llama, "a b")], ids(llama, "c d e"), [EOS]]
