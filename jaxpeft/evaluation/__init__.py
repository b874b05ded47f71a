"""Evaluation: metrics and forgetting."""

from jaxpeft.evaluation.metrics import classification_metrics, lm_metrics

__all__ = ["classification_metrics", "lm_metrics"]
