"""Encoded examples: ragged arrays, and their cache file."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from jaxpeft import atomic, cache

Arrays = dict[str, np.ndarray]
CacheState = Literal["off", "hit", "miss", "rebuilt"]

_LOG = logging.getLogger(__name__)
_CHECKSUM_BYTES = 32


@dataclass(frozen=True)
class Encoded:
    """Token sequences in one flat array. Sequence `i` is `tokens[offsets[i]:offsets[i + 1]]`.

    Attributes:
        kind: the format of the rows.
        problem: `single_label`, `multi_label` or `regression` of a classification, else None.
        tokens: int32 [tokens].
        offsets: int64 [sequences + 1].
        labels: a sequence: int32 [sequences], float32 [sequences] or float32 [sequences, labels]; a
            token (where `per_token`): int32 [tokens], -100 where there is no loss. The label of a
            token of text is the token itself.
        type_ids: int32 [tokens], None where the tokenizer makes none.
        source: int32 [sequences], the row that each sequence comes from; a long document of text
            has several, and so may a chat. Of a packed sequence, the row of its first document.
        label_names: the name of each label id.
        counts: `rows`, `truncated` and `dropped` (rows), `sequences`, `tokens`, `learned` (tokens),
            `unlearned` (answers).
        max_length: the most tokens that a sequence may have.
        fingerprint: the hash of tokenizer, options and data, the key of the cache.
        segments: int32 [tokens], the document of a packed sequence that a token belongs to, from 1;
            None where nothing is packed.
        cache: whether the cache held it.
    """

    kind: str
    problem: str | None
    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    type_ids: np.ndarray | None
    source: np.ndarray
    label_names: tuple[str, ...]
    counts: Mapping[str, int]
    max_length: int
    fingerprint: str
    segments: np.ndarray | None = None
    cache: CacheState = field(default="off", compare=False)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """The length of each sequence, int64 [sequences]."""
        return np.diff(self.offsets)

    @property
    def per_token(self) -> bool:
        """Whether a label belongs to a token, not to a sequence."""
        return self.kind != "classification"


def cache_folder(folder: str | Path | None) -> Path | None:
    """Return the folder of the cache, None for none: in `folder`, else in that of
    `jaxpeft.cache`.
    """
    found = Path(folder).expanduser() if folder else cache.folder()
    return None if found is None else found / "encoded"


def load_arrays(path: Path) -> Arrays | None:
    """Read a cache file; return None, and logs why, where it is damaged.

    Raises:
        FileNotFoundError: there is no such file.
    """
    data = path.read_bytes()
    body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    # Checked before anything is parsed: a damaged zip fails in more ways than one can name.
    if hashlib.sha256(body).digest() != checksum:
        _LOG.warning(
            "%s: the cached tokens are damaged (the checksum does not match); encoding again", path
        )
        return None
    with np.load(io.BytesIO(body), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def save_arrays(path: Path, arrays: Arrays) -> None:
    """Write an npz file with its SHA-256 behind it, whole or not at all; a failure is only
    logged.
    """
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replace_when_done(path, unique=True) as temporary:
            temporary.touch(mode=0o600)  # rows may be nobody else's affair
            with temporary.open("wb") as file:
                file.write(buffer.getbuffer())
                file.write(hashlib.sha256(buffer.getbuffer()).digest())
    except OSError as error:
        _LOG.warning(
            "%s: the tokens could not be cached (%s); continuing without a cache", path, error
        )


def to_arrays(encoded: Encoded) -> Arrays:
    """Return what the cache stores: the arrays, and the counts, int64 [7], in the order of their
    names.
    """
    counts = np.array([encoded.counts[name] for name in sorted(encoded.counts)], np.int64)
    arrays = {
        "tokens": encoded.tokens,
        "offsets": encoded.offsets,
        "source": encoded.source,
        "counts": counts,
    }
    if encoded.type_ids is not None:
        arrays["type_ids"] = encoded.type_ids
    return arrays | {"labels": encoded.labels}
