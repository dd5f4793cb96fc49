"""Every main, as a user types it: at :debug, with wrong words, and without touching anything."""

import json
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pytest

from configs.common import PUSHT
from policymix.data import writer
from tests import commands, oracle
from tests.runs import sim_support

ROOT = pathlib.Path(__file__).parents[2]
MAINS = sorted(p.name for p in (ROOT / "experiments").glob("*.py"))
STATE = f"--config={ROOT / 'configs/pi0_state.py'}:debug"
SAWYER = f"--config={ROOT / 'configs/pi0_metaworld.py'}:debug"


def run(main: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "experiments" / main), *arguments]
    env = commands.ONE_DEVICE | variables
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


def succeeds(main: str, *arguments: str) -> str:
    result = run(main, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fails(main: str, *arguments: str, **variables: str) -> str:
    """One line on stderr, a non-zero exit."""
    result = run(main, *arguments, **variables)
    assert result.returncode != 0, result.stdout
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.slow
def test_the_workflow_from_data_to_a_mix(tmp_path):
    for seed in (1, 2):
        arguments = (
            STATE,
            f"--workdir={tmp_path / str(seed)}",
            f"--config.train.seed={seed}",
        )
        out = succeeds("train.py", *arguments)
        assert "27 arrays are newly initialised" in out
        assert "step 4/4  " in out
    checkpoints = f"--checkpoints={tmp_path / '1' / '4'},{tmp_path / '2' / '4'}"
    succeeds("dump_validation.py", STATE, f"--output={tmp_path / 'val.npz'}", "--num_batches=3")
    out = succeeds(
        "mix.py",
        STATE,
        checkpoints,
        "--method=greedy",
        f"--validation={tmp_path / 'val.npz'}",
        f"--output={tmp_path / 'mix'}",
    )
    assert "selection loss" in out
    assert "WARNING" not in out  # training held out what validation uses
    out = succeeds(
        "train.py",
        STATE,
        f"--workdir={tmp_path / '3'}",
        f"--config.train.init_from={tmp_path / 'mix'}",
    )
    assert "27 arrays loaded, 0 newly initialised, 0 ignored" in out
    assert f"norm stats from {tmp_path / 'mix'}" in out


@pytest.mark.slow
def test_the_quickstarts_stages_by_hand(tmp_path):
    """Demonstrations, splits, a fine-tune of each, a mix, and roll-outs of all three."""
    pytest.importorskip("metaworld")

    def demonstrate(name, seed):
        out = succeeds(
            "collect_demos.py", SAWYER, "--env=metaworld/reach-v3", "--num_episodes=4",
            f"--seed={seed}", f"--output={tmp_path / name}",
        )  # fmt: skip
        assert "4 episodes, " in out

    demonstrate("demos", 0)
    demonstrate("others", 100)
    succeeds(
        "split_dataset.py", f"--source={tmp_path / 'demos'}", "--num_splits=2",
        "--sort_by=observation.state[36]", f"--output={tmp_path / 'splits'}",
    )  # fmt: skip
    demos = f"--config.data.path={tmp_path / 'demos'}"
    succeeds("norm_stats.py", SAWYER, demos, f"--output={tmp_path / 'norm_stats.json'}")
    stats = f"--config.data.norm_stats={tmp_path / 'norm_stats.json'}"
    for k in (0, 1):
        out = succeeds(
            "train.py", SAWYER, stats, f"--workdir={tmp_path / 'runs' / str(k)}",
            f"--config.data.path={tmp_path / 'splits' / f'split_{k}'}",
        )  # fmt: skip
        assert "2 episodes to train on, 0 held out" in out
    out = succeeds(
        "dump_validation.py", SAWYER, stats, f"--config.data.path={tmp_path / 'others'}",
        "--config.data.held_out=1", f"--output={tmp_path / 'val.npz'}",
    )  # fmt: skip
    assert "from the episodes [0, 1, 2, 3]" in out
    inputs = [str(tmp_path / "runs" / str(k) / "4") for k in (0, 1)]
    validation = f"--validation={tmp_path / 'val.npz'}"
    out = succeeds(
        "mix.py", SAWYER, f"--checkpoints={','.join(inputs)}", validation, "--method=inverse_loss",
        f"--output={tmp_path / 'mix'}",
    )  # fmt: skip
    assert "WARNING" not in out  # one normalisation, and nobody saw the validation episodes
    out = succeeds(
        "evaluate.py", SAWYER, f"--checkpoints={','.join(inputs)},{tmp_path / 'mix'}", validation,
        "--names=first,second,mix", "--config.evaluate.max_steps=24",
        f"--output={tmp_path / 'evaluation'}",
    )  # fmt: skip
    assert "mix: " in out
    told = json.loads((tmp_path / "mix" / "mix.json").read_text())
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["policies"]
    assert [policy["name"] for policy in found] == ["first", "second", "mix"]
    assert [policy["loss"] for policy in found[:2]] == [entry["loss"] for entry in told["inputs"]]
    assert found[2]["loss"] == pytest.approx(told["loss"], rel=1e-6)
    assert {policy["episodes"] for policy in found} == {2}


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        ("collect_demos.py", ("--env=metaworld/reach-v3", "--output=OUT")),
        pytest.param("quickstart.py", (SAWYER, "--output=OUT"), marks=pytest.mark.slow),
    ],
)
def test_a_simulator_that_is_missing_is_one_line_with_its_command(main, arguments, tmp_path):
    (tmp_path / "metaworld.py").write_text("raise ImportError(\"No module named 'mujoco'\")")
    arguments = [a.replace("OUT", str(tmp_path / "out" / "demos")) for a in arguments]
    line = fails(main, *arguments, PYTHONPATH=str(tmp_path))
    assert "metaworld is not installed, or not whole (No module named 'mujoco')" in line
    assert "make venv EXTRAS=sim" in line
    assert not list(tmp_path.glob("out/**/*.parquet"))


