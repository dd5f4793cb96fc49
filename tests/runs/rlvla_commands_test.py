"""Every flag and program of rlvla's document has its place in ours, and what stands beside them is
taken by our programs.
"""

import re

import pytest

from configs.common import PUSHT
from tests import commands

TEXT = (commands.ROOT / "docs/chunk_offline_rl.md").read_text()
ROWS = commands.table(TEXT, "| rlvla | here |")
FLAGS = (
    "dataset-dir", "action-horizon", "action-dim", "gamma", "beta", "lambda-v", "lambda-pi", "lr",
    "batch-size", "num-epochs", "device", "use-pi0-actions", "pi0-config", "pi0-checkpoints-dir",
    "pi0-checkpoint", "save-interval", "log-interval", "resume", "init-policy-from-pi0",
    "checkpoints", "repo-id", "download-dir", "initial-reward",
)  # fmt: skip
PROGRAMS = (
    "check_dependencies", "download_pi0_checkpoints", "download_from_huggingface",
    "convert_libero_hdf5_to_lerobot", "add_rewards_to_lerobot", "view_lerobot_parquet",
    "config.json", "HYPERPARAMETERS.md",
)  # fmt: skip


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_stands_on_the_left(flag):
    assert any(re.search(rf"--{flag}\b(?!-)", left) for left, *_ in ROWS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_stands_on_the_left(program):
    assert any(program in left for left, *_ in ROWS)


def test_the_flags_beside_those_of_training_make_a_run(tmp_path, capsys):
    """All of them at once, on PushT; what names files is left out."""
    right = " ".join(cell for _, *cells in ROWS for cell in cells)
    told = dict(re.findall(r"--config\.offline_rl\.(\w+)=([\w.-]+)", right))
    for name in ("proposals", "settings", "init_from", "chunk_source"):
        told.pop(name, None)
    assert {"discount", "temperature", "lambda_v", "lambda_pi", "num_epochs"} <= set(told)
    flags = [f"--config.offline_rl.{name}={value}" for name, value in told.items()]
    commands.run(
        ["python", "experiments/offline_rl.py", f"--config.data.path={PUSHT}", *flags],
        "--config.offline_rl.pictures=False", f"--workdir={tmp_path / 'run'}", "--dry_run",
    )  # fmt: skip
    out = capsys.readouterr().out
    assert f"chunks of {told['action_horizon']} actions" in out
    assert not (tmp_path / "run").exists()
