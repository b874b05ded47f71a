"""The whole way from a file to batches, on real data with real tokenizers."""

from __future__ import annotations

import numpy as np
import pytest

from jaxpeft.data import Batches, Columns, encode, eval_batches, make_examples, read_rows


@pytest.mark.parametrize(
    ("folder", "train", "test", "rows", "labels"),
    [
        ("banking77", "train.csv", "test.csv", (9992, 3080), 77),
        ("clinc150", "train.jsonl", "test.jsonl", None, 151),
    ],
)
def test_classification(asset, minilm, tmp_path, folder, train, test, rows, labels):
    first = make_examples(read_rows(asset(f"{folder}/{train}")), kind="classification")
    second = make_examples(read_rows(asset(f"{folder}/{test}")), kind="classification", like=first)
    assert first.num_labels == labels
    assert rows in (None, (len(first), len(second)))
    encoded = encode(second, minilm, max_length=64, vocab_size=30522, cache_dir=tmp_path)
    for i in (0, len(second) - 1):
        own = encoded.tokens[encoded.offsets[i] : encoded.offsets[i + 1]]
        assert own.tolist() == minilm(second.texts[i], truncation=True, max_length=64)["input_ids"]
    batches = Batches(encoded, 32)
    assert batches.padding_share < 0.35
    assert len(batches.lengths) <= 4
    assert set(batches.batch(0)) == {
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "labels",
        "weights",
    }
    assert sum(batch["weights"].sum() for batch, _ in eval_batches(encoded, 32)) == len(second)


@pytest.mark.parametrize(
    ("path", "column"),
    [
        ("tinystories-2mb/dev.jsonl", None),
        ("e2e-nlg/dev.csv", "ref"),
        ("tinyshakespeare/input.txt", None),
    ],
)
@pytest.mark.representatives("tinystories-*", "e2e-*")
def test_text_survives_the_chunks(asset, tmp_path, path, column):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(asset("stories260K") / "hf"))
    examples = make_examples(read_rows(asset(path)), kind="text", columns=Columns(column))
    encoded = encode(
        examples,
        tokenizer,
        max_length=128,
        vocab_size=512,
        add_bos=True,
        add_eos=True,
        cache_dir=tmp_path,
    )
    for row in (0, len(examples) - 1):
        own = np.concatenate([encoded.tokens[a:b] for a, b in spans(encoded, row)]).tolist()
        assert own == [
            *tokenizer(examples.texts[row], verbose=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        assert own.count(tokenizer.bos_token_id) == 1
    assert encoded.type_ids is None
    assert encoded.lengths.max() <= 128
    assert Batches(encoded, 16).padding_share < 0.35


def spans(encoded, row):
    chunks = np.flatnonzero(encoded.source == row)
    return [(encoded.offsets[i], encoded.offsets[i + 1]) for i in chunks]
