"""Losses of a language model equal those of `transformers` on torch."""

from __future__ import annotations

import numpy as np
import pytest

from jaxpeft.evaluate import row_outputs
from jaxpeft.evaluate.prepared_rows import prepare_rows
from jaxpeft.evaluate.row_outputs import Runner, loss_tokens
from jaxpeft.inference.adapted_model import load_adapted
from tests.evaluate.conftest import write_answers
from tests.train.runs import write_rows


@pytest.mark.parametrize("kind", ["text", "answers"])
@pytest.mark.parametrize("most_logits", [None, 100])
def test_losses_equal_those_of_transformers(kind, most_logits, tiny_models, tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    if most_logits:  # chunks of few positions
        monkeypatch.setattr(row_outputs, "MOST_LOGITS", most_logits)
    path = tmp_path / "rows.jsonl"
    options = {"max_length": 12}
    if kind == "text":
        write_rows(path, "text", 9)
    else:
        write_answers(path, 9)
        options["separator"] = " word9 "
    loaded = load_adapted(str(tiny_models["llama"]))
    rows = prepare_rows(str(path), loaded, options)
    found = Runner(loaded, 4, rows.encoder.pad_id).losses(loaded.params, rows.encoded)

    theirs = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32)
    encoded = rows.encoded
    assert len(found) == len(encoded) >= 9
    counts = loss_tokens(encoded)
    for i in range(len(encoded)):
        at = slice(*encoded.offsets[i : i + 2])
        ids, labels = (
            torch.tensor(x[at][None].astype(np.int64)) for x in (encoded.tokens, encoded.labels)
        )
        if not counts[i]:
            assert found[i] == 0
            continue
        with torch.no_grad():
            loss = theirs(input_ids=ids, labels=labels).loss.item()
        assert found[i] / counts[i] == pytest.approx(loss, abs=1e-5)
        assert counts[i] == (labels[:, 1:] != -100).sum()
