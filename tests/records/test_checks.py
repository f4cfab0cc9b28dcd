"""Checks of answers."""

import pytest

from awq_jax.records.checks import check_checks, failed


@pytest.mark.parametrize(
    ("checks", "answer", "fails"),
    [
        ({"contains": "paris"}, "It is Paris.", ()),
        ({"contains": ["Paris", "Seine"]}, "It is Paris.", ("contains",)),
        ({"regex": r"\b42\b"}, "It is 42.", ()),
        ({"regex": r"\b42\b", "contains": "x"}, "It is 421.", ("regex", "contains")),
        ({"json": True}, '{"a": 1}', ()),
        ({"json": True}, 'Here: {"a": 1}', ("json",)),
        ({"json": {"a": 1}}, '{"a": 1, "b": 2}', ()),
        ({"json": {"a": 1}}, '{"a": 2}', ("json",)),
        ({"json": {"a": 1}}, "[1]", ("json",)),
        ({"expected": "It is 42."}, " it  is 42.\n", ()),
        ({"expected": "42"}, "It is 42.", ("expected",)),
        ({"contains": "a", "json": True}, "", ("contains", "json")),
        ({}, "", ()),
    ],
)
def test_an_answer_passes_or_not(checks, answer, fails):
    check_checks(checks)
    assert failed(checks, answer) == fails


@pytest.mark.parametrize(
    ("checks", "says"),
    [
        ({"regex": "("}, r"regex '\(' is none"),
        ({"regex": 4}, "regex is 4: give a text"),
        ({"contains": []}, "contains is"),
        ({"contains": ["a", ""]}, "contains is"),
        ({"json": "yes"}, "json is 'yes': give true, or an object"),
        ({"expected": ""}, "expected is '': give a text that is not empty"),
    ],
)
def test_checks_that_cannot_be_made(checks, says):
    with pytest.raises(ValueError, match=says):
        check_checks(checks)
