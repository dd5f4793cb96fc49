"""What a run says of itself: lines that survive a kill, and progress that is not a flood."""

import errno
import json
import pathlib
import sys
import time
import types

import pytest

from policymix import files, metrics
from policymix.data import tfrecord


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


def test_the_first_line_after_a_resumption_says_from_where(tmp_path):
    _write(tmp_path, [1, 2])
    _write(tmp_path, [3, 4], resume_step=2)
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [row.get("resumed") for row in rows] == [None, None, 2, None]


def test_a_writer_that_is_not_active_writes_nothing(tmp_path, capsys):
    _write(tmp_path, [1], active=False, tensorboard=True, wandb="project")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_closing_twice_is_closing(tmp_path):
    with metrics.Writer(tmp_path, tensorboard=True) as writer:
        writer.write(1, {"loss": 1.0})
        writer.close()
    writer.close()
    writer.write(2, {"loss": 1.0})  # as of a writer that is not active
    assert [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [1]


class FullDisk:
    """A file that takes `room` bytes."""

    def __init__(self, room):
        self.room = room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(self.room, len(data))
        self.room -= taken
        return taken

    def close(self):
        pass


@pytest.mark.parametrize("room", [0, 5])
def test_a_full_disk_is_one_clear_error(tmp_path, room):
    writer = metrics.Writer(tmp_path)
    writer._file.close()
    writer._file = FullDisk(room)
    message = r"cannot write .*metrics.jsonl: No space left on device; make room"
    with pytest.raises(files.NoRoomError, match=message), writer:
        writer.write(1, {"loss": 1.0})


def _events(directory):
    """(step, tag, value) and purges (step, "START") of all event files, in TensorBoard's order."""
    from tensorboardX.proto import event_pb2

    found = []
    for path in sorted(directory.iterdir()):
        for record in tfrecord.read(path):
            event = event_pb2.Event.FromString(record.data)
            assert event.wall_time > 0
            if event.HasField("session_log"):
                assert event.session_log.status == event_pb2.SessionLog.START
                found.append((event.step, "START"))
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return found


def test_tensorboard_has_every_scalar_and_purges_what_is_done_again(tmp_path):
    for steps, resume in (([1, 2, 3], 0), ([3, 4], 2)):
        writer = metrics.Writer(tmp_path, tensorboard=True, resume_step=resume)
        for step in steps:
            writer.write(step, {"loss": step / 2, "held_out/loss": float("nan")})
        writer.close()
    found = _events(tmp_path / "tensorboard")
    assert [e[:3] for e in found if "loss" in e] == [
        *((step, "loss", step / 2) for step in (1, 2, 3, 3, 4)),
    ]
    # TensorBoard forgets what it has read of this step and those after it.
    assert found[6] == (3, "START")
    assert [e[0] for e in found].count(3) == 5
    assert sum(e[1] == "held_out/loss" for e in found) == 5


def test_event_files_begin_with_their_version_and_are_never_overwritten(tmp_path):
    from tensorboardX.proto import event_pb2

    for _ in range(3):  # within a second
        metrics.Writer(tmp_path, tensorboard=True).close()
    paths = sorted((tmp_path / "tensorboard").iterdir())
    assert len(paths) == 3
    for path in paths:
        first = event_pb2.Event.FromString(next(tfrecord.read(path)).data)
        assert first.file_version == "brain.Event:2"


def test_a_full_disk_under_tensorboard_ends_the_run_and_does_not_hang_it(tmp_path, monkeypatch):
    writer = metrics.Writer(tmp_path, tensorboard=True)
    (board,) = writer._trackers

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(board, "_records", types.SimpleNamespace(write=len, flush=full, close=full))
    board._flushed = -1e9
    message = "cannot write .*tensorboard: No space left on device"
    with pytest.raises(files.NoRoomError, match=message), writer:
        writer.write(1, {"loss": 1.0})


class FakeWandb(types.ModuleType):
    """The calls that are made of the package, which tests do without: its boundary alone."""

    def __init__(self, broken=()):
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace()  # find_spec asks for it
        self.calls, self.broken = [], broken

    def _called(self, name, *values):
        self.calls.append((name, *values))
        if name in self.broken:
            raise RuntimeError(f"{name}: no network")

    def init(self, **settings):
        self._called("init offline" if settings.get("mode") == "offline" else "init", settings)
        return types.SimpleNamespace(
            log=lambda values, step: self._called("log", step, values),
            finish=lambda exit_code: self._called("finish", exit_code),
        )


def _wandb(monkeypatch, **options):
    fake = FakeWandb(**options)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_goes_on_under_its_id(tmp_path, monkeypatch):
    fake = _wandb(monkeypatch)
    options = {"wandb": "robots", "run_name": "mine", "config": {"train": {"seed": 1}}}
    _write(tmp_path, [1, 2], **options)
    _write(tmp_path, [3], resume_step=2, **options)
    _write(tmp_path, [4], resume_step=3, **options | {"wandb": "others"})
    begun = [settings for name, *_, settings in fake.calls if name == "init"]
    assert [s["project"] for s in begun] == ["robots", "robots", "others"]
    assert begun[0] == begun[1]
    assert begun[0]["id"] != begun[2]["id"]
    del begun[0]["id"]
    assert begun[0] == {
        "project": "robots",
        "name": "mine",
        "config": {"train": {"seed": 1}},
        "resume": "allow",
        "dir": str(tmp_path),
    }
    logged = [call[1:] for call in fake.calls if call[0] == "log"]
    assert logged == [(step, {"train/loss": step / 2}) for step in (1, 2, 3, 4)]
    assert [call for call in fake.calls if call[0] == "finish"] == [("finish", 0)] * 3


def test_wandb_is_told_of_a_run_that_failed(tmp_path, monkeypatch):
    fake = _wandb(monkeypatch)
    with pytest.raises(FloatingPointError), metrics.Writer(tmp_path, wandb="robots"):
        raise FloatingPointError
    assert fake.calls[-1] == ("finish", 1)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("broken")])
