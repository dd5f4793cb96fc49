"""The training commands of LeRobot's π0 script and of open-pi-zero, each flag beside ours, and ours
taken by our programs.
"""

import re
import shlex

import pytest

from configs.common import PUSHT
from tests import commands

TEXT = (commands.ROOT / "docs/training.md").read_text()
LEROBOT = commands.table(TEXT, "| LeRobot | here |")
OPEN_PI_ZERO = commands.table(TEXT, "| open-pi-zero | here |")
# What the script's parser takes, and what its body does.
SCRIPT = (
    "output_dir", "n_steps", "batch_size", "lr", "n_workers", "display_freq", "device",
    "train_pusht.py", "train_aloha.py", "LeRobotDataset", "task", "Adam", "from_pretrained",
    "save_pretrained", "huggingface-cli login", "pip install",
)  # fmt: skip
PROGRAM = (
    "git clone", "gsutil", "modify_rlds_dataset.py", "dataloader.py", "pg_bridge_mixture",
    "pg_fractal_mixture", "8-bit", "offloading", "QLoRA", "ema_decay", "eval_thresholds",
)  # fmt: skip


@pytest.mark.parametrize("word", SCRIPT)
def test_every_part_of_the_script_stands_on_the_left(word):
    assert any(word in left for left, _ in LEROBOT)


@pytest.mark.parametrize("word", PROGRAM)
def test_every_part_of_open_pi_zero_stands_on_the_left(word):
    assert any(word in left for left, _ in OPEN_PI_ZERO)


def trains(cells, tmp_path, name):
    """Runs one plan with all the settings of a table's right side; returns them."""
    right = " ".join(cell for _, cell in cells)
    flags = dict(re.findall(r"--config\.(\w+\.\w+)=(\"[^\"]*\"|[\w.:/-]+)", right))
    flags = {field: shlex.split(value)[0] for field, value in flags.items() if value != "K"}
    for field in ("data.repo_id", "train.init_from", "model.paligemma_variant", "data.mixture"):
        flags.pop(field, None)  # of what lies elsewhere, or of another size
    given = [f"--config.{field}={value}" for field, value in flags.items()]
    words = ["python", "experiments/train.py", f"--config=configs/{name}.py", *given]
    size = "--config.train.batch_size=64"
    commands.run(
        words, size, f"--config.data.path={PUSHT}", f"--workdir={tmp_path / 'run'}", "--dry_run"
    )
    return flags


def test_the_flags_beside_the_scripts_make_a_run(tmp_path, capsys):
    flags = trains(LEROBOT, tmp_path, "pi0_pusht")
    fields = {"train.num_steps", "train.learning_rate", "train.log_every", "train.optimizer"}
    assert fields | {"data.num_threads", "data.default_prompt"} <= set(flags)
    assert "10000 steps of 64 by adam" in capsys.readouterr().out


def test_the_flags_beside_open_pi_zeros_make_a_run(tmp_path, capsys):
    flags = trains(OPEN_PI_ZERO, tmp_path, "pi0_bridge")
    assert {"train.accumulate", "train.ema_decay", "train.frozen_dtype"} <= set(flags)
    assert "kept in nf4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [w for block in commands.fenced(TEXT) for w in commands.of(block) if "train.py" in w[1]],
    ids=" ".join,
)
def test_the_commands_of_the_text_make_a_run(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kept = [word for word in words if not word.startswith("--config.data.")]
    size = "--config.train.batch_size=64"
    commands.run(kept, f"--config.data.path={PUSHT}", size, "--dry_run")
    assert "memory, as predicted" in capsys.readouterr().out
