"""Every command of kai0's and RETAIN's documents has one here: those of the README's tables, taken
from its text, run at :debug.

What is at gs:// in them comes from a server on this machine.
"""

import json
import re
import shutil

import numpy as np
import pytest

from configs import pi0_libero, pi05_bin_pack_coffee_capsules, pi05_droid_finetune
from policymix.checkpoints import store
from policymix.data import lerobot, validation, writer
from policymix.reports import pages
from tests import commands, oracle
from tests.runs import workspace_support
from tests.runs.mix_test import assert_close, numpy_mix

README = (commands.ROOT / "README.md").read_text()
KAI0 = commands.table(README, "| kai0 | here |")
RETAIN = commands.table(README, "| RETAIN | here |")
SHORT = ("--config.mix.num_iterations=2",)  # of the searches


def shared(which: str) -> str:
    """What "…" stands for in the right column of the first or second table."""
    said = README.replace("\n", " ")
    found = re.findall(r"`…` stands there for `[^`]*`, and here for `([^`]*)`", said)
    return found[("kai0", "RETAIN").index(which)]


def command(cell: str, which: str, name: str) -> list[str]:
    """`mix.py … --flag` → the words of the whole command."""
    text = f"python experiments/{cell.replace('…', shared(which)).replace('NAME', name)}"
    (words,) = commands.of(text)
    return words


def rows(table, left: str) -> list[str]:
    """The commands on the right of what begins so on the left."""
    cells = [re.findall(r"`([^`]*)`", right) for first, right in table if first.startswith(left)]
    return [one for cell in cells for one in cell]


def told(output) -> dict:
    return json.loads((output / "mix.json").read_text())


def test_every_seed_command_has_its_row():
    left = " ".join(first for first, _ in KAI0)
    for method in ("average", "inverse_loss", "gradient_descent", "adaptive_gradient_descent",
                   "greedy"):  # fmt: skip
        assert f"arithmetic.py … --optimize_method {method}" in left
    for words in ("arithmetic.py … --weights", "arithmetic_torch.py … --weights", "split_data.py",
                  "arithmetic_torch.py … --optimize_method gradient_descent", "dump_data.py",
                  "arithmetic_torch.py … --optimize_method inverse_loss"):  # fmt: skip
        assert words in left
    assert len(rows(RETAIN, "`merge_weights.py")) == 4


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing them is half of the time; `recipe_test.py` draws what people get to see."""
    monkeypatch.setattr(pages, "png", lambda figure: b"")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with checkpoints a, b and c, PyTorch's a, b and c below torch/, and val.npz."""
    root = tmp_path_factory.mktemp("kai0")
    (root / "torch").mkdir()
    for name, which in zip("abc", oracle.VARIANTS, strict=True):
        workspace_support.orbax(root / name, which)
        workspace_support.torch(root / "torch" / name, which, "openpi")
    workspace_support.batches(root / "val.npz")
    (root / "torch/val.npz").symlink_to(root / "val.npz")
    return root


@pytest.fixture
def run(home, tmp_path, monkeypatch):
    def run(cell: str, folder: str = "", name: str = "pi05_hang_cloth"):
        monkeypatch.chdir(home / folder)
        words = command(cell, "kai0", name)
        commands.run(words, *SHORT[: "validation" in " ".join(words)], f"--output={tmp_path / 'o'}")
        return tmp_path / "o"

    return run


def check(output, c=None):
    """The mix is that of the coefficients it tells of; returns what it tells."""
    report = told(output)
    np.testing.assert_allclose(sum(report["coefficients"]), 1)
    if c is not None:
        np.testing.assert_allclose(report["coefficients"], c)
    assert_close(store.load_params(output), numpy_mix(report["coefficients"], model="pi05"))
    return report


@pytest.mark.parametrize("cell", rows(KAI0, "`arithmetic.py"))
def test_mixing_orbax_checkpoints(cell, run):
    output = run(cell)
    given = {"average": [1 / 3] * 3, "--output=o": [1 / 3] * 3, "coefficients": [0.5, 0.3, 0.2]}
    expected = next((c for word, c in given.items() if word in cell), None)
    report = check(output, expected)
    assert report["method"] in (*cell.split("="), "manual", "average")
    assert (output / "0" / "params").is_dir()
    assert (output / "norm_stats.json").is_file()


@pytest.mark.parametrize("cell", rows(KAI0, "`arithmetic_torch.py"))
def test_mixing_pytorch_checkpoints(cell, run):
    output = run(cell, "torch")
    check(output, [0.5, 0.3, 0.2] if "coefficients" in cell else None)
    assert (output / "model.safetensors").is_file()
    assert (output / "norm_stats.json").is_file()


def test_iterations_and_the_learning_rate(run):
    (flags,) = rows(KAI0, "`--num_iterations")
    output = run(f"mix.py … --method=gradient_descent {flags.replace('=50', '=3')}")
    assert told(output)["settings"]["learning_rate"] == 0.05


def test_the_readmes_other_examples_are_planned(home, tmp_path, monkeypatch, capsys):
    """Coefficients, ratios and a search, without the work: the rows below do it."""
    monkeypatch.chdir(tmp_path)
    for name, which in {"a": "a", "b": "b", "c": "c", "finetuned": "a", "pretrained": "b"}.items():
        (tmp_path / name).symlink_to(home / which)
    (tmp_path / "val.npz").symlink_to(home / "val.npz")
    (block,) = commands.fenced(commands.section(README, "## Mix"))
    for words in commands.of(block):
        commands.run(words, "--dry_run")
    assert capsys.readouterr().out.count("dry run: nothing was computed") == 3


