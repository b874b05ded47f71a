"""Encoded examples as ragged arrays, and their cache file."""

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
        problem: `single_label`, `multi_label` or `regression` for a classification, else None.
        tokens: int32 [tokens].
        offsets: int64 [sequences + 1].
        labels: per sequence: int32 [sequences], float32 [sequences] or float32 [sequences, labels];
            per token (see `per_token`): int32 [tokens], -100 if masked. In text, the label of a
            token is the token itself.
        type_ids: int32 [tokens]; None if the tokenizer has no token types.
        source: int32 [sequences], the row of each sequence; a long document has several sequences,
            and a chat may have several. For a packed sequence, the row of its first document.
        label_names: the name of each label id.
        counts: number of `rows`, of `truncated` and `dropped` rows, of `sequences`, of `tokens`, of
            tokens in the loss (`learned`), and of answers that cannot be in it (`unlearned`).
        max_length: the maximum length of a sequence.
        fingerprint: the hash of tokenizer, options and data, the cache key.
        segments: int32 [tokens], the number of each token's document in a packed sequence, from 1;
            None without packing.
        cache: whether the tokens came from the cache.
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
        """Whether labels are per token, not per sequence."""
        return self.kind != "classification"


def cache_folder(folder: str | Path | None) -> Path | None:
    """Return the directory of cached tokens, in `folder` or the default one of `jaxpeft.cache`;
    None if caching is off.
    """
    root = Path(folder).expanduser() if folder else cache.folder()
    return None if root is None else root / "encoded"


def load_arrays(path: Path) -> Arrays | None:
    """Load a cache file; log a warning and return None if it is damaged.

    Raises:
        FileNotFoundError: the file does not exist.
    """
    data = path.read_bytes()
    body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    # Check before parsing, because a damaged zip file can raise many different errors.
    if hashlib.sha256(body).digest() != checksum:
        _LOG.warning(
            "%s: the cached tokens are damaged (the checksum does not match); encoding again", path
        )
        return None
    with np.load(io.BytesIO(body), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def save_arrays(path: Path, arrays: Arrays) -> None:
    """Write an npz file followed by its SHA-256, atomically; failures are only logged."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replace_when_done(path, unique=True) as temporary:
            temporary.touch(mode=0o600)  # rows may be private
            with temporary.open("wb") as file:
                file.write(buffer.getbuffer())
                file.write(hashlib.sha256(buffer.getbuffer()).digest())
    except OSError as error:
        _LOG.warning(
            "%s: the tokens could not be cached (%s); continuing without a cache", path, error
        )


def to_arrays(encoded: Encoded) -> Arrays:
    """Return the arrays to cache, with the counts as int64 [7], sorted by name."""
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