@pytest.mark.parametrize("model", ["pi0", pytest.param("pi05", marks=pytest.mark.slow)])
def test_mixes_checkpoints_of_openpi(model, tmp_path):
    paths = [str(oracle.write(model, which, tmp_path)) for which in ("var1", "var2")]
    out = succeeds(
        "mix.py",
        f"--config={ROOT / f'configs/{model}_libero.py'}:debug",
        f"--checkpoints={','.join(paths)}",
        "--method=inverse_loss",
        f"--validation={oracle.OPENPI / model / 'val_batches.npz'}",
        "--config.mix.norm_stats=pool",
        f"--output={tmp_path / 'mix'}",
    )
    assert "held out, the mix is" in out
    assert json.loads((tmp_path / "mix" / "mix.json").read_text())["method"] == "inverse_loss"


def test_mixing_takes_flags_as_the_readme_spells_them(tmp_path):
    paths = ",".join(
        str(oracle.write("pi0", w, tmp_path, norm_stats_of="base")) for w in ("var1", "var2")
    )
    succeeds(
        "mix.py", f"--checkpoints={paths}", "--coefficients=0.7,0.3", f"--output={tmp_path / 'a'}"
    )
    assert json.loads((tmp_path / "a" / "mix.json").read_text())["coefficients"] == [0.7, 0.3]
    tuned, base = paths.split(",")
    succeeds(
        "mix.py",
        f"--checkpoints={tuned}",
        f"--base={base}",
        "--merge_ratio=0.25,0.5",
        f"--output={tmp_path / 'b'}",
    )
    assert (tmp_path / "b" / "merge_ratio=0.25" / "mix.json").exists()


@pytest.mark.parametrize("main", MAINS)
def test_help_says_what_the_main_is_for(main):
    result = run(main, "--helpshort")
    docstring = (
        (ROOT / "experiments" / main).read_text().split('"""')[1].split(".\n")[0].replace("\n", " ")
    )
    assert docstring[:40] in result.stdout.replace("\n", " ")


@pytest.mark.parametrize("main", MAINS)
def test_a_wrong_flag_is_one_line_with_a_suggestion(main):
    assert "overwrite" in fails(main, "--overwrit")


@pytest.mark.parametrize("main", MAINS)
def test_a_wrong_config_key_is_one_line_with_a_suggestion(main):
    line = fails(main, STATE, "--config.mix.learning_rat=1")
    assert 'Did you mean "learning_rate"' in line


def test_a_wrong_key_of_the_default_config_is_one_line_too():
    line = fails("mix.py", "--checkpoints=a,b", "--config.mix.learning_rat=1", "--output=x")
    assert 'Did you mean "learning_rate"' in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config=nowhere.py",), "nowhere.py"),
        ((f"--config={ROOT / 'configs/pi0_state.py'}:debgu",), "expected nothing or ':debug'"),
        (("--config.mix.power=much",), "power"),
        (("--coefficients=a,b",), "--coefficients: 'a' is not a number"),
        (("--checkpoints", "a", "b"), "unexpected argument 'b'"),
        (("--checkpoints=/nowhere/a,/nowhere/b",), "/nowhere/a does not exist"),
    ],
)
def test_wrong_values_are_one_line(arguments, message, tmp_path):
    assert message in fails("mix.py", f"--output={tmp_path / 'out'}", *arguments)
    assert not (tmp_path / "out").exists()


