"""Evaluation: metrics of classification and of language models."""

from jaxpeft.evaluation.metrics import classification_metrics, lm_metrics

__all__ = ["classification_metrics", "lm_metrics"]
