"""The quickstart: complete whatever kills it on the way, and never done twice."""

import json
import signal
import subprocess
import sys
import time

import pytest

from configs import common, pi0_metaworld, pi0_pusht
from policymix.checkpoints import provenance
from policymix.runs import quickstart
from tests import commands
from tests.runs.sim_support import CONFIG, ROOT

pytest.importorskip("metaworld")

METHODS = ("average", "inverse_loss", "gradient_descent", "adaptive_gradient_descent", "greedy")


def command(output, *more):
    return [
        sys.executable,
        str(ROOT / "experiments/quickstart.py"),
        CONFIG,
        f"--output={output}",
        *more,
    ]


ENV = commands.ONE_DEVICE | {"PYTHONUNBUFFERED": "1"}


def run(output, *more) -> str:
    """What it prints, once it has completed."""
    result = subprocess.run(
        command(output, *more), env=ENV, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def report_of(output):
    return json.loads((output / "report.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without a stop; what it printed lies beside it."""
    output = tmp_path_factory.mktemp("quickstart") / "whole"
    (output.parent / "printed.txt").write_text(run(output))
    return output


@pytest.mark.parametrize("policy", [pi0_metaworld, pi0_pusht])
def test_every_stage_has_a_name_of_its_own(policy, tmp_path):
    small = "small" if policy is pi0_pusht else ""
    debug = policy.get_config(f"{small},debug")
    names = quickstart.Quickstart(debug, tmp_path).describe().split()
    whole = policy.get_config(small)
    full = quickstart.Quickstart(whole, tmp_path).describe().split()
    assert len(set(names)) == len(names) == 26
    assert len(set(full)) == len(full) >= 26
    assert {f"mix_{method}" for method in METHODS} < set(names)
    assert not list(tmp_path.iterdir())


def test_a_config_without_the_section_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no section quickstart: use .*pi0_metaworld.py"):
        quickstart.Quickstart(common.get_config(), tmp_path)


@pytest.mark.slow
def test_every_row_of_both_acts_is_reported(whole):
    report, q = report_of(whole), pi0_metaworld.get_config("debug").quickstart
    soup = report["soup"]
    assert [(row["kind"], row["name"]) for row in soup["rows"]] == [
        ("base", "base"),
        *(("input", f"split {k}") for k in range(q.num_splits)),
        *(("mix", method.replace("_", " ")) for method in (*METHODS, "manual")),
        ("control", f"all demonstrations, {q.soup_steps} steps"),
        ("control", f"all demonstrations, {q.soup_steps * q.num_splits} steps"),
    ]
    for row in soup["rows"]:
        assert row["episodes"] == len(row["outcomes"]) == q.soup_rollouts
        assert row["successes"] == sum(row["outcomes"])
        assert set(row["loss"]) == {"selection", "held_out"}
        if row["kind"] == "mix":
            assert sum(row["coefficients"]) == pytest.approx(1)
            assert len(row["coefficients"]) == q.num_splits
        else:
            assert row["coefficients"] is None
    retain = report["retain"]
    assert [(row["kind"], row["merge_ratio"]) for row in retain["rows"]] == [
        ("finetuned", 0.0),
        *(("merged", ratio) for ratio in q.merge_ratios if 0 < ratio < 1),
        ("base", 1.0),
        ("control", None),
        *(("control", None) for _ in q.small_learning_rates),
    ]
    names = [row["name"] for row in retain["rows"] if row["kind"] == "control"]
    assert names == [
        "co-fine-tuned",
        *(f"learning rate {rate:g}" for rate in q.small_learning_rates),
    ]
    expected = [q.narrow_rollouts, q.shifted_rollouts, 2 * q.pretraining_rollouts]
    assert retain["suites"] == ["in distribution", "out of distribution", "pretraining tasks"]
    for row in retain["rows"]:
        assert [row["results"][suite]["episodes"] for suite in retain["suites"]] == expected
    assert (whole / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "RETAIN" in (whole / "report.html").read_text()


@pytest.mark.slow
def test_merge_ratios_0_and_1_are_the_fine_tune_and_the_base(whole):
    rows = {row["merge_ratio"]: row for row in report_of(whole)["retain"]["rows"]}
    for ratio, name in ((0.0, "finetuned"), (1.0, "base")):
        checkpoint = str(whole / "runs" / name / "4")
        for suite, result in rows[ratio]["results"].items():
            folder = whole / "evaluations" / suite.replace(" ", "_")
            told = json.loads((folder / "evaluation.json").read_text())["policies"]
            (policy,) = (policy for policy in told if policy["name"] == name)
            assert policy["path"] == checkpoint
            assert policy["fingerprint"] == provenance.fingerprint(checkpoint)
            assert result["outcomes"] == policy["outcomes"]


@pytest.mark.slow
def test_stages_are_timed_and_told(whole):
    report = report_of(whole)
    names = quickstart.Quickstart(pi0_metaworld.get_config("debug"), whole).describe().split()
    assert [stage["name"] for stage in report["stages"]] == names
    assert not any(stage["reused"] for stage in report["stages"])
    took = [s["seconds"] for s in report["stages"]]
    assert max(took) < report["seconds"] <= sum(took)  # fine-tunes may run side by side
    assert all(stage["peak_memory_bytes"] > 50e6 for stage in report["stages"])
    printed = (whole.parent / "printed.txt").read_text()
    assert f"report: {whole / 'report.html'}" in printed
    assert "[26/26] evaluate_pretraining_tasks" in printed


def results_of(output):
    """What does not depend on where, when and how fast it was made."""
    report = report_of(output)
    assert str(output) not in json.dumps([report["soup"], report["retain"]])
    return report["soup"], report["retain"]


@pytest.mark.slow
def test_a_second_run_does_nothing_again(whole):
    before, started = results_of(whole), time.monotonic()
    printed = run(whole)
    assert time.monotonic() - started < 20
    assert printed.count(": reused") == 26
    assert results_of(whole) == before
    assert all(stage["reused"] for stage in report_of(whole)["stages"])


@pytest.mark.slow
def test_killed_four_times_it_ends_as_if_nothing_had_been(whole, tmp_path):
    output = tmp_path / "killed"
    for moment in (
        "runs/base/config.json",  # in the first training
        "runs/split_0/config.json",  # in those side by side
        "stages/mix_inverse_loss.json",  # in the search of coefficients
        "stages/evaluate_in_distribution.json",  # in roll-outs
    ):
        with subprocess.Popen(command(output), env=ENV, stdout=subprocess.DEVNULL) as process:
            while not (output / moment).exists():
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not (output / "report.json").exists()
        for record in (output / "stages").glob("*.json"):
            assert json.loads(record.read_text()).keys() == {"settings", "cost"}
    printed = run(output)
    assert "evaluate_in_distribution: reused" in printed
    assert "evaluate_out_of_distribution: reused" not in printed
    assert results_of(output) == results_of(whole)
    assert not list(output.rglob(".*partial*"))


@pytest.mark.slow
def test_other_settings_are_refused_by_the_stage_that_they_change(whole):
    before = (whole / "report.json").read_text()
    result = subprocess.run(
        command(whole, "--config.quickstart.soup_episodes=7"),
        env=ENV, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode != 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: demonstrations_soup in ")
    assert "num_episodes: 6 then, 7 now" in line
    assert "FRESH=1" in line
    assert (whole / "report.json").read_text() == before
