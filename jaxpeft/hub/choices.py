"""The names of tasks and dtypes. Does not import JAX, so that a command line can list them."""

from __future__ import annotations

from typing import Literal, get_args

Task = Literal["causal_lm", "sequence_classification", "token_classification", "encoder"]
TASKS: tuple[Task, ...] = get_args(Task)
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
"""Dtypes of the base's leaves and of activations."""