def test_wandb_is_finished_where_tensorboard_cannot_be_closed(tmp_path, monkeypatch, error):
    fake = _wandb(monkeypatch)
    writer = metrics.Writer(tmp_path, tensorboard=True, wandb="robots")
    monkeypatch.setattr(writer._trackers[0], "close", lambda failed: (_ for _ in ()).throw(error))
    with pytest.raises(type(error), match=r"cannot write|broken"):
        writer.close()
    assert fake.calls[-1] == ("finish", 0)
    writer.close()


@pytest.mark.parametrize(
    ("broken", "made"),
    [
        (["init"], ["init", "init offline", "log", "log", "finish"]),
        (["init", "init offline"], ["init", "init offline"]),
        (["log"], ["init", "log"]),
        (["finish"], ["init", "log", "log", "finish"]),
    ],
)
def test_wandb_without_a_network_does_not_end_a_run(tmp_path, monkeypatch, capsys, broken, made):
    fake = _wandb(monkeypatch, broken=broken)
    _write(tmp_path, [1, 2], wandb="robots")
    assert [call[0] for call in fake.calls] == made
    told = [row for row in capsys.readouterr().out.splitlines() if "no network" in row]
    assert len(told) == len(broken)
    assert len(list(metrics.read(tmp_path / "metrics.jsonl"))) == 2


def test_a_package_that_is_missing_is_said_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(OSError, match=r"pip install 'policymix\[wandb\]'"):
        metrics.Writer(tmp_path, wandb="robots")
    assert list(tmp_path.iterdir()) == []


def test_importing_metrics_brings_neither_tracker(tmp_path):
    source = pathlib.Path(metrics.trackers.__file__).read_text(encoding="utf-8")
    outside = [row for row in source.splitlines() if row.startswith(("import", "from"))]
    assert not any("wandb" in row or "tensorboardX" in row for row in outside)


def test_a_step_line_is_short_and_readable():
    values = {
        "param_norm": 12.0,
        "held": 0.123456,
        "learning_rate": 2.5e-5,
        "loss": 0.03123,
        "grad_norm": 0.4123,
        "steps_per_second": 16.0,
        "samples_per_second": 512.3,
        "data_wait": 0.0123,
        "memory_bytes": 21.34e9,
        "host_memory_bytes": 1e9,
        "eta_seconds": 11_520.0,
    }
    assert metrics.line(1200, values, 30_000) == (
        "step 1200/30000  loss 0.03123  grad 0.412  lr 2.5e-05  512 samples/s  data 1 %  "
        "mem 21.3 GB  eta 3 h 12 min  held 0.1235"
    )
    assert metrics.line(1, {"loss": float("nan"), "steps_per_second": 3.0}) == (
        "step 1  loss nan  3 steps/s"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.6, "1 min"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (11_520, "3 h 12 min"),
        (1e6, "11 d 13 h"),
        (float("inf"), "unknown"),
    ],
)
def test_durations_have_two_units(seconds, text):
    assert metrics.span(seconds) == text


def test_a_meter_tells_the_speed_since_the_last_line():
    meter = metrics.Meter(10, 100.0, batch_size=4, num_steps=60)
    assert meter.tell(20, 130.0)["eta_seconds"] == pytest.approx(120)  # mostly the compiler's
    meter.waited(0.75)
    meter.waited(0.25)
    meter.paused(6.0)  # saving, say
    told = meter.tell(30, 140.0)
    assert told["steps_per_second"] == pytest.approx(2.5)
    assert told["samples_per_second"] == pytest.approx(10)
    assert told["data_wait"] == pytest.approx(0.25)
    assert told["eta_seconds"] == pytest.approx(30)  # 10 s for the 10 steps after the first line
    told = meter.tell(40, 142.0)
    assert (told["data_wait"], told["steps_per_second"]) == (0, pytest.approx(5))
    assert told["eta_seconds"] == pytest.approx(20 * 12 / 20)
    assert meter.tell(40, 142.0)["steps_per_second"] == 0  # and no division by nothing


def test_memory_is_the_devices_where_they_count_it():
    host = metrics.memory_used([None])
    assert host["memory_bytes"] == host["host_memory_bytes"] > 10e6
    stats = [{"peak_bytes_in_use": 7, "bytes_in_use": 3}, {"bytes_in_use": 9}, None]
    assert metrics.memory_used(stats)["memory_bytes"] == 9


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
