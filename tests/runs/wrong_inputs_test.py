"""Mixing inputs that are wrong: that are not numbers, differ, vanish, or are one and the same.

Every fault is one line, told before the work where it can be known, and leaves the output that was
there.
"""

import json
import os
import pathlib
import shutil
import threading

import ml_dtypes
import numpy as np
import pytest

from configs import common
from policymix import metrics
from policymix.checkpoints import items, layout, store, streaming, zarr
from policymix.reports import mixes
from policymix.runs import mix
from tests.runs.faults_support import FORMS, TWO, arrays, cut, names, pair, run, save, state


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    """It takes half a second, and has tests of its own."""
    monkeypatch.setattr(mixes, "draw", lambda *_: None)


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


@pytest.mark.parametrize("fault", [cut, shutil.rmtree])
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
            cut(pathlib.Path(two))
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
