"""docs/hyperparameters.md has every field of config.offline_rl, once, with its default."""

import ast
import fractions
import re

import pytest

from configs import common
from policymix.rl import config as config_lib
from tests import commands

TEXT = (commands.ROOT / "docs/hyperparameters.md").read_text()
FIELDS = dict(common.get_config().offline_rl)
HEADER = "| field | default | sensible | what it does |"
BY_ALGORITHM = "by algorithm"


def rows(header: str) -> list[list[str]]:
    """The cells of all tables with this header; rows that go on with the one before are joined."""
    found, lines = [], TEXT.splitlines()
    for number, line in enumerate(lines):
        if line != header:
            continue
        for row in lines[number + 2 :]:
            if not row.startswith("|"):
                break
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            if cells[0]:
                found.append(cells)
            else:
                assert cells[:-1] == [""] * (len(cells) - 1), row
                found[-1][-1] += f" {cells[-1]}"
    return found


def value(cell: str):
    """What a cell in backticks says: a Python literal, or a fraction."""
    text = re.fullmatch(r"`(.*)`", cell)[1]
    if re.fullmatch(r"\d+/\d+", text):
        return float(fractions.Fraction(text))
    return ast.literal_eval(text)


TOLD = {cells[0].strip("`"): cells for cells in rows(HEADER)}
PER_ALGORITHM = f"| field | {' | '.join(config_lib.DEFAULTS)} |"


def test_every_field_is_told_once_and_no_other():
    assert len(rows(HEADER)) == len(TOLD)
    assert sorted(TOLD) == sorted(FIELDS)


def test_the_order_is_that_of_the_config():
    assert list(TOLD) == list(common._offline_rl())


@pytest.mark.parametrize("name", FIELDS)
def test_the_default_is_the_configs(name):
    (_, default, _, meaning) = TOLD[name]
    assert len(meaning) > 15
    if FIELDS[name] is None:
        assert default == BY_ALGORITHM
        return
    found = value(default)
    assert found == FIELDS[name]
    assert type(found) is type(FIELDS[name])


def test_what_is_left_to_the_algorithm_is_in_its_table():
    found = {cells[0].strip("`"): [value(c) for c in cells[1:]] for cells in rows(PER_ALGORITHM)}
    unsaid = {name for name, default in FIELDS.items() if default is None}
    assert set(found) == unsaid
    for name, values in found.items():
        for algorithm, told in zip(config_lib.DEFAULTS, values, strict=True):
            assert told == config_lib.DEFAULTS[algorithm][name], (algorithm, name)


def test_the_learners_own_defaults_are_the_configs():
    """LearnerConfig may be made without a config, in notebooks."""
    for name, default in FIELDS.items():
        if name in config_lib.LearnerConfig.__dataclass_fields__:
            field = config_lib.LearnerConfig.__dataclass_fields__[name]
            assert field.default == default or name == "max_token_len", name


def test_fields_and_algorithms_that_are_named_exist():
    named = set(re.findall(r"offline_rl\.(\w+)", TEXT))
    assert named <= set(FIELDS)
    for algorithm in config_lib.ALGORITHMS:
        assert f"**{algorithm}**" in commands.section(TEXT, "## Losses")
