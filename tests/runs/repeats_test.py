"""Mixes that are made again, the steps of one run, pictures of the loss, and advice."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from configs import common
from policymix import trees
from policymix.checkpoints import keymaps, layout, safetensors, store
from policymix.runs import advice, landscapes, mix
from tests import oracle
from tests.runs.mix_support import VALIDATION, debug_config


def same_arrays(a, b):
    ours, theirs = (trees.flatten(store.load_params(path)) for path in (a, b))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype, path
        assert leaf.tobytes() == theirs[path].tobytes(), path


def again(tmp_path, source="out", **fields):
    request = mix.Request((), tmp_path / "again", repeat=str(tmp_path / source), **fields)
    return mix.mix(common.get_config(), request)


@pytest.mark.parametrize("dtype", [pytest.param("", marks=pytest.mark.slow), "bfloat16"])
def test_a_learned_mix_is_made_again_bit_for_bit(dtype, request_for, tmp_path):
    config = debug_config(num_iterations=2, dtype=dtype)
    config.mix.groups = tuple(keymaps.GROUPS)
    first = mix.mix(config, request_for(method="gradient_descent", validation=VALIDATION))
    second = again(tmp_path)
    same_arrays(tmp_path / "out", tmp_path / "again")
    for key in ("method", "coefficients", "groups", "format", "dtypes", "num_params", "geometry"):
        assert second[key] == first[key], key
    stats = [(tmp_path / name / "norm_stats.json").read_bytes() for name in ("out", "again")]
    assert stats[0] == stats[1]


def test_an_interpolation_is_made_again(request_for, singles, tmp_path):
    mix.mix(common.get_config(), request_for("var1", base=singles["base"], merge_ratios=(0.3,)))
    again(tmp_path)
    same_arrays(tmp_path / "out", tmp_path / "again")


def test_a_base_that_measures_only_stays_so(request_for, singles, tmp_path):
    request = request_for("var1", "var2", method="average", base=singles["base"])
    first = mix.mix(common.get_config(), request)
    assert first["coefficients"] == [0, 0.5, 0.5]
    assert again(tmp_path)["geometry"] == first["geometry"]
    same_arrays(tmp_path / "out", tmp_path / "again")


def test_safetensors_files_are_identical(tmp_path):
    for which in ("var1", "var2"):
        safetensors.save_params(oracle.params("pi0", which), tmp_path / which)
    inputs = tuple(str(tmp_path / which) for which in ("var1", "var2"))
    mix.mix(common.get_config(), mix.Request(inputs, tmp_path / "out", coefficients=(1, 3)))
    again(tmp_path)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert files[0] == files[1]


def test_inputs_that_moved_may_be_named(request_for, singles, tmp_path):
    for which in ("var1", "var2"):
        shutil.copytree(singles[which], tmp_path / which)
    old = tuple(str(tmp_path / which) for which in ("var1", "var2"))
    mix.mix(common.get_config(), request_for(checkpoints=old, coefficients=(1, 2)))
    for which in ("var1", "var2"):
        (tmp_path / which).rename(tmp_path / f"moved_{which}")
    with pytest.raises(FileNotFoundError, match="var1 does not exist"):
        again(tmp_path)
    moved = tuple(str(tmp_path / f"moved_{which}") for which in ("var1", "var2"))
    request = mix.Request(moved, tmp_path / "again", repeat=str(tmp_path / "out/mix.json"))
    mix.mix(common.get_config(), request)
    same_arrays(tmp_path / "out", tmp_path / "again")
    request = mix.Request(moved[::-1], tmp_path / "third", repeat=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="is not the checkpoint that .* was made of"):
        mix.mix(common.get_config(), request)


def test_what_cannot_be_repeated_is_told(request_for, singles, tmp_path):
    with pytest.raises(FileNotFoundError, match="--from: .* does not exist"):
        again(tmp_path)
    ratios = (0.25, 0.75)
    mix.mix(common.get_config(), request_for("var1", base=singles["base"], merge_ratios=ratios))
    with pytest.raises(ValueError, match="tells of several mixes; say which, as .*=0.25"):
        again(tmp_path)
    again(tmp_path, "out/merge_ratio=0.75")
    same_arrays(tmp_path / "out/merge_ratio=0.75", tmp_path / "again")
    with pytest.raises(ValueError, match="leave out --method"):
        again(tmp_path, "out/merge_ratio=0.75", method="average", overwrite=True)
    (tmp_path / "mix.json").write_text('{"inputs": []}')
    with pytest.raises(ValueError, match="is not the mix.json of a mix"):
        again(tmp_path, "mix.json", overwrite=True)


# The steps of one run


def test_a_pattern_names_the_steps_of_a_run_in_order(request_for, tmp_path):
    run = tmp_path / "run"
    for step, which in ((900, "var1"), (1000, "var2"), (20_000, "var3")):
        store.save_params(oracle.params("pi0", which), run / str(step))
    (run / "wandb_id.txt").write_text("x")
    (run / "30000.orbax-checkpoint-tmp").mkdir()
    (run / "last").symlink_to(run / "20000")
    report = mix.mix(common.get_config(), request_for(checkpoints=(f"{run}/*",)))
    steps = [pathlib.Path(entry["path"]).name for entry in report["inputs"]]
    assert steps == ["900", "1000", "20000"]
    assert layout.expand((f"{run}/[19]*", "plain")) == (f"{run}/900", f"{run}/1000", "plain")
    with pytest.raises(ValueError, match="matches no checkpoint"):
        layout.expand((f"{run}/wandb*",))


# Landscapes


@pytest.mark.parametrize("n", [2, 3])
def test_the_loss_is_drawn_over_all_mixes(n, request_for, tmp_path, monkeypatch):
    monkeypatch.setattr(landscapes, "_POINTS", {2: 5, 3: 3})
    request = request_for(*oracle.VARIANTS[:n], validation=VALIDATION, landscape=True)
    report = mix.mix(debug_config(), request)
    told = report["landscape"]
    assert len(told["loss"]) == {2: 5, 3: 6}[n]
    for k, entry in enumerate(report["inputs"]):  # a corner is an input
        corner = told["coefficients"].index(np.eye(n)[k].tolist())
        assert told["loss"][corner] == pytest.approx(entry["loss"]["selection"], rel=1e-5)
    assert (tmp_path / "out/landscape.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_is_drawn_into_one_landscape(request_for, singles, tmp_path, monkeypatch):
    monkeypatch.setattr(landscapes, "_POINTS", {2: 3})
    request = request_for(
        "var1",
        base=singles["base"],
        merge_ratios=(0.25, 0.75),
        validation=VALIDATION,
        landscape=True,
    )
    report = mix.mix(debug_config(), request)
    assert len(report["landscape"]["loss"]) == 3
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in tmp_path.rglob("*.png"))
    assert found == [
        "landscape.png",
        "merge_ratio=0.25/mix.png",
        "merge_ratio=0.75/mix.png",
        "mix.png",
    ]


def test_a_landscape_of_four_is_refused_before_any_work(request_for, singles):
    request = request_for(
        checkpoints=tuple(singles.values()), validation=VALIDATION, landscape=True
    )
    with pytest.raises(ValueError, match="--landscape shows the mixes of 2 or 3 checkpoints; 4"):
        mix.mix(debug_config(), request)


# A search that reads from disk


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bfgs", "gauss_newton"])
def test_a_search_on_disk_finds_what_one_in_memory_finds(method, request_for, tmp_path):
    found = []
    for where in ("memory", "disk"):
        request = request_for(method=method, validation=VALIDATION, output=tmp_path / where)
        found.append(mix.mix(debug_config(search_in=where), request))
    np.testing.assert_allclose(*(one["coefficients"] for one in found), atol=1e-3)
    with pytest.raises(ValueError, match="search_in is 'ram'; expected auto, memory or disk"):
        mix.mix(debug_config(search_in="ram"), request_for(method=method, validation=VALIDATION))


# Advice


def report(selection, coefficients, warnings=(), held_out=0.5):
    entries = [
        {"path": f"c{k}", "loss": {"selection": s, "held_out": s}} for k, s in enumerate(selection)
    ]
    found = {"inputs": entries, "coefficients": coefficients, "warnings": list(warnings)}
    return found | {"loss": {"selection": 0.5, "held_out": held_out}}


def examples(single, mixed):
    rng = np.random.default_rng(0)
    noise = rng.uniform(0.9, 1.1, 200)
    return {"0": np.full(200, 9.0), "1": single * noise, "the mix": mixed * noise}


@pytest.mark.parametrize(
    ("mixed", "words"),
    [(0.8, "use the mix"), (1.0, "level with c1, the best"), (1.2, "keep c1")],
)
def test_advice_follows_the_interval(mixed, words):
    found = advice.of(report([2, 1], [0.5, 0.5]), examples(1.0, mixed))
    assert found["best"] == "c1"
    assert found["gain"] == pytest.approx(1 - mixed)
    low, high = found["interval"]
    assert low <= found["gain"] <= high
    assert words in found["recommendation"]


def test_advice_is_silent_about_what_was_not_measured():
    assert advice.of(report([2, 1], [0.5, 0.5]), None)["gain"] is None
    nothing = {"0": np.empty(0), "1": np.empty(0), "the mix": np.empty(0)}
    assert advice.of(report([2, 1], [0.5, 0.5]), nothing)["interval"] is None
    alone = advice.of(report([2, 1], [0.0, 1.0], ["leak"]), examples(1.0, 1.0))
    assert "the mix is c1 alone" in alone["recommendation"]
    assert "not honest" in alone["recommendation"]


def test_advice_on_few_examples_has_no_interval():
    few = {name: losses[:19] for name, losses in examples(1.0, 0.8).items()}
    found = advice.of(report([2, 1], [0.5, 0.5]), few)
    assert (found["interval"], found["examples"]) == (None, 19)
    assert "19 examples are too few to tell" in found["recommendation"]


def test_advice_names_an_input_that_is_better_held_out():
    found = advice.of(report([2, 1], [0.5, 0.5], held_out=1.5), examples(1.0, 0.8))
    assert "play the mix and c1" in found["recommendation"]


def test_one_checkpoint_in_one_group_and_another_in_another_is_a_mix():
    found = advice.of(report([2, 1], {"a": [1.0, 0.0], "b": [0.0, 1.0]}), examples(1.0, 0.8))
    assert "use the mix" in found["recommendation"]


# What a repeat takes over


def test_a_repeat_records_the_settings_of_the_mix(request_for, singles, tmp_path, capsys):
    config = debug_config(power=5.0, seed=3)
    mix.mix(config, request_for(method="inverse_loss", validation=VALIDATION))
    capsys.readouterr()
    again = mix.Request((), tmp_path / "again", repeat=str(tmp_path / "out"))
    config = common.get_config()
    config.mix.dtype = "bfloat16"
    settings = mix.mix(config, again)["settings"]
    assert (settings["power"], settings["seed"], settings["dtype"]) == (5.0, 3, "")
    assert "config.mix.dtype is that of" in capsys.readouterr().out


def test_a_repeat_draws_no_landscape_without_validation(request_for, tmp_path):
    mix.mix(common.get_config(), request_for())
    again = mix.Request((), tmp_path / "again", repeat=str(tmp_path / "out"), landscape=True)
    with pytest.raises(ValueError, match="--landscape needs validation batches"):
        mix.mix(common.get_config(), again)
    assert not (tmp_path / "again").exists()


def test_the_interval_covers_the_truth():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(60):
        single = rng.gamma(2.0, 1.0, 150)
        gain, (low, high) = advice.paired_gain(single, 0.9 * single * rng.uniform(0.7, 1.3, 150))
        assert low <= gain <= high
        covered += low <= 0.1 <= high
    assert covered >= 51
    assert json.dumps([gain, low, high])
