from __future__ import annotations

import json

import pytest

from jaxpeft.errors import WeightsError
from jaxpeft.json_files import parse_json, read_json

REFUSED = {
    "whole number": ('{"a": ' + "9" * 5000 + "}", r"x\.json: contains an integer of 5,000 digits"),
    "negative": ('{"a": [-' + "1" * 301 + "]}", r"x\.json: contains an integer of 302 digits"),
    "deep list": ('{"a": ' + "[" * 150 + "]" * 150 + "}", r"x\.json: nested too deeply"),
    "deeper object": ('{"a": ' * 20000 + "1" + "}" * 20000, r"x\.json: nested too deeply"),
    "half a pair": ('{"a": "\\ud800"}', r"x\.json: contains an unpaired surrogate"),
    "half a pair in a key": ('{"b": [{"\\udfff": 1}]}', r"x\.json: contains an unpaired surrogate"),
    "not JSON": ('{"a": nothing}', r"x\.json:1:7: not JSON \(Expecting value\)"),
    "a number": ("7", r"x\.json: must contain a JSON object, contains a int"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_no_config_holds_is_refused(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(WeightsError, match=message) as caught:
        read_json(tmp_path / "x.json")
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_what_configs_do_hold_is_read(tmp_path):
    usual = {
        "model_max_length": 10**30,
        "limit": [0.0, float("inf")],
        "name": "日本 😀",
        "deep": [[[[{"a": None}]]]],
    }
    (tmp_path / "x.json").write_text(json.dumps(usual))
    assert read_json(tmp_path / "x.json") == usual
    (tmp_path / "x.json").write_text(
        "\ufeff" + json.dumps(usual, ensure_ascii=False), encoding="utf-8"
    )
    assert read_json(tmp_path / "x.json") == usual


def test_a_key_may_stand_once_where_that_is_asked_for():
    assert parse_json('{"a": 1, "a": 2}', "it") == {"a": 2}
    with pytest.raises(WeightsError, match=r"^it: has the key 'a' twice$"):
        parse_json(b'{"b": {"a": 1, "a": 2}}', "it", once=True)
