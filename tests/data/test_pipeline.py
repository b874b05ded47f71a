"""Loading a model folder's tokenizer: files that cannot be used are refused by our error, whatever
the library raises.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from jaxpeft.data.pipeline import load_tokenizer
from jaxpeft.errors import DataError
from jaxpeft.hub.sources import resolve

BROKEN = {
    "cut short": ('{"version": "1.0", "model"', "EOF while parsing"),
    "empty": ("", "EOF while parsing"),
    "no object": ("[]", "invalid type: sequence"),
    "no vocabulary": ('{"version": "1.0", "model": {"type": "BPE"}}', "Missing vocab/merges"),
    "no UTF-8": (b"\xff\xfe{", "UTF-8"),
}


@pytest.mark.parametrize(("content", "why"), BROKEN.values(), ids=BROKEN)
def test_a_tokenizer_that_the_library_cannot_read_is_refused_by_its_file(
    tmp_path: Path, content: str | bytes, why: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(
        DataError, match=f"^{re.escape(str(file))}: the tokenizer cannot be loaded .*{why}"
    ) as caught:
        load_tokenizer(resolve(str(tmp_path)))
    assert "as it was published" in str(caught.value)
