"""Mixing from disk to disk: every method, and what it leaves behind."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from policymix import trees
from policymix.checkpoints import assets, store
from policymix.data import validation
from policymix.reports import mixes
from policymix.runs import mix, requests
from tests import oracle
from tests.runs.mix_support import VALIDATION, debug_config, different_stats


def numpy_mix(coefficients, which=oracle.VARIANTS, model="pi0"):
    flats = [trees.flatten(oracle.params(model, w)) for w in which]
    return {
        p: sum(c * f[p].astype(np.float64) for c, f in zip(coefficients, flats, strict=True))
        for p in flats[0]
    }


def assert_close(params, expected, atol=1e-6):
    flat = trees.flatten(params)
    assert flat.keys() == expected.keys()
    for path in flat:
        np.testing.assert_allclose(flat[path], expected[path], atol=atol, err_msg=path)


def test_average_needs_neither_model_nor_data(request_for, tmp_path):
    report = mix.mix(common.get_config(), request_for())
    assert report["method"] == "average"
    for path in (tmp_path / "out", tmp_path / "out" / "0", tmp_path / "out" / "0" / "params"):
        assert_close(store.load_params(path), numpy_mix([1 / 3] * 3))
    assert {leaf.dtype for leaf in jax.tree.leaves(store.load_params(tmp_path / "out"))} == {
        np.dtype("float32")
    }


def test_leaves_norm_stats_in_both_places_and_what_it_did(request_for, singles, tmp_path):
    out = tmp_path / "out"
    mix.mix(common.get_config(), request_for(coefficients=(5, 3, 2)))
    source = assets.read_norm_stats(
        pathlib.Path(singles["var1"]) / "assets/fake_robot/norm_stats.json"
    )
    for path in (out / "norm_stats.json", out / "0/assets/fake_robot/norm_stats.json"):
        np.testing.assert_array_equal(
            assets.read_norm_stats(path)["state"].mean, source["state"].mean
        )
    told = json.loads((out / "mix.json").read_text())
    assert told["method"] == "manual"
    np.testing.assert_allclose(told["coefficients"], [0.5, 0.3, 0.2])
    assert [entry["path"] for entry in told["inputs"]] == [singles[w] for w in oracle.VARIANTS]
    assert len({entry["fingerprint"] for entry in told["inputs"]}) == 3
    assert told["seconds"] > 0
    assert told["peak_memory_bytes"] > 1e6
    flats = [
        np.concatenate([x.ravel() for x in jax.tree.leaves(oracle.params("pi0", w))])
        for w in oracle.VARIANTS
    ]
    expected = [[np.linalg.norm(a - b) for b in flats] for a in flats]
    # Of large arrays only a part is measured.
    np.testing.assert_allclose(told["geometry"]["distance"], expected, rtol=1e-3, atol=1e-4)
    assert (out / "mix.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "method", [m for m in requests.BY_LOSS if m != "adaptive_gradient_descent"]
)
def test_methods_by_loss_write_the_mix_they_report(method, request_for, tmp_path):
    report = mix.mix(
        debug_config(num_iterations=6), request_for(method=method, validation=VALIDATION)
    )
    c = np.array(report["coefficients"])
    assert c.sum() == pytest.approx(1)
    assert_close(store.load_params(tmp_path / "out"), numpy_mix(c))
    inputs = [entry["loss"] for entry in report["inputs"]]
    assert report["validation"]["batches"] == {"selection": 3, "held_out": 1}
    assert all(
        0 < loss[w] < 10 for loss in [*inputs, report["loss"]] for w in ("selection", "held_out")
    )
    if method == "inverse_loss":
        weights = 1 / np.square([loss["selection"] for loss in inputs])
        np.testing.assert_allclose(c, weights / weights.sum(), rtol=1e-6)
    if method == "greedy":
        assert report["loss"]["selection"] <= min(loss["selection"] for loss in inputs) + 1e-6
    if method == "gradient_descent":
        assert [row["batch"] for row in report["history"]] == [0, 1, 2, 0, 1, 2, None, None, None]
        assert report["history"][-1]["seconds"] > 0


@pytest.mark.slow
def test_adaptive_gradient_descent_takes_other_steps(request_for):
    config = debug_config(num_iterations=6)
    first = mix.mix(
        config, request_for(method="gradient_descent", validation=VALIDATION, overwrite=True)
    )
    second = mix.mix(
        config,
        request_for(method="adaptive_gradient_descent", validation=VALIDATION, overwrite=True),
    )
    assert first["coefficients"] != second["coefficients"]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_interpolate_weighs_the_base(ratio, request_for, singles, tmp_path):
    mix.mix(common.get_config(), request_for("var1", base=singles["base"], merge_ratios=(ratio,)))
    params = store.load_params(tmp_path / "out")
    assert_close(params, numpy_mix([ratio, 1 - ratio], ("base", "var1")))
    if ratio in (0.0, 1.0):
        exact = oracle.params("pi0", "base" if ratio else "var1")
        jax.tree.map(np.testing.assert_array_equal, params, exact)


def test_interpolate_defaults_to_a_half_and_to_the_base_of_the_config(
    request_for, singles, tmp_path
):
    config = common.get_config()
    config.train.init_from = singles["base"]
    report = mix.mix(config, request_for("var1", method="interpolate"))
    assert report["merge_ratio"] == 0.5
    assert_close(store.load_params(tmp_path / "out"), numpy_mix([0.5, 0.5], ("base", "var1")))


def test_several_merge_ratios_give_a_directory_each_and_one_table(
    request_for, singles, tmp_path, capsys
):
    request = request_for(
        "var1", base=singles["base"], merge_ratios=(0.25, 0.75), validation=VALIDATION
    )
    mix.mix(debug_config(), request)
    for ratio in (0.25, 0.75):
        directory = tmp_path / "out" / f"merge_ratio={ratio:g}"
        assert_close(store.load_params(directory), numpy_mix([ratio, 1 - ratio], ("base", "var1")))
        assert json.loads((directory / "mix.json").read_text())["merge_ratio"] == ratio
    told = json.loads((tmp_path / "out" / "mix.json").read_text())
    assert [row["merge_ratio"] for row in told["sweep"]] == [0.25, 0.75]
    assert (tmp_path / "out" / "mix.png").exists()
    assert "merge_ratio 0.25" in capsys.readouterr().out


def test_interpolate_takes_the_dtype_of_the_base(request_for, tmp_path):
    base = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16)), oracle.params("pi0"))
    stats = assets.norm_stats_of(oracle.step("pi0", "base"))
    store.save_params(base, tmp_path / "base16", stats[1], stats[0])
    mix.mix(common.get_config(), request_for("var1", base=str(tmp_path / "base16")))
    assert {str(x.dtype) for x in jax.tree.leaves(store.load_params(tmp_path / "out"))} == {
        "bfloat16"
    }


@pytest.mark.parametrize(("dtype", "expected"), [("", "float32"), ("bfloat16", "bfloat16")])
def test_inputs_of_two_dtypes_meet_in_the_wider_unless_told(
    dtype, expected, request_for, singles, tmp_path
):
    stats = assets.norm_stats_of(oracle.step("pi0", "base"))
    half = jax.tree.map(
        lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16)), oracle.params("pi0", "var1")
    )
    store.save_params(half, tmp_path / "half", stats[1], stats[0])
    config = common.get_config()
    config.mix.dtype = dtype
    mix.mix(config, request_for(checkpoints=(str(tmp_path / "half"), singles["var2"])))
    assert {str(x.dtype) for x in jax.tree.leaves(store.load_params(tmp_path / "out"))} == {
        expected
    }


def test_norm_stats_by_the_rule_of_kai0(request_for, tmp_path):
    config = common.get_config()
    config.mix.norm_stats = "average"
    mix.mix(config, request_for(checkpoints=different_stats(tmp_path), coefficients=(5, 3, 2)))
    told = assets.read_norm_stats(tmp_path / "out" / "norm_stats.json")
    expected = oracle.kai0("pi0")["methods"]["manual_532"]["mixed_norm_stats"]
    for key, entry in expected.items():
        for field, values in entry.items():
            np.testing.assert_allclose(getattr(told[key], field), values, rtol=1e-6)


def test_norm_stats_from_a_path(request_for, tmp_path):
    config = common.get_config()
    config.mix.norm_stats = str(oracle.step("pi0", "var3") / "assets/fake_robot/norm_stats.json")
    mix.mix(config, request_for(checkpoints=different_stats(tmp_path)))
    source = assets.read_norm_stats(pathlib.Path(config.mix.norm_stats))
    told = assets.read_norm_stats(tmp_path / "out" / "norm_stats.json")
    np.testing.assert_array_equal(told["actions"].q99, source["actions"].q99)


def test_paths_may_go_up_and_start_at_home(request_for, singles, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    up = pathlib.Path(singles["var1"]) / ".." / "2000"
    mix.mix(common.get_config(), request_for(checkpoints=(str(up),), output=pathlib.Path("~/o")))
    assert (tmp_path / "o" / "mix.json").exists()


def test_a_base_with_statistics_of_many_robots_follows_the_fine_tune(
    request_for, singles, tmp_path
):
    base = tmp_path / "base" / "1"
    shutil.copytree(singles["base"], base)
    other = assets.norm_stats_of(oracle.step("pi0", "var3"))[1]
    assets.write_norm_stats(base / "assets/another_robot/norm_stats.json", other)
    mix.mix(common.get_config(), request_for("var1", base=str(base)))
    assert list(assets.find(tmp_path / "out", assets.NORM_STATS)) == ["fake_robot"]


def test_the_verdict_is_about_the_ratio_chosen_on_the_selection_batches():
    def loss(selection, held_out):
        return {"loss": {"selection": selection, "held_out": held_out}}

    inputs = [{"path": "a", **loss(2.0, 2.0)}, {"path": "b", **loss(3.0, 1.0)}]
    sweep = [{"merge_ratio": 0.1, **loss(1.0, 1.5)}, {"merge_ratio": 0.9, **loss(1.9, 0.5)}]
    table = mixes.table({"inputs": inputs, "sweep": sweep})
    assert "merge_ratio 0.1, the best on the selection batches, is 25.00% below the input" in table
    assert "(1.50000 against 2.00000); another input does better there (1.00000)" in table


def test_dry_run_prints_the_plan_and_writes_nothing(request_for, tmp_path, capsys):
    mix.mix(debug_config(), request_for(method="greedy", validation=VALIDATION, dry_run=True))
    printed = capsys.readouterr().out
    assert "497,000 parameters" in printed
    assert "3 batches to select on, 1 held out" in printed
    assert not list(tmp_path.iterdir())


def test_validation_episodes_in_a_training_set_are_told(request_for, singles, tmp_path):
    trained = tmp_path / "trained" / "1"
    shutil.copytree(singles["var1"], trained)
    episodes = trained / "assets/fake_robot/episodes.json"
    assets.write_episodes(episodes, [{"fingerprint": "f", "episodes": [1, 2, 3]}])
    batches = oracle.batches("pi0")
    validation.save(
        tmp_path / "val.npz", batches[:3], batches[3:], {"fingerprint": "f", "episodes": [3, 9]}
    )
    request = request_for(
        checkpoints=(str(trained), singles["var2"]), validation=str(tmp_path / "val.npz")
    )
    report = mix.mix(debug_config(), request)
    (warning,) = report["warnings"]
    assert "trained on 1 of the 2 validation episodes (3)" in warning


def test_validation_normalised_otherwise_is_told(request_for, tmp_path):
    batches, other = oracle.batches("pi0"), assets.norm_stats_of(oracle.step("pi0", "var3"))[1]
    validation.save(tmp_path / "val.npz", batches[:3], batches[3:], assets.norm_stats_json(other))
    request = request_for("var1", "var2", validation=str(tmp_path / "val.npz"))
    report = mix.mix(debug_config(), request)
    assert len(report["warnings"]) == 2
    assert "other norm stats" in report["warnings"][0]


def test_a_mix_inherits_what_its_inputs_were_trained_on(request_for, singles, tmp_path):
    trained = tmp_path / "trained" / "1"
    shutil.copytree(singles["var1"], trained)
    episodes = [{"path": "p", "fingerprint": "f", "episodes": [1, 2]}]
    assets.write_episodes(trained / "assets/fake_robot/episodes.json", episodes)
    mix.mix(common.get_config(), request_for(checkpoints=(str(trained), singles["var2"])))
    assert assets.trainings_of(tmp_path / "out") == episodes
