"""What the command line may ask of a mix, and how groups and ratios become coefficients."""

import pathlib

import numpy as np
import pytest

from configs import common
from policymix.checkpoints import keymaps
from policymix.runs import requests
from policymix.runs.requests import Request


def config(*groups):
    found = common.get_config()
    found.mix.groups = groups
    return found


def request(n=2, **fields):
    return Request(tuple(f"c{k}" for k in range(n)), pathlib.Path("out"), **fields)


def test_numbers_are_whole_or_by_group():
    assert requests.parse_numbers("x", "0.5, .3,-1e-2") == (0.5, 0.3, -0.01)
    assert requests.parse_numbers("x", "") == ()
    assert requests.parse_numbers("x", "a:1,2; b:0,-1;") == {"a": (1, 2), "b": (0, -1)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5,half", "--x: 'half' is not a number"),
        ("a:1,two", "--x: 'two' is not a number"),
        ("a:1;2", "groups are written NAME:1,2,3"),
        ("a:1;a:2", "each once"),
        ("a:;b:1", "groups are written"),
    ],
)
def test_what_are_no_numbers_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        requests.parse_numbers("x", text)


def test_groups_are_known_names_or_regexes():
    assert requests.groups(config()) == {}
    names = ("language", "vision", "projections", "action_expert")
    # Known ones are put in the order in which they tell parameters apart.
    assert list(requests.groups(config(*names))) == list(keymaps.GROUPS)
    own = requests.groups(config("early=.*/[0-8]/.*", "rest=.*"))
    assert own == {"early": ".*/[0-8]/.*", "rest": ".*"}
    with pytest.raises(ValueError, match="'visoin' is not known; write NAME=REGEX, or one of vis"):
        requests.groups(config("visoin"))
    with pytest.raises(ValueError, match="names 'a' twice"):
        requests.groups(config("a=b", "a=c"))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_one_fine_tune_is_interpolated_with_the_base(ratio):
    np.testing.assert_array_equal(requests.interpolated(ratio, 1, {}), [ratio, 1 - ratio])


def test_several_fine_tunes_are_merged_one_after_another():
    c, r = requests.interpolated(0.4, 3, {}), 0.4
    mix = np.eye(4)[0]
    for k in (1, 2, 3):  # each into what came of the last
        mix = r * mix + (1 - r) * np.eye(4)[k]
    np.testing.assert_allclose(c, mix)
    assert c.sum() == pytest.approx(1)


def test_ratios_by_group():
    c = requests.interpolated({"a": 0.0, "b": 1.0}, 1, {"a": "x.*", "b": ".*"})
    np.testing.assert_array_equal(c["x.*"], [0, 1])
    np.testing.assert_array_equal(c[".*"], [1, 0])


GROUPS = ("a=x", "b=.*")


@pytest.mark.parametrize(
    ("groups", "fields", "message"),
    [
        (GROUPS, {"method": "average"}, "average has one set of coefficients"),
        (GROUPS, {"method": "greedy", "validation": "v"}, "greedy has one set of coefficients"),
        ((), {"coefficients": {"a": (1, 1)}}, "say which parameters they are"),
        (GROUPS, {"coefficients": {"a": (1, 1)}}, "names the groups a, config.mix.groups has a, b"),
        (GROUPS, {"coefficients": {"a": (1, 1), "b": (1,)}}, "2 coefficients for 'b'"),
        (GROUPS, {"coefficients": {"a": (1, 1), "b": (1, -1)}}, "sum to zero"),
        (GROUPS, {"merge_ratios": {"a": (0.1, 0.2), "b": (1,)}}, "gives 'a' 2 ratios"),
        ((), {"method": "bfgs"}, "bfgs needs validation batches"),
    ],
)
def test_what_does_not_agree_is_told(groups, fields, message):
    with pytest.raises(ValueError, match=message):
        requests.method_of(config(*groups), request(**fields))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "average"),
        ({"coefficients": (1, 2)}, "manual"),
        ({"base": "b"}, "interpolate"),
        ({"merge_ratios": (0.5,)}, "interpolate"),
        ({"method": "gauss_newton", "validation": "v"}, "gauss_newton"),
    ],
)
def test_the_method_follows_from_the_flags(fields, expected):
    assert requests.method_of(config(), request(**fields)) == expected
