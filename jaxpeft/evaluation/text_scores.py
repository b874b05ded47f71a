"""Scores of generated texts against reference answers, row by row, and over a set of rows.

The packages `rouge-score` and `sacrebleu` compute ROUGE, BLEU and chrF; the extra
`jaxpeft[evaluate]` installs them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxpeft.errors import ConfigError
from jaxpeft.evaluation.intervals import Statistic
from jaxpeft.evaluation.number_answers import same_number

TextMetric = Literal["exact_match", "number_match", "rouge1", "rouge2", "rougeL", "bleu", "chrf"]
ROUGE = ("rouge1", "rouge2", "rougeL")
CORPUS = ("bleu", "chrf")
"""Metrics whose counts are added over rows, so that they are not means of rows' scores."""


def same_text(text: str, reference: str) -> bool:
    """Return whether two texts are equal, apart from their white space."""
    return text.split() == reference.split()


def row_scores(
    metrics: Sequence[str], texts: Sequence[str], references: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return the score of each row by metric, float64 [n], in 0 to 1, or 0 to 100 for BLEU and
    chrF, as usual.

    Args:
        metrics: `TextMetric`s.
        texts: the generated texts.
        references: the reference answer of each.

    Raises:
        ConfigError: A package is missing.
    """
    found: dict[str, np.ndarray] = {}
    pairs = list(zip(texts, references, strict=True))
    matches: Mapping[str, Callable[[str, str], bool]] = {
        "exact_match": same_text,
        "number_match": same_number,
    }
    rouge = [metric for metric in metrics if metric in ROUGE]
    scorer: Any = _load("rouge_score.rouge_scorer").RougeScorer(rouge) if rouge else None
    scores = [scorer.score(reference, text) for text, reference in pairs] if rouge else []
    for metric in metrics:
        if metric in matches:
            values = [float(matches[metric](text, reference)) for text, reference in pairs]
        elif metric in ROUGE:
            values = [score[metric].fmeasure for score in scores]
        else:
            scale = _corpus_metric(metric, sentences=True)
            values = [scale.sentence_score(text, [reference]).score for text, reference in pairs]
        found[metric] = np.array(values, np.float64)
    return found


def text_statistic(
    metrics: Sequence[str], texts: Sequence[str], references: Sequence[str]
) -> Statistic:
    """Return the statistic of generated texts: means of rows' scores, and BLEU and chrF over all
    rows.

    Args:
        metrics: `TextMetric`s.
        texts: the generated texts.
        references: the reference answer of each.

    Raises:
        ConfigError: A package is missing.
    """
    means = row_scores([one for one in metrics if one not in CORPUS], texts, references)
    scales = {one: _corpus_metric(one) for one in metrics if one in CORPUS}
    counts = {
        one: np.array(scale._extract_corpus_statistics(list(texts), [list(references)]))
        for one, scale in scales.items()
    }

    def compute(chosen: np.ndarray) -> Mapping[str, float]:
        found: dict[str, float] = {}
        for metric in metrics:
            if metric in means:
                found[metric] = float(means[metric][chosen].mean())
            else:
                total = counts[metric][chosen].sum(0).tolist()
                found[metric] = float(scales[metric]._compute_score_from_stats(total).score)
        return found

    return compute


def _corpus_metric(name: str, *, sentences: bool = False) -> Any:
    sacrebleu = _load("sacrebleu")
    if name == "chrf":
        return sacrebleu.CHRF()
    # short sentences have no 4-grams; sacrebleu recommends the effective order for them
    return sacrebleu.BLEU(effective_order=sentences)


def _load(module: str) -> Any:
    """Import a package of the extra.

    Raises:
        ConfigError: It is missing.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0].replace("_", "-")
        raise ConfigError(
            f"--metrics: needs the package {package}; pip install 'jaxpeft[evaluate]'"
        ) from error
