"""The page of a run: what it says of one that goes on, has ended, was killed, or went wrong."""

import json

import numpy as np
import pytest

from policymix import intervals
from policymix.reports import trainings
from tests.reports.pages_test import read

SETTINGS = {
    "model": {"pi05": True, "image_keys": ["base_0_rgb", "left_wrist_0_rgb"]},
    "data": {"path": "/data/tea <b>", "mixture": "", "held_out": 0.1},
    "train": {"init_from": "gs://bucket/base", "num_steps": 400, "seed": 0, "freeze": []},
}


def rows_of(steps):
    rows = []
    for step in steps:
        rows.append(
            {
                "step": step,
                "loss": 1.0 / step,
                "grad_norm": 2.0 + step % 3,
                "param_norm": 100.0,
                "learning_rate": 1e-5,
                "steps_per_second": 2.0,
                "samples_per_second": 4.0 if step == 1 else 64.0,
                "data_wait": 0.0125,
                "memory_bytes": 21.3e9,
                "host_memory_bytes": 2e9,
                "eta_seconds": 3660.0,
            }
        )
        if step % 10 == 0:
            near = {f"held_out/accuracy_{t}": step / 400 for t in (0.5, 0.05, 0.1)}
            rows.append(
                {"step": step, "held_out/loss": 0.5 + (step - 20) ** 2 / 1000, "held_out/l1": 0.2}
                | near
            )
    return rows


@pytest.fixture(autouse=True)
def words_alone(request, monkeypatch):
    """Pictures take longer than all the rest; two tests look at them."""
    if "picture" not in request.node.name and "panels" not in request.node.name:
        monkeypatch.setattr(trainings, "_figure", lambda curves: None)


def written(tmp_path, rows, settings=SETTINGS, end=""):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + end)
    if settings:
        (tmp_path / "config.json").write_text(json.dumps(settings))
    trainings.write_page(tmp_path)
    return read((tmp_path / "report.html").read_text(encoding="utf-8"))


def cells(page):
    """Texts of the page, without the space between tags."""
    return [text for text in page.text if text.strip()]


def test_a_run_that_was_killed_shows_what_it_did(tmp_path):
    page = written(tmp_path, rows_of(range(1, 41)), end='{"step": 41, "los')
    text = cells(page)
    assert f"Training {tmp_path.name}" in text
    assert "π0.5 from gs://bucket/base, on /data/tea <b>." in text
    assert (
        "Step 40 of 400, loss 0.025, learning rate 1e-05. 1 h 1 min were left when this was "
        "written."
    ) in text
    assert "The lowest held-out loss is 0.5, at step 20; the last is 0.9, at step 40." in text


def test_a_page_holds_its_picture(tmp_path):
    page = written(tmp_path, rows_of(range(1, 100)), end="{")
    (image,) = (attributes for tag, attributes in page.tags if tag == "img")
    assert image["src"].startswith("data:image/png;base64,")


def test_numbers_are_the_last_and_the_usual_or_the_best(tmp_path):
    text = cells(written(tmp_path, rows_of(range(1, 41))))

    def after(name, count):
        place = text.index(name)
        return text[place + 1 : place + 1 + count]

    assert after("samples per second", 2) == ["64", "64"]  # and not 62, with the compiler's time
    assert after("time that waits for data, %", 2) == ["1.25", "1.25"]
    assert after("peak memory of a device, GB", 2) == ["21.3", "21.3"]
    assert after("held-out loss", 3) == ["0.9", "0.5", "20"]
    assert after("held-out actions with all errors below 0.05, %", 3) == ["10.0", "10.0", "40"]
    thresholds = [t.split()[-2] for t in text if t.startswith("held-out actions")]
    assert thresholds == ["0.05,", "0.1,", "0.5,"]


