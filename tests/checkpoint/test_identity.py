"""What counts as the same run."""

from __future__ import annotations

import jax.numpy as jnp

from jaxpeft.checkpoint.identity import differences, tree_spec

SAVED = {"config": {"train": {"seed": 0}, "log": {"every_steps": 10}, "data": {"lengths": [16, 32]}}, "steps": 6}


def changed(**fields: object) -> dict[str, object]:
    return {**SAVED, **fields}


def test_equal_runs_do_not_differ_whatever_the_kind_of_sequence() -> None:
    assert differences(SAVED, changed(config={**SAVED["config"], "data": {"lengths": (16, 32)}})) == []  # type: ignore[dict-item]


def test_every_changed_field_is_a_row_with_both_values() -> None:
    now = changed(config={"train": {"seed": 3}, "log": {"every_steps": 10}, "data": {"lengths": [16]}}, steps=7)
    assert differences(SAVED, now) == [
        "config.data.lengths: was [16, 32], is [16]",
        "config.train.seed: was 0, is 3",
        "steps: was 6, is 7",
    ]


def test_a_field_that_came_or_went_is_told() -> None:
    assert differences({"a": 1}, {"b": 2}) == ["a: was 1, is not there", "b: was not there, is 2"]


def test_what_only_logs_may_change() -> None:
    now = changed(config={**SAVED["config"], "log": {"every_steps": 1}})  # type: ignore[dict-item]
    assert differences(SAVED, now) == []


def test_a_tree_is_told_by_path_dtype_and_shape() -> None:
    assert tree_spec({"q": {"lora_a": jnp.zeros((3, 2), jnp.bfloat16)}}) == {"q/lora_a": "bfloat16[3, 2]"}
