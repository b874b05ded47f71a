"""Scores of texts equal those of `rouge-score` and `sacrebleu`."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from jaxpeft.errors import ConfigError
from jaxpeft.evaluation import text_scores
from jaxpeft.evaluation.text_scores import row_scores, text_statistic

TEXTS = ["the cat sat on the mat", "a dog barks", "the answer is 18", "same words here now"]
REFERENCES = [
    "a cat sat on the mat",
    "the dog barks loudly",
    "9 * 2 = 18\n#### 18",
    "same  words here\nnow",
]
ALL = ("exact_match", "number_match", "rouge1", "rouge2", "rougeL", "bleu", "chrf")


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [0, 3, 3]])
def test_corpus_scores_of_any_rows_equal_sacrebleus(chosen):
    found = text_statistic(("bleu", "chrf"), TEXTS, REFERENCES)(np.array(chosen))
    texts, references = [TEXTS[i] for i in chosen], [[REFERENCES[i] for i in chosen]]
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, references).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, references).score)
    assert found["bleu"] > 1


def test_rows_have_the_scores_of_the_packages():
    found = row_scores(ALL, TEXTS, REFERENCES)
    assert list(found) == list(ALL)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for i, (text, reference) in enumerate(zip(TEXTS, REFERENCES, strict=True)):
        theirs = scorer.score(reference, text)
        assert all(found[one][i] == theirs[one].fmeasure for one in theirs)
        assert found["bleu"][i] == sacrebleu.sentence_bleu(text, [reference]).score
        assert found["chrf"][i] == sacrebleu.sentence_chrf(text, [reference]).score
    # white space does not matter
    assert found["exact_match"].tolist() == [0, 0, 0, 1]
    assert found["number_match"].tolist() == [0, 0, 1, 0]


def test_means_are_those_of_the_rows():
    found = text_statistic(ALL, TEXTS, REFERENCES)(np.array([2, 3, 3]))
    assert list(found) == list(ALL)
    assert found["exact_match"] == pytest.approx(2 / 3)


def test_a_missing_package_names_the_extra(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(text_scores.importlib, "import_module", absent)
    message = r"--metrics: needs the package rouge-score; pip install 'jaxpeft\[evaluate\]'"
    with pytest.raises(ConfigError, match=message):
        row_scores(["rouge1"], TEXTS, REFERENCES)
