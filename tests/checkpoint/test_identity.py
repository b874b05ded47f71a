"""What counts as the same run."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from jaxpeft.checkpoint.identity import differences, tree_spec
from jaxpeft.errors import ConfigError

SAVED = {
    "config": {"train": {"seed": 0}, "log": {"every_steps": 10}, "data": {"lengths": [16, 32]}},
    "steps": 6,
}


def changed(**fields: object) -> dict[str, object]:
    return {**SAVED, **fields}


def test_equal_runs_do_not_differ_whatever_the_kind_of_sequence() -> None:
    assert differences(
        SAVED, changed(config={**SAVED["config"], "data": {"lengths": (16, 32)}})
    ) == (
        [],
        [],
    )  # type: ignore[dict-item]


def test_every_changed_field_is_a_row_with_both_values() -> None:
    now = changed(
        config={"train": {"seed": 3}, "log": {"every_steps": 10}, "data": {"lengths": [16]}},
        steps=7,
    )
    rows = ["config.data.lengths: was [16, 32], is [16]", "config.train.seed: was 0, is 3"]
    assert differences(SAVED, now) == (rows, [])  # the steps differ since these do
    assert differences(SAVED, changed(steps=7)) == (["steps: was 6, is 7"], [])


def test_what_is_allowed_to_differ_is_told_apart_with_all_that_follows_from_it() -> None:
    now = changed(config={"train": {"seed": 3}, "log": {}, "data": {"lengths": [16]}}, steps=7)
    seed, lengths = "config.train.seed: was 0, is 3", "config.data.lengths: was [16, 32], is [16]"
    assert differences(SAVED, now, ["train.seed"]) == ([lengths], [seed])
    assert differences(SAVED, now, ["config.train", "data.lengths"]) == ([], [lengths, seed])


def test_shapes_of_leaves_are_never_allowed_to_differ() -> None:
    old = {"config": {"method": {"rank": 8}}, "tree": {"q/lora_a": "float32[4, 8]"}}
    now = {"config": {"method": {"rank": 4}}, "tree": {"q/lora_a": "float32[4, 4]"}}
    assert differences(old, now) == (["config.method.rank: was 8, is 4"], [])
    rank, leaf = (
        "config.method.rank: was 8, is 4",
        "tree.q/lora_a: was 'float32[4, 8]', is 'float32[4, 4]'",
    )
    assert differences(old, now, ["method.rank"]) == ([leaf], [rank])


def test_what_was_read_is_not_excused_by_an_option_that_may_change_and_its_tokens_are() -> None:
    old = {
        "config": {"data": {"max_length": 8}},
        "data": {"sources": {"train": "a"}, "tokens": {"train": "x"}},
    }
    now = {
        "config": {"data": {"max_length": 9}},
        "data": {"sources": {"train": "b"}, "tokens": {"train": "y"}},
    }
    length, rows = "config.data.max_length: was 8, is 9", "data.sources.train: was 'a', is 'b'"
    assert differences(old, now) == ([length, rows], [])
    assert differences(old, now, ["data.max_length"]) == ([rows], [length])
    now["data"]["sources"]["train"] = "a"
    assert differences(old, now, ["data.max_length"]) == ([], [length])
    tokens = "data.tokens.train: was 'x', is 'y'"
    assert differences({"data": old["data"]}, {"data": now["data"]}) == ([tokens], [])


def test_an_unknown_field_cannot_be_allowed() -> None:
    with pytest.raises(
        ConfigError,
        match=r"--allow-change=train.sede: no such field; did you mean 'config.train.seed'",
    ):
        differences(SAVED, SAVED, ["train.sede"])


def test_a_field_that_came_or_went_is_told() -> None:
    assert differences({"a": 1}, {"b": 2}) == (
        ["a: was 1, is missing", "b: was missing, is 2"],
        [],
    )


def test_a_field_is_not_taken_for_another_that_begins_as_it() -> None:
    old, new = (
        {"config": {"data": {"validation": f"{x}.jsonl", "validation_share": x}}}
        for x in (0.3, 0.4)
    )
    assert differences(old, new) == (["config.data.validation_share: was 0.3, is 0.4"], [])


def test_what_only_logs_may_change() -> None:
    now = changed(config={**SAVED["config"], "log": {"every_steps": 1}})  # type: ignore[dict-item]
    assert differences(SAVED, now) == ([], [])


def test_a_tree_is_told_by_path_dtype_and_shape() -> None:
    assert tree_spec({"q": {"lora_a": jnp.zeros((3, 2), jnp.bfloat16)}}) == {
        "q/lora_a": "bfloat16[3, 2]"
    }


def test_another_base_is_told_field_by_field_and_may_be_allowed() -> None:
    old = {"base": {"sha256": "a", "config": {"rope": {"theta": 1.0}}}}
    now = {"base": {"sha256": "a", "config": {"rope": {"theta": 2.0}}}}
    row = "base.config.rope.theta: was 1.0, is 2.0"
    assert differences(old, now) == ([row], [])
    assert differences(old, now, ["base"]) == ([], [row])


def test_the_base_of_an_earlier_version_is_one_row_that_says_what_to_do() -> None:
    now = {"base": {"sha256": "b", "config": {"rope": {"theta": 2.0}}}}
    row = (
        "base.sha256: was 'a', is 'b' (an earlier version of jaxpeft computed it differently;"
        " pass --allow-base if the base is unchanged)"
    )
    assert differences({"base": {"sha256": "a"}}, now) == ([row], [])
    assert differences({"base": {"sha256": "a"}}, now, ["base"]) == ([], [row])


def test_a_run_of_an_earlier_version_that_named_no_baselines_or_some_is_the_same() -> None:
    for names in ([], ["head"]):
        old = changed(
            config={
                **SAVED["config"],
                "baselines": names,
                "baseline_learning_rates": {"full": 1e-4},
            }
        )  # type: ignore[dict-item]
        assert differences(old, SAVED) == ([], [])
