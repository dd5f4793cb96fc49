"""What a run says of itself: lines that survive a kill, and progress that is not a flood."""

import json
import time

import pytest

from policymix import metrics


def _write(directory, steps, **options):
    writer = metrics.Writer(directory, **options)
    for step in steps:
        writer.write(step, {"train/loss": step / 2})
    writer.close()


def test_every_call_is_one_line_in_the_file_and_one_on_stdout(tmp_path, capsys):
    _write(tmp_path, [1, 2])
    rows = list(metrics.read(tmp_path / "metrics.jsonl"))
    assert rows == [{"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": 1.0}]
    assert capsys.readouterr().out.splitlines() == [
        "step 1  train/loss 0.5",
        "step 2  train/loss 1",
    ]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    writer = metrics.Writer(tmp_path)
    writer.write(1, {"loss": 1.0})
    assert len(list(metrics.read(tmp_path / "metrics.jsonl"))) == 1
    writer.close()


def test_resuming_drops_a_torn_last_line_and_later_steps(tmp_path):
    _write(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "train/lo')
    assert [row["step"] for row in metrics.read(path)] == [1, 2, 3]
    _write(tmp_path, [3, 4], resume_step=2)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in lines] == [1, 2, 3, 4]


def test_a_fresh_start_begins_an_empty_file(tmp_path):
    _write(tmp_path, [1, 2])
    _write(tmp_path, [1])
    assert [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_null(tmp_path, value):
    writer = metrics.Writer(tmp_path)
    writer.write(1, {"loss": value})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None}


@pytest.mark.parametrize("total", [1, 7, 10, 95, 1000])
def test_progress_is_about_ten_lines_where_there_is_no_terminal(capsys, total):
    items = [object() for _ in range(total)]
    assert list(metrics.progress(items, "mixing")) == items
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert min(total, 5) <= len(lines) <= 11
    assert lines[-1] == f"mixing: {total}/{total}"


def test_progress_of_an_iterator_needs_its_length(capsys):
    assert list(metrics.progress(iter("abc"), "letters", total=3, lines=1)) == list("abc")
    assert capsys.readouterr().err == "letters: 3/3\n"


def test_a_cost_is_of_its_block():
    with metrics.costing() as cost:
        time.sleep(0.05)
    assert 0.05 <= cost.seconds < 5
    assert abs(cost.begun + cost.seconds - time.time()) < 5
    assert cost.peak_memory_bytes > 10e6


def test_seconds_of_work_side_by_side_count_once():
    def cost(begun, seconds):
        return {"begun": begun, "seconds": seconds}

    assert metrics.wall_seconds([]) == 0
    assert metrics.wall_seconds([cost(100, 5), cost(0, 10)]) == 15
    assert metrics.wall_seconds([cost(0, 10), cost(2, 3), cost(8, 4)]) == 12