def test_settings_are_told_but_not_the_empty_ones(tmp_path):
    text = cells(written(tmp_path, rows_of([1])))
    assert text[text.index("model.image_keys") + 1] == "base_0_rgb, left_wrist_0_rgb"
    assert text[text.index("train.seed") + 1] == "0"
    assert "data.mixture" not in text
    assert "train.freeze" not in text
    assert text.index("train.seed") < text.index("data.path") < text.index("model.pi05")


def test_roll_outs_have_their_intervals(tmp_path):
    low, high = intervals.wilson(30, 50)
    rolled = {"rollout/success": 0.6, "rollout/low": low, "rollout/high": high}
    scored = {"rollout/score": 0.7, "rollout/score_low": 0.6, "rollout/score_high": 0.8}
    text = cells(written(tmp_path, [*rows_of([1]), {"step": 2} | rolled | scored]))
    told = "In the simulator 60 % of the episodes succeed [46, 72] at step 2"
    assert f"{told}, with a mean score of 70.0 %." in text
    assert text[text.index("success in the simulator, %") + 1] == "60.0 [46, 72]"
    assert text[text.index("mean score in the simulator, %") + 1] == "70.0 [60, 80]"


def test_a_run_that_has_ended_has_nothing_left(tmp_path):
    settings = SETTINGS | {"train": {"num_steps": 3, "init_from": ""}}
    text = cells(written(tmp_path, rows_of([1, 2, 3]), settings))
    assert "A fresh π0.5, on /data/tea <b>." in text
    assert "Step 3 of 3, loss 0.3333, learning rate 1e-05." in text


def test_what_is_not_finite_and_what_was_resumed_is_said(tmp_path):
    rows = rows_of(range(1, 5))
    rows[1]["loss"] = rows[2]["loss"] = rows[2]["grad_norm"] = None
    rows[3]["resumed"] = 3
    text = cells(written(tmp_path, rows))
    assert "Not a finite number: loss at step 2, the first of 3." in text
    assert "The run was taken up again after step 3." in text


@pytest.mark.parametrize("settings", [SETTINGS, None])
def test_a_run_that_has_not_said_anything_yet_has_a_page(tmp_path, settings):
    page = written(tmp_path, [], settings)
    assert "No step has been written down yet." in page.text
    assert not any(tag == "img" for tag, _ in page.tags)


def test_metrics_of_another_program_are_no_error(tmp_path):
    page = written(tmp_path, [{"step": 1, "critic/loss": 1.0}, {"step": 2, "loss": 0.0}], None)
    assert "Step 2, loss 0." in page.text


def test_a_page_goes_where_it_is_told(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    trainings.write_page(tmp_path, tmp_path / "other.html")
    assert (tmp_path / "other.html").exists()
    assert not (tmp_path / "report.html").exists()


def test_a_directory_without_metrics_is_an_error(tmp_path):
    with pytest.raises(OSError, match="metrics.jsonl"):
        trainings.write_page(tmp_path)


def test_panels_are_those_of_what_was_measured():
    curves = trainings._curves(rows_of(range(1, 200)))
    axes = trainings._figure(curves).axes
    titles = [axis.get_title(loc="left") for axis in axes if axis.axison]
    assert titles == [
        "flow-matching loss",
        "held-out actions with all errors below a threshold, %",
        "gradient norm, before clipping",
        "learning rate",
        "samples per second",
        "time that waits for data, %",
    ]
    assert axes[0].get_yscale() == "log"  # 1 to 0.005
    few = trainings._figure(trainings._curves(rows_of([1, 2, 3]))).axes
    assert [axis.axison for axis in few] == [True] * 5 + [False]
    assert few[0].get_yscale() == "linear"  # 1 to 0.33
    assert trainings._figure({}) is None


def test_smoothing_is_the_mean_around():
    values = np.random.default_rng(0).normal(size=500)
    found = trainings._smooth(values)
    for place in (0, 2, 250, 499):
        expected = values[max(place - 5, 0) : place + 6].mean()
        assert found[place] == pytest.approx(expected)