def test_splitting_a_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    action = {"dtype": "float32", "shape": [2], "names": None}
    with writer.Writer(tmp_path / "d", fps=10, features={"action": action}) as opened:
        for _ in range(4):
            opened.add_episode({"action": np.zeros((3, 2), np.float32)}, "hang the cloth")
    (cell,) = rows(KAI0, "`split_data.py")
    commands.run(command(cell, "kai0", ""))
    parts = [lerobot.open_dataset(tmp_path / "s" / f"split_{k}") for k in range(4)]
    assert [part.num_episodes for part in parts] == [1, 1, 1, 1]


def test_dumping_validation_batches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (cell,) = rows(KAI0, "`dump_data.py")
    commands.run(command(cell, "kai0", "pi05_hang_cloth"), "--num_batches=2")
    found = validation.load(tmp_path / "val.npz")
    assert len(found.selection) == 2
    assert found.selection[0].actions.shape == (4, 6, 8)


# RETAIN

EXAMPLES = {
    "pi05_bin_pack_coffee_capsules": (pi05_bin_pack_coffee_capsules, "pi05_base"),
    "pi05_droid_finetune": (pi05_droid_finetune, "pi05_droid"),
    "pi0_libero": (pi0_libero, "pi0_base"),
}


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A folder with fine-tunes where RETAIN's examples have them, and OpenPI's bucket."""
    root = tmp_path_factory.mktemp("retain")
    for model in oracle.MODELS:
        workspace_support.orbax(root / f"{model}_base", "base", model)
        workspace_support.orbax(root / f"{model}_tuned", "var1", model)
    found = {"pi0_base": root / "pi0_base"}
    found |= dict.fromkeys(("pi05_base", "pi05_droid"), root / "pi05_base")
    found["my_finetune"] = root / "pi05_tuned"
    for name, (_, base) in EXAMPLES.items():
        place = root / "checkpoints" / name / "my_experiment" / "20000"
        place.parent.mkdir(parents=True)
        place.symlink_to(root / f"{base.split('_')[0]}_tuned")
    with workspace_support.bucket(root, found):
        yield root


@pytest.fixture
def merge(fork, tmp_path, monkeypatch):
    def merge(cell: str, name: str = "pi05_bin_pack_coffee_capsules", *more: str):
        monkeypatch.chdir(fork)
        words = command(cell, "RETAIN", name)
        finetuned = f"--checkpoints=checkpoints/{name}/my_experiment/20000/params"
        words = [finetuned if word == "--checkpoints=f" else word for word in words]
        # :debug leaves out the base, which is 13 GB; the config's own URL is served here.
        base = f"--config.train.init_from={EXAMPLES[name][0].get_config().train.init_from}"
        commands.run(words, base, *more, f"--output={tmp_path / 'o'}")
        return tmp_path / "o"

    return merge


def check_ratio(output, ratio: float, model: str = "pi05"):
    assert_close(store.load_params(output), numpy_mix([ratio, 1 - ratio], ("base", "var1"), model))


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_find_their_base_in_the_bucket(name, merge, fork):
    (cell,) = rows(RETAIN, "`merge_weights.py … --merge_ratio")
    output = merge(cell, name)
    config, base = EXAMPLES[name]
    check_ratio(output, 0.5, base.split("_")[0])
    assert told(output)["inputs"][0]["path"] == config.get_config().train.init_from
    assert (fork / f"cache/gs/openpi-assets/checkpoints/{base}/params/_METADATA").is_file()


def test_several_ratios(merge):
    (cell,) = rows(RETAIN, "`merge_weights.py …` in a loop")
    output = merge(cell)
    for ratio in (0.3, 0.5, 0.7):
        check_ratio(output / f"merge_ratio={ratio}", ratio)
    assert [row["merge_ratio"] for row in told(output)["sweep"]] == [0.3, 0.5, 0.7]


def test_another_base(merge, fork):
    (cell,) = rows(RETAIN, "`merge_weights.py … --base_checkpoint_path")
    assert "--base=b" in cell
    output = merge(cell.replace("--base=b", f"--base={fork / 'pi05_base'}"))
    assert told(output)["inputs"][0]["path"] == str(fork / "pi05_base")
    check_ratio(output, 0.5)


def test_verbose(merge):
    (cell,) = rows(RETAIN, "`merge_weights.py … --verbose")
    check_ratio(merge(cell), 0.5)


def test_a_fine_tune_in_a_bucket(merge):
    (flag,) = rows(RETAIN, "`--finetuned_checkpoint_path gs://")
    assert flag.startswith("--checkpoints=gs://")
    there = "--checkpoints=gs://openpi-assets/checkpoints/my_finetune/params"
    check_ratio(merge(f"mix.py … {there} --merge_ratio=0.25"), 0.25)


def test_a_base_that_knows_other_robots_only_takes_the_fine_tunes_statistics(merge, fork, tmp_path):
    """As OpenPI's bases are for whoever has a robot of his own."""
    shutil.copytree(fork / "pi05_base", tmp_path / "base")
    known = tmp_path / "base/assets"
    shutil.copytree(known / "fake_robot", known / "trossen")
    (known / "fake_robot").rename(known / "droid")
    output = merge(f"mix.py … --base={tmp_path / 'base'}")
    assert (output / "0/assets/fake_robot/norm_stats.json").is_file()


def test_a_base_of_bare_parameters_takes_the_fine_tunes_statistics(merge, fork, tmp_path):
    shutil.copytree(fork / "pi05_base/params", tmp_path / "bare/params")
    output = merge(f"mix.py … --base={tmp_path / 'bare/params'}")
    assert (output / "0/assets/fake_robot/norm_stats.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_training_before_the_merge(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (cell,) = rows(RETAIN, "`train.py NAME")
    commands.run_apart(command(cell, "RETAIN", name))
    assert store.load_params(tmp_path / f"checkpoints/{name}/e/4")
