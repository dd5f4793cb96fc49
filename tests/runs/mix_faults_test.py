"""Mixing while things go wrong around it: disks that are full or read-only, inputs that are not
numbers, that vanish, that are one and the same, and kill -9. Every fault is one line, and leaves
the output that was there, or none.
"""

import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import threading
import time

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import common
from policymix import files, metrics, trees
from policymix.checkpoints import items, layout, safetensors, store, streaming, zarr
from policymix.reports import mixes
from policymix.runs import mix
from tests.runs.mix_support import ROOT

FORMS = ("safetensors", "shards", "orbax", "one-chunk")
TWO = ("safetensors", "orbax")


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    """It takes half a second, and has tests of its own."""
    monkeypatch.setattr(mixes, "draw", lambda *_: None)


def arrays(seed=0, size=60_000, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {"a/w": rng.standard_normal((size // 100, 100)), "a/b": rng.standard_normal(7)}
    found |= {"c": rng.standard_normal(size), "scalar": np.array(1.0 + seed)}
    return {name: array.astype(dtype) for name, array in found.items()}


def save(path: pathlib.Path, form: str, flat: dict[str, np.ndarray]) -> str:
    """Writes a checkpoint: ours, or a whole array in one chunk, as Orbax itself leaves them."""
    path.mkdir(parents=True)
    if form == "one-chunk":
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(path / "params", {"params": trees.unflatten(flat)})
    elif form == "orbax":
        store.write_step(trees.unflatten(flat), path)
    else:
        flat = {name.replace("/", "."): array for name, array in flat.items()}
        cut = len(flat) // 2 if form == "shards" else len(flat)
        parts = [part for part in (tuple(flat)[:cut], tuple(flat)[cut:]) if part]
        names = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
        names = names if form == "shards" else [layout.TENSORS]
        described = tuple(zip(names, parts, strict=True))
        safetensors.write(path, flat, safetensors.Layout(described, {}, index=form == "shards"))
    return str(path)


def pair(root: pathlib.Path, form: str, **options) -> tuple[str, str]:
    return tuple(save(root / f"in{k}", form, arrays(k, **options)) for k in (0, 1))


def run(checkpoints, out, **fields):
    return mix.mix(common.get_config(), mix.Request(tuple(checkpoints), out, **fields))


def names(path: pathlib.Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def state(path: pathlib.Path) -> dict:
    """Everything in a directory: content, and when it was last written."""
    return {
        p: (p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else None)
        for p in [path, *sorted(path.rglob("*"))]
    }


@pytest.fixture
def before_any_work(monkeypatch):
    """No array is read: what is wrong can be known from headers."""

    def read(*_, **__):
        raise AssertionError("arrays were read before the fault was told")

    monkeypatch.setattr(streaming, "mix", read)


# Numbers that are none


@pytest.mark.parametrize(
    ("form", "dtype", "bad"),
    [
        ("safetensors", np.float32, np.nan), ("safetensors", np.float64, np.inf),
        ("safetensors", np.float16, -np.inf), ("safetensors", ml_dtypes.bfloat16, np.nan),
        ("safetensors", ml_dtypes.bfloat16, np.inf), ("shards", np.float32, -np.inf),
        ("orbax", np.float32, np.inf), ("orbax", np.float16, np.nan),
        ("orbax", ml_dtypes.bfloat16, -np.inf), ("one-chunk", ml_dtypes.bfloat16, np.nan),
        ("one-chunk", np.float32, -np.inf), ("one-chunk", np.float16, np.inf),
    ],
)  # fmt: skip
def test_what_is_not_finite_is_named_by_checkpoint_and_key(form, dtype, bad, tmp_path, monkeypatch):
    monkeypatch.setattr(zarr, "_HELD", 0)
    one = save(tmp_path / "in0", form, arrays(0, 200_000, dtype))
    flat = arrays(1, 200_000, dtype)
    flat["c"][-1] = bad  # the last of an array of more than a block
    two, out = save(tmp_path / "in1", form, flat), tmp_path / "out"
    message = f"^{two}: 'c' holds 1 values that are NaN or infinite"
    with pytest.raises(ValueError, match=message):
        run((one, two), out, coefficients=(1.0, 0.0))  # nought times infinity is not nought
    assert names(tmp_path) == ["in0", "in1"]


def _with_statistics(root, mean, std=None):
    """Two checkpoints as LeRobot first published them: statistics among the tensors."""
    kept = {"mean": mean, "std": mean if std is None else std}
    names = [f"normalize_inputs.buffer_observation_state.{field}" for field in kept]
    found = []
    for k in (0, 1):
        flat = arrays(k, 200) | {
            n: np.asarray(v, np.float32) for n, v in zip(names, kept.values(), strict=True)
        }
        found.append(save(root / f"in{k}", "safetensors", flat))
    return found, names


def test_statistics_that_were_never_filled_are_none(tmp_path):
    """LeRobot has infinity in their place: nothing to mix, and nothing to refuse."""
    inputs, buffers = _with_statistics(tmp_path, [np.inf] * 3)
    assert run(inputs, tmp_path / "out")["norm_stats"] is None
    found = store.open_checkpoint(tmp_path / "out").buffers
    assert all(np.isposinf(found[name].read()).all() for name in buffers)
    assert not list((tmp_path / "out").rglob("norm_stats.json"))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([1, np.nan], [1, 1], "the statistics of observation.state hold NaN"),
        ([1, 2], [1], r"mean \(2,\) and std \(1,\) must both be"),
    ],
)
def test_statistics_that_are_none_are_named(mean, std, message, tmp_path, before_any_work):
    inputs, _ = _with_statistics(tmp_path, mean, std)
    with pytest.raises(ValueError, match=f"{inputs[0]}/model.safetensors: .*{message}"):
        run(inputs, tmp_path / "out")


def test_statistics_of_another_size_are_named(tmp_path):
    inputs, buffers = _with_statistics(tmp_path, [1.0, 2.0])
    entry = {"mean": [0.0] * 7, "std": [1.0] * 7}
    (tmp_path / "norm_stats.json").write_text(json.dumps({"norm_stats": {"state": entry}}))
    config = common.get_config()
    config.mix.norm_stats = str(tmp_path / "norm_stats.json")
    with pytest.raises(ValueError, match=f"'{buffers[0]}' has 2 numbers, the mix's .* have 7"):
        mix.mix(config, mix.Request(tuple(inputs), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[]", '{"steps": 5}', "{", "state_file"])
def test_a_processor_that_is_damaged_is_named(content, tmp_path, before_any_work):
    inputs = pair(tmp_path, "safetensors", size=200)
    described = pathlib.Path(inputs[1]) / "policy_preprocessor.json"
    if content == "state_file":
        step = {"state_file": 3, "registry_name": "normalizer_processor"}
        content = json.dumps({"steps": [step]})
    described.write_text(content)
    with pytest.raises(ValueError, match=str(described)):
        run(inputs, tmp_path / "out")


# Trees that differ


def _without(flat):
    del flat["a/b"]


def _with(flat):
    flat["more"] = np.ones(3, np.float32)


def _transposed(flat):
    flat["a/w"] = flat["a/w"].T


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, r"only in {one}: a.b \(7,\)"),
        (_with, r"only in {two}: more \(3,\)"),
        (_transposed, r"a.w: \(600, 100\) in {one}, \(100, 600\) in {two}"),
    ],
)
@pytest.mark.parametrize("form", ["safetensors", "shards", "one-chunk"])
def test_an_array_too_many_too_few_or_of_another_shape_is_named(
    form, change, message, tmp_path, before_any_work
):
    flat = arrays(1)
    change(flat)
    one, two = save(tmp_path / "in0", form, arrays()), save(tmp_path / "in1", form, flat)
    with pytest.raises(ValueError, match=message.format(one=one, two=two)):
        run((one, two), tmp_path / "out")
    with pytest.raises(ValueError, match="are not the same architecture"):
        run((two, one), tmp_path / "out")
    assert names(tmp_path) == ["in0", "in1"]


def _again(path):
    return str(path)


def _by_link(path):
    (path.parent / "link").symlink_to(path)
    return str(path.parent / "link")


def _by_detour(path):
    return f"{path.parent}/../{path.parent.name}/{path.name}/"


def _copy(path):
    shutil.copytree(path, path.parent / "copy")
    return str(path.parent / "copy")


def _inside(path):
    return str(path / "params" if (path / "params").exists() else path / layout.TENSORS)


@pytest.mark.parametrize("again", [_again, _by_link, _by_detour, _copy, _inside])
@pytest.mark.parametrize("form", TWO)
def test_one_checkpoint_twice_is_refused(form, again, tmp_path, before_any_work):
    one, two = pair(tmp_path, form)
    message = "copies of one checkpoint" if again is _copy else "given twice"
    twin = again(pathlib.Path(one))
    with pytest.raises(ValueError, match=message) as caught:
        run((one, two, twin), tmp_path / "out")
    assert twin in str(caught.value)
    with pytest.raises(ValueError, match=message):  # nor is a base its own fine-tune
        run((two, twin), tmp_path / "out", base=one)
    assert not (tmp_path / "out").exists()


# Outputs that would be inputs


def _itself(one):
    return one


def _above(one):
    return one.parent


def _below(one):
    return one / "deep" / "out"


def _linked_below(one):
    (one.parent / "link").symlink_to(one)
    return one.parent / "link" / "out"


def _linked_input(one):
    """The input is reached by a link; the output is what it points to."""
    one.rename(one.with_name("real"))
    one.symlink_to("real")
    return one.with_name("real")


def _of_links(one):
    """As in the caches of hubs: the input's files are links, and the output is where they lie."""
    shutil.move(one, one.with_name("blobs"))
    for file in [p for p in one.with_name("blobs").rglob("*") if p.is_file()]:
        link = one / file.relative_to(one.with_name("blobs"))
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    return one.with_name("blobs")


@pytest.mark.parametrize(
    "place", [_itself, _above, _below, _linked_below, _linked_input, _of_links]
)
@pytest.mark.parametrize("form", TWO)
def test_no_output_touches_an_input(form, place, tmp_path, before_any_work):
    one, two = pair(tmp_path / "inputs", form)
    out = place(pathlib.Path(one))
    if out.exists():
        (out / "mix.json").write_text('{"policymix": "1"}')  # as if --overwrite were allowed
    before = state(tmp_path)
    with pytest.raises(ValueError, match=r"output .* overlaps the input .*inputs are never writ"):
        run((one, two), out, overwrite=True)
    assert state(tmp_path) == before


# Inputs that change


def _cut(path: pathlib.Path) -> None:
    for file in [p for p in path.rglob("*") if p.is_file() and p.stat().st_size > 10_000]:
        os.truncate(file, 1000)


@pytest.mark.parametrize("fault", [_cut, shutil.rmtree])
@pytest.mark.parametrize("form", FORMS)
def test_an_input_that_is_lost_while_it_is_read_is_named(form, fault, tmp_path, monkeypatch):
    """Headers are read, then the fault, then the arrays."""
    one, two = pair(tmp_path, form)
    go_on = streaming.mix

    def late(*args, **options):
        fault(pathlib.Path(two))
        return go_on(*args, **options)

    monkeypatch.setattr(streaming, "mix", late)
    with pytest.raises((ValueError, OSError), match=two) as caught:
        run((one, two), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) in (["in0", "in1"], ["in0"])


@pytest.mark.parametrize("form", FORMS)
def test_an_input_that_is_cut_between_two_blocks_is_named(form, tmp_path, monkeypatch):
    monkeypatch.setattr(zarr, "_HELD", 0)
    monkeypatch.setattr(zarr, "_PIECE", 2**16)
    monkeypatch.setattr(items, "_CHUNK", 2**20)
    one, two = pair(tmp_path, form, size=800_000)
    step, once = metrics.Progress.step, threading.Lock()

    def late(self, count):
        if once.acquire(blocking=False):
            _cut(pathlib.Path(two))
        step(self, count)

    monkeypatch.setattr(metrics.Progress, "step", late)
    with pytest.raises(ValueError, match=f"{two}.*(damaged|ends early)"):
        run((one, two), tmp_path / "out")
    assert names(tmp_path) == ["in0", "in1"]


def test_a_disk_that_fails_names_the_file(tmp_path, monkeypatch):
    one, two = pair(tmp_path, "safetensors")

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match=f"{one}/model.safetensors: '.*' cannot be read: Input/outp"):
        run((one, two), tmp_path / "out")
    assert names(tmp_path) == ["in0", "in1"]


@pytest.mark.parametrize("wanted", ["same", "fails"])
@pytest.mark.parametrize("form", FORMS)
def test_inputs_stay_as_they_were(form, wanted, tmp_path):
    inputs = [pathlib.Path(path) for path in pair(tmp_path, form)]
    for path in inputs:
        (path / "config.json").write_text("{}")
    if wanted == "fails":
        save(tmp_path / "other", form, arrays() | {"c": np.full(60_000, np.nan, np.float32)})
        inputs.append(tmp_path / "other")
    before = [state(path) for path in inputs]
    try:
        run(map(str, inputs), tmp_path / "out")
        run(map(str, inputs), tmp_path / "out", overwrite=True)
    except ValueError:
        assert wanted == "fails"
    assert [state(path) for path in inputs] == before


# Disks


def _mount(*options: object) -> bool:
    """Needs root, and a system that lets it."""
    command = ["mount", *map(str, options)]
    return not subprocess.run(command, capture_output=True, check=False).returncode


@pytest.fixture
def disk(tmp_path):
    """A disk of three megabytes."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("only root may mount a small disk")
    if not _mount("-t", "tmpfs", "-o", "size=3m", "tmpfs", path):
        pytest.skip("nothing can be mounted here")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.parametrize("form", TWO)
def test_a_disk_without_room_is_told_before_the_work(form, disk, tmp_path, before_any_work):
    inputs = pair(tmp_path, form, size=500_000)  # two arrays, 4 MB
    with pytest.raises(OSError, match=f"{disk}/out needs up to 4.0 MB, and its disk has 3.1 MB"):
        run(inputs, disk / "out")
    assert not names(disk)


@pytest.mark.parametrize("size", [350_000, 700_000])  # one array fits beside the old output, none
@pytest.mark.parametrize("form", TWO)
def test_a_disk_that_fills_leaves_the_old_output(form, size, disk, tmp_path, monkeypatch):
    small = pair(tmp_path / "small", form, size=100_000)
    run(small, disk / "out")
    before = state(disk / "out")
    inputs = pair(tmp_path / "large", form, size=size)
    monkeypatch.setattr(files, "check_space", lambda *_: None)  # somebody else took the room
    message = f"cannot write {disk}/out: No space left on device; make room"
    with pytest.raises(OSError, match=message):
        run(inputs, disk / "out", overwrite=True)
    assert state(disk / "out") == before
    with pytest.raises(OSError, match=message.replace("/out:", "/new:")):
        run(inputs, disk / "new")
    assert names(disk) == ["out"]
    run(small[::-1], disk / "out", overwrite=True)
    assert names(disk) == ["out"]


@pytest.mark.parametrize("form", TWO)
def test_a_disk_that_fills_at_the_very_end_leaves_nothing(form, disk, tmp_path, monkeypatch):
    """What comes after the arrays is written to the same disk."""
    monkeypatch.setattr(mixes, "draw", lambda _, path: path.write_bytes(b"\1" * 2**22))
    with pytest.raises(OSError, match=f"cannot write {disk}/out: No space left on device"):
        run(pair(tmp_path, form), disk / "out")
    assert not names(disk)


def test_inputs_on_a_read_only_disk_are_mixed_and_outputs_refused(disk, tmp_path, monkeypatch):
    inputs = {form: pair(disk / form, form, size=20_000) for form in FORMS}
    if not _mount("-o", "remount,ro", disk):
        pytest.skip("nothing can be mounted again here")
    for form, paths in inputs.items():
        run(paths, tmp_path / form)
        c = store.open_checkpoint(tmp_path / form).leaves["c"].read()
        np.testing.assert_array_equal(c, (arrays(0, 20_000)["c"] + arrays(1, 20_000)["c"]) / 2)
    monkeypatch.setattr(streaming, "mix", None)
    message = f"cannot write {disk}/deep/out: {disk} is not a writable directory"
    with pytest.raises(PermissionError, match=message):
        run(paths, disk / "deep" / "out")


# What others leave where the output is to be


@pytest.mark.parametrize("left", ["abc", "1-2", "9" * 30, "999999999", "999999999-old"])
@pytest.mark.parametrize("make", [pathlib.Path.mkdir, pathlib.Path.touch])
def test_what_looks_like_a_leftover_stops_nothing(left, make, tmp_path):
    make(tmp_path / f".out.partial-{left}")
    if left.endswith("-old"):
        (tmp_path / "out").mkdir()  # else an old output is put back
    run(pair(tmp_path, "safetensors", size=100), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "mix.json").is_file()


def test_an_output_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    """The old one has gone out of the way when the new one cannot come."""
    inputs, rename = pair(tmp_path, "safetensors", size=100), pathlib.Path.rename
    run(inputs, tmp_path / "out")
    before = state(tmp_path / "out")

    def refuse(self, target):
        if pathlib.Path(target).name == "out" and not self.name.endswith("-old"):
            raise OSError(16, "Device or resource busy", str(target))
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    with pytest.raises(OSError, match="busy"):
        run(inputs[::-1], tmp_path / "out", overwrite=True)
    assert state(tmp_path / "out") == before
    assert names(tmp_path) == ["in0", "in1", "out"]


@pytest.mark.parametrize("inner", ["checkpoints/last", "pretrained_model", "7"])
def test_links_that_lead_back_are_told(inner, tmp_path, before_any_work):
    run_directory = tmp_path / "run"
    (run_directory / "params").mkdir(parents=True)
    (run_directory / inner).parent.mkdir(exist_ok=True)
    (run_directory / inner).symlink_to(run_directory)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match=f"{run_directory} is not a checkpoint: its links lead"):
        run((str(run_directory),), tmp_path / "out")
    with pytest.raises((ValueError, OSError), match=f"{tmp_path}/loop"):
        run((str(tmp_path / "loop"),), tmp_path / "out")


# From the command line


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "experiments/mix.py"), *arguments]


ENVIRONMENT = os.environ | {"XLA_FLAGS": ""}  # one device, as a laptop has


def error_of(*arguments: str, preexec_fn=None, **variables: str) -> str:
    """The one line on stderr that is not of the progress."""
    result = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=120,
        env=ENVIRONMENT | variables, preexec_fn=preexec_fn,
    )  # fmt: skip
    assert result.returncode == 1, result.stdout
    lines = [line for line in result.stderr.splitlines() if not line.startswith("mixing: ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.slow
def test_a_damaged_input_is_one_line(tmp_path):
    one, two = pair(tmp_path, "orbax")
    _cut(pathlib.Path(two))
    line = error_of(f"--checkpoints={one},{two}", f"--output={tmp_path / 'out'}")
    assert f"{two}/params: cannot read" in line
    assert names(tmp_path) == ["in0", "in1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpoints", "message"),
    [
        ("", "--checkpoints is empty: give the checkpoints to mix"),
        ("ONE,", "a checkpoint's path is empty; lists are written a,b,c"),
        ("ONE,ONE", "is given twice"),
        ("ONE,LOOP", "loop"),
        ("ONE,DEEP", "not readable JSON"),
    ],
)
def test_wrong_lists_are_one_line(checkpoints, message, tmp_path):
    one, two = pair(tmp_path, "orbax")
    (tmp_path / "loop").symlink_to("loop")
    (pathlib.Path(two) / "params/_METADATA").write_text("[" * 100_000)
    words = {"ONE": one, "DEEP": two, "LOOP": str(tmp_path / "loop")}
    for word, meant in words.items():
        checkpoints = checkpoints.replace(word, meant)
    line = error_of(f"--checkpoints={checkpoints}", f"--output={tmp_path / 'out'}")
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("form", TWO)
def test_files_that_may_not_grow_are_one_line(form, tmp_path):
    """The limit is met by threads, which are to end all the same."""
    inputs = ",".join(pair(tmp_path, form))

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    line = error_of(
        f"--checkpoints={inputs}", f"--output={tmp_path / 'out'}", preexec_fn=limit,
        JAX_ENABLE_COMPILATION_CACHE="false",
    )  # fmt: skip
    assert f"cannot write {tmp_path / 'out'}: File too large; make room" in line
    assert names(tmp_path) == ["in0", "in1"]


@pytest.mark.slow
@pytest.mark.parametrize("form", TWO)
def test_kill_9_leaves_the_old_output_or_the_new(form, tmp_path):
    """While 192 MB are read and 64 MB are written, at ten random moments."""
    inputs = {k: save(tmp_path / f"in{k}", form, arrays(k, 8_000_000)) for k in range(3)}
    root = tmp_path / "outputs"
    out = root / "out"
    root.mkdir()
    flags = [f"--checkpoints={','.join(inputs.values())}", f"--output={out}", "--overwrite"]
    old, new = (command(*flags, f"--coefficients={c}") for c in ("1,0,0", "0,1,0"))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": ENVIRONMENT}

    def partial():
        return [p for p in root.iterdir() if not p.name.endswith("-old") and p != out]

    def begun(process):
        """Waits until it writes."""
        left = {p.name for p in partial()}
        while process.poll() is None and not {p.name for p in partial()} - left:
            time.sleep(0.002)

    def whole() -> int:
        """Which input the output is, to the last bit."""
        which = json.loads((out / "mix.json").read_text())["coefficients"].index(1)
        found = store.open_checkpoint(out).leaves
        expected = store.open_checkpoint(inputs[which]).leaves
        assert found.keys() == expected.keys()
        for name, leaf in found.items():
            np.testing.assert_array_equal(leaf.read(), expected[name].read(), err_msg=name)
        return which

    subprocess.run(old, check=True, **quiet)
    process = subprocess.Popen(old, **quiet)
    begun(process)
    started = time.monotonic()
    process.wait()
    length, rng, killed = time.monotonic() - started, np.random.default_rng(0), 0
    now = whole()
    assert now == 0
    before = {k: state(pathlib.Path(path)) for k, path in inputs.items()}
    for _ in range(30):
        process = subprocess.Popen((new, old)[now], **quiet)  # what is not there yet
        begun(process)
        time.sleep(rng.uniform(0, 0.9) * length)
        process.kill()  # signal 9
        if process.wait() == 0:  # too late: the machine was busier when the length was taken
            length, last = length * 0.8, now
            now = whole()
            assert now != last
            continue
        if out.exists():
            now = whole()
        else:  # between the two renames: the next run puts the old one back
            assert [p for p in root.iterdir() if p.name.endswith("-old")]
        if (killed := killed + 1) == 10:
            break
    assert killed == 10
    subprocess.run(new, check=True, **quiet)
    assert names(root) == ["out"]
    assert whole() == 1
    assert {k: state(pathlib.Path(path)) for k, path in inputs.items()} == before
