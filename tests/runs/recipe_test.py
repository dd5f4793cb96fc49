"""docs/three_checkpoints.md, command by command as it stands there, at :debug; and what each mix
leaves, against the schema of mix.json.
"""

import json
import re

import jsonschema
import numpy as np
import pytest

from policymix.checkpoints import store
from policymix.reports import pages
from tests import commands
from tests.runs import workspace_support
from tests.runs.mix_test import assert_close, numpy_mix

TEXT = (commands.ROOT / "docs/three_checkpoints.md").read_text()
SCHEMA = json.loads((commands.ROOT / "docs/mix.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
SLOW = "## Skills that come one at a time"
HEADINGS = [
    heading
    for heading in re.findall(r"^## .*$", TEXT, re.MULTILINE)
    if heading != SLOW and commands.fenced(commands.section(TEXT, heading))
]
DRAWN = ("## Average them", "## Coefficients of their own for parts of the model")  # it takes long
NEEDS = {"## Do it again": "## Learn the coefficients"}


def below(heading: str) -> list[list[str]]:
    """The commands below a heading."""
    found = commands.fenced(commands.section(TEXT, heading))
    return [words for block in found for words in commands.of(block)]


def value(words: list[str], flag: str) -> str:
    return next(w for w in words if w.startswith(f"--{flag}=")).partition("=")[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with what the document says is there."""
    root = tmp_path_factory.mktemp("home")
    for name, which in {
        "run_a/29999": "var1", "run_b/29999": "var2", "run_c/29999": "var3", "run_a/20000": "var3",
        "cups/20000": "var1", "drawers/20000": "var2", "base/1000": "base",
    }.items():  # fmt: skip
        workspace_support.orbax(root / name, which)
    (root / "run_a/train.log").write_text("step 1")
    for name, which in {"lerobot_a": "var1", "lerobot_b": "var2"}.items():
        workspace_support.torch(root / name, which, "lerobot")
    workspace_support.batches(root / "libero_val.npz")
    with workspace_support.bucket(root, {"pi05_base": root / "base/1000"}):
        yield root


@pytest.fixture(scope="module")
def done(home):
    """Runs what stands below a heading, once; returns {output: what its mix.json tells}."""
    told = {}

    def run(heading: str) -> dict:
        if heading in NEEDS:
            run(NEEDS[heading])
        if heading not in told:
            told[heading] = {}
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(home)
                if heading not in DRAWN:
                    patch.setattr(pages, "png", lambda figure: b"\x89PNG")
                for words in below(heading):
                    searched = "--validation=libero_val.npz" in words
                    commands.run(words, *["--config.mix.num_iterations=2"][:searched])
                    output = value(words, "output")
                    told[heading][output] = json.loads((home / output / "mix.json").read_text())
        return told[heading]

    return run


@pytest.mark.parametrize("heading", HEADINGS)
def test_the_commands_below(heading, done, home):
    for output, report in done(heading).items():
        validate(report)
        for path in (home / output).glob("merge_ratio=*/mix.json"):
            validate(json.loads(path.read_text()))
        assert (home / output / "mix.png").read_bytes().startswith(b"\x89PNG")


def validate(report: dict) -> None:
    """By the schema, and by the half of it that is meant, whose errors can be read."""
    half = "several" if "sweep" in report else "mix"
    one = {"$ref": f"#/$defs/{half}", "$defs": SCHEMA["$defs"]}
    jsonschema.Draft202012Validator(one).validate(report)
    VALIDATOR.validate(report)


def check(path, c, which):
    assert_close(store.load_params(path), numpy_mix(c, which, "pi05"))


def test_an_average(done, home):
    done("## Average them")
    check(home / "average", [1 / 3] * 3, ("var1", "var2", "var3"))
    assert (home / "average/0/params/_METADATA").is_file()


def test_learned_coefficients_and_the_loss_between(done, home):
    found = done("## Learn the coefficients")
    check(home / "learned", found["learned"]["coefficients"], ("var1", "var2", "var3"))
    assert found["learned"]["advice"]["best"] == str(home / "run_a/29999")
    assert len(found["between"]["landscape"]["loss"]) == 21
    assert (home / "between/landscape.png").is_file()


def test_groups(done, home):
    found = done("## Coefficients of their own for parts of the model")
    assert [len(c) for c in found["by_group"]["coefficients"].values()] == [2, 2, 2, 2]
    names = list(found["by_group"]["coefficients"])
    assert all(list(row["coefficients"]) == names for row in found["by_group"]["history"])
    assert found["vision_of_a"]["coefficients"] == {"vision": [1, 0], "rest": [0.5, 0.5]}


def test_ratios(done, home):
    done("## One fine-tune and its base (RETAIN)")
    for ratio in (0.25, 0.5, 0.75):
        check(home / f"retain/merge_ratio={ratio}", [ratio, 1 - ratio], ("base", "var1"))


def test_the_steps_of_a_run(done, home):
    found = done("## The steps of one run")["steps"]
    assert [entry["path"] for entry in found["inputs"]] == [
        str(home / f"run_a/{step}") for step in (20000, 29999)
    ]


def test_skills_one_after_another(done, home):
    found = done("## Several skills, one after another")["skills"]
    assert found["coefficients"] == [0.25, 0.25, 0.5]
    check(home / "skills", [0.25, 0.25, 0.5], ("base", "var1", "var2"))


def test_pytorch_and_lerobot(done, home):
    found = done("## PyTorch and LeRobot")
    formats = {name: report["format"] for name, report in found.items()}
    assert formats == {"lerobot_mix": "lerobot", "for_lerobot": "lerobot", "for_pytorch": "openpi"}
    for name in formats:
        check(home / name, [0.5, 0.5], ("var1", "var2"))


def test_again(done, home):
    found, first = done("## Do it again"), done("## Learn the coefficients")["learned"]
    for name in ("again", "again_there"):
        assert found[name]["coefficients"] == first["coefficients"]
        again, before = (store.load_params(home / n) for n in (name, "learned"))
        np.testing.assert_array_equal(again["action_in_proj"]["kernel"],
                                      before["action_in_proj"]["kernel"])  # fmt: skip


def test_a_schema_that_forgets_nothing(done):
    """What is not declared, and what is missing, is an error."""
    report = done("## Average them")["average"]
    assert not VALIDATOR.is_valid(report | {"extra": 1})
    assert not VALIDATOR.is_valid({k: v for k, v in report.items() if k != "geometry"})
    deeper = report | {"geometry": report["geometry"] | {"angle": 1}}
    assert not VALIDATOR.is_valid(deeper)


def test_the_tables_of_fields_are_those_of_the_schema():
    text = (commands.ROOT / "docs/mix_json.md").read_text()
    declared = {field for one in SCHEMA["$defs"].values() for field in one.get("properties", {})}
    assert {field for field in declared if f"`{field}`" not in text} == set()
    for row in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", text, re.MULTILINE):
        assert set(re.findall(r"\w+", row)) <= declared, row
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.slow
def test_training_the_next_skill_from_the_last_merge(home, monkeypatch):
    monkeypatch.chdir(home)
    for name in ("cups_data", "drawers_data"):
        workspace_support.dataset(home / name)
    for words in below(SLOW):
        if words[1].endswith("mix.py"):
            commands.run(words)
            continue
        commands.run_apart(words)
        workdir = home / value(words, "workdir")
        (workdir / "4").rename(workdir / "30000")  # the last step at :debug
    told = json.loads((home / "after_second/mix.json").read_text())
    assert [entry["path"] for entry in told["inputs"]] == [
        str(home / "after_first"), str(home / "second/30000"),
    ]  # fmt: skip