def test_a_pickle_as_validation_file_is_refused(tmp_path):
    path = tmp_path / "val.pkl"
    path.write_bytes(b"\x80\x04N.")
    line = fails(
        "mix.py",
        STATE,
        "--checkpoints=a,b",
        f"--validation={path}",
        "--method=greedy",
        f"--output={tmp_path / 'o'}",
    )
    assert "a does not exist" in line
    checkpoints = ",".join(str(oracle.step("pi0", which)) for which in ("base", "var1"))
    arguments = (STATE, f"--checkpoints={checkpoints}", "--method=greedy")
    line = fails("mix.py", *arguments, f"--validation={path}", f"--output={tmp_path / 'o'}")
    assert "a pickle, which is never loaded" in line


def test_verbose_shows_the_traceback(tmp_path):
    result = run("mix.py", "--checkpoints=/nowhere/a", f"--output={tmp_path / 'out'}", "--verbose")
    assert result.returncode != 0
    assert "Traceback" in result.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A dataset of four episodes without videos."""
    path = tmp_path_factory.mktemp("source") / "dataset"
    action = {"dtype": "float32", "shape": [2], "names": None}
    with writer.Writer(path, fps=10, features={"action": action}) as opened:
        for _ in range(4):
            opened.add_episode({"action": np.zeros((3, 2), np.float32)}, "push")
    return path


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return sim_support.write_policy(tmp_path_factory.mktemp("policy") / "fresh")


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        ("train.py", (STATE, "--config.train.batch_size=8", "--workdir=OUT")),
        ("dump_validation.py", (STATE, "--output=OUT")),
        ("mix.py", (f"--checkpoints={oracle.step('pi0', 'base')}", "--output=OUT")),
        ("collect_demos.py", ("--env=metaworld/reach-v3,push-v3", "--output=OUT")),
        ("evaluate.py", (SAWYER, "--checkpoints=POLICY", "--output=OUT")),
        ("quickstart.py", (SAWYER, "--output=OUT")),
        ("doctor.py", ()),
        ("norm_stats.py", (STATE, "--output=OUT")),
        ("split_dataset.py", ("--source=SOURCE", "--output=OUT")),
        (
            "edit_dataset.py",
            ("--operation=convert", "--version=v2.1", "--source=SOURCE", "--output=OUT"),
        ),
        ("benchmark.py", ()),
        (
            "offline_rl.py",
            (f"--config.data.path={PUSHT}", "--config.offline_rl.pictures=False", "--workdir=OUT"),
        ),
        ("download.py", ("--name=pi05_libero,hf://datasets/lerobot/pusht", "--output=OUT")),
    ],
)
def test_dry_run_prints_and_touches_nothing(main, arguments, tmp_path, source, policy, capsys):
    if main in ("collect_demos.py", "evaluate.py"):
        pytest.importorskip("metaworld")
    words = {"OUT": str(tmp_path / "out"), "SOURCE": str(source), "POLICY": policy}
    for word, meant in words.items():
        arguments = [a.replace(word, meant).removesuffix(":debug") for a in arguments]
    commands.run(["python", f"experiments/{main}", *arguments, "--dry_run"])
    assert capsys.readouterr().out.strip()
    assert not list(tmp_path.iterdir())


def test_mains_are_thin():
    for main in MAINS:
        assert len((ROOT / "experiments" / main).read_text().splitlines()) <= 80, main


@pytest.mark.slow
@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        ("mix.py", (f"--checkpoints={oracle.step('pi0', 'base')}", "--output=OUT")),
        ("train.py", (STATE, "--workdir=OUT")),
        (
            "offline_rl.py",
            (
                f"--config.data.path={PUSHT}",
                "--config.offline_rl.pictures=False",
                "--workdir=OUT",
                "--config.offline_rl.num_steps=2",
            ),
        ),
    ],
)
def test_a_write_that_fails_is_one_line_and_leaves_no_checkpoint(main, arguments, tmp_path):
    """Files may not grow beyond 300 kB here, as if the disk were full."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    arguments = [a.replace("OUT", str(tmp_path / "out")) for a in arguments]
    command = [sys.executable, str(ROOT / "experiments" / main), *arguments]
    env = commands.ONE_DEVICE | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=env, preexec_fn=limit
    )
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if not line.startswith("mixing: ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: cannot write")
    assert not list(tmp_path.glob("out/[0-9]"))
    assert not list(tmp_path.glob("out/mix.json"))
