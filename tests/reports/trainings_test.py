"""The page of a run: what it says of one that goes on, has ended, was killed, or went wrong."""

import datetime
import json
import os

import matplotlib.figure
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

    assert after("samples per second", 2) == ["64", "64"]
    assert after("time that waits for data, %", 2) == ["1.25", "1.25"]
    assert after("gradient norm", 2) == ["3", "3"]
    # What has a trend has no usual value.
    assert after("loss", 2) == ["0.025", "gradient norm"]
    assert after("parameter norm", 2) == ["100", "samples per second"]
    assert after("peak memory of a device, GB", 2) == ["21.3", "peak memory of the process, GB"]
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
    assert "The run was taken up again after step 3: the dotted lines." in text


def test_memory_is_told_once_where_devices_have_none_of_their_own(tmp_path):
    rows = [row | {"memory_bytes": row.get("host_memory_bytes")} for row in rows_of(range(1, 5))]
    text = cells(written(tmp_path, rows))
    assert text[text.index("peak memory of the process, GB") + 1] == "2"
    assert "peak memory of a device, GB" not in text


def test_times_are_those_of_the_files_and_of_the_steps(tmp_path):
    rows = [{"step": step, "steps_per_second": 0.5} for step in (10, 20, 35, 40)]
    rows[0]["steps_per_second"] = 0.1  # 100 s with the compiler
    rows[2]["resumed"] = 25  # and 25 to 35 take 20 s
    written(tmp_path, rows)
    for name, seconds in (("config.json", 86_400 * 365), ("metrics.jsonl", 86_400 * 365 + 7200)):
        os.utime(tmp_path / name, (seconds, seconds))
    text = trainings._circumstances(tmp_path, rows)
    begun = datetime.datetime.fromtimestamp(86_400 * 365).astimezone()
    assert f"Last begun {begun:%Y-%m-%d %H:%M %Z}, last written {begun.year}-" in text
    assert "The steps took 2 min 30 s, saving and evaluating aside." in text
    assert "Drawn by policymix 0." in text
    os.utime(tmp_path / "config.json")  # somebody touched it: when the run began is not known
    assert "begun" not in trainings._circumstances(tmp_path, rows)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"train": {"num_st', "it may be truncated"),
        (b"\xff\xfe", "is not readable JSON"),
        (b"[1, 2]", "holds no settings."),
        (b'{"train": {"num_steps": "many", "seed": [[1], {}]}, "data": 3}', "many"),
        (b'{"train": 5, "\\ud800": null, "model": {"pi05": "\\ud800"}}', "?"),
    ],
)
def test_settings_that_were_torn_or_edited_do_not_stop_the_page(tmp_path, content, told):
    (tmp_path / "config.json").write_bytes(content)
    page = written(tmp_path, rows_of([1, 2]), None)
    assert any(told in text for text in page.text)
    assert any("loss 0.5" in text for text in page.text)


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
        "learning rate, in $10^{-5}$",
        "samples per second",
        "time that waits for data, %",
    ]
    assert axes[0].get_yscale() == "log"  # 1 to 0.005
    few = trainings._figure(trainings._curves(rows_of([1, 2, 3]))).axes
    assert few[0].get_yscale() == "linear"  # 1 to 0.33
    # Of five the first is wide, and two stand in each line below it.
    assert [axis.get_subplotspec().colspan for axis in few] == [
        *(range(2), range(1), range(1, 2), range(1), range(1, 2)),
    ]
    assert [axis.get_subplotspec().rowspan.start for axis in few] == [0, 1, 1, 2, 2]
    assert trainings._figure({}) is None


def test_panels_of_speed_begin_after_compiling_and_show_where_the_run_was_resumed():
    rows = [
        {"step": step, "samples_per_second": 60.0, "data_wait": 0.01, "loss": 1.0}
        for step in range(1, 201)
    ]
    for start in (0, 100):
        rows[start] |= {"samples_per_second": 2.0, "data_wait": 0.9}
    rows.insert(100, {"step": 100, "held_out/loss": 1.0, "resumed": 100})  # the first after it
    curves = trainings._curves(rows)
    for name, value in (("samples_per_second", 60.0), ("data_wait", 0.01)):
        steps, values = curves[name]
        assert (len(steps), set(values)) == (198, {value})
        assert not {1, 101} & set(steps)
    assert len(curves["loss"][0]) == 200
    loss, speed, wait = trainings._figure(curves).axes
    assert speed.get_ylim()[1] == pytest.approx(1.08 * 60)
    assert wait.get_ylim()[1] == 5
    for axis in (loss, speed, wait):
        assert [100, 100] in [list(line.get_xdata()) for line in axis.lines]


def axis_of(draw, name, values):
    axis = matplotlib.figure.Figure(figsize=(6, 3)).subplots()
    curves = {name: (np.arange(len(values)) + 1.0, np.array(values))}
    return axis, draw(axis, curves, [name])


@pytest.mark.parametrize(
    "ends", [(225, 1200), (225, 12_000), (0.02, 0.5), (0.12, 50), (1e-6, 1e3), (1.01, 5.06)]
)
def test_scales_over_factors_have_four_ticks_or_more(ends):
    axis, _ = axis_of(trainings._draw_gradient, "grad_norm", ends)
    low, high = axis.get_ylim()
    ticks = [tick for tick in axis.get_yticks() if low <= tick <= high]
    assert 4 <= len(ticks) <= 10
    assert min(ticks) < 1000


@pytest.mark.parametrize(
    ("highest", "title"),
    [(2.5e-5, "learning rate, in $10^{-5}$"), (0.02, "learning rate"), (0.0, "learning rate")],
)
def test_a_learning_rate_has_one_multiplier(highest, title):
    axis, told = axis_of(trainings._draw_rate, "learning_rate", [0.0, highest])
    assert told == title
    power = 1e-5 if "-5" in title else 1
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [0, highest / power])


@pytest.mark.parametrize("best", [0.0, 0.09, 1.0])
def test_accuracies_are_scaled_to_the_best_and_have_no_tick_above_100(best):
    axis, _ = axis_of(trainings._draw_accuracies, "held_out/accuracy_0.5", [0.0, best])
    top = axis.get_ylim()[1]
    assert 100 * best < top <= max(120 * best, 1)
    assert all(tick <= 100 for tick in axis.get_yticks() if tick <= top)


def test_smoothing_is_the_mean_around():
    values = np.random.default_rng(0).normal(size=500)
    found = trainings._smooth(values)
    for place in (0, 2, 250, 499):
        expected = values[max(place - 5, 0) : place + 6].mean()
        assert found[place] == pytest.approx(expected)
