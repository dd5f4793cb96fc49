"""Mixing from disk to disk: what is refused, and what is never touched or half-written."""

import json
import pathlib

import jax
import numpy as np
import pytest

from configs import common
from policymix import trees
from policymix.checkpoints import assets, store
from policymix.rl import networks
from policymix.rl.config import LearnerConfig
from policymix.runs import mix, requests
from tests import oracle
from tests.runs.mix_support import VALIDATION, debug_config, different_stats


def test_different_norm_stats_are_refused_by_dimension(request_for, tmp_path):
    with pytest.raises(
        ValueError, match=r"norm stats of .* differ: state/mean\[0\].*config.mix.norm_stats=pool"
    ):
        mix.mix(common.get_config(), request_for(checkpoints=different_stats(tmp_path)))
    assert not (tmp_path / "out").exists()


def broken(tmp_path, change):
    flat = {p: np.array(x) for p, x in trees.flatten(oracle.params("pi0", "var1")).items()}
    change(flat)
    stats = assets.norm_stats_of(oracle.step("pi0", "base"))
    store.save_params(trees.unflatten(flat), tmp_path / "broken", stats[1], stats[0])
    return str(tmp_path / "broken")


def test_another_architecture_is_named_with_its_likely_cause(request_for, singles, tmp_path):
    other = str(oracle.write("pi05", "base", tmp_path))
    with pytest.raises(ValueError, match="one is a π0, the other a π0.5.*only in"):
        mix.mix(common.get_config(), request_for(checkpoints=(singles["var1"], other)))

    def wider(flat):
        flat["action_in_proj/kernel"] = np.zeros((9, 64), np.float32)

    with pytest.raises(
        ValueError,
        match=r"action_dim differs.*action_in_proj/kernel: \(8, 64\) in .*, \(9, 64\) in",
    ):
        mix.mix(
            common.get_config(), request_for(checkpoints=(singles["var1"], broken(tmp_path, wider)))
        )


@pytest.fixture(scope="module")
def learners(tmp_path_factory):
    """Checkpoints of two chunk-level learners: all zeros, and all ones."""
    config = LearnerConfig(action_dim=2, proprio_dim=3, action_horizon=2, hidden_dim=8)
    shapes = jax.eval_shape(lambda: networks.init(config, jax.random.key(0)))
    paths = [tmp_path_factory.mktemp("learners") / f"learner{k}" for k in range(2)]
    for k, path in enumerate(paths):
        store.save_params(
            jax.tree.map(lambda leaf, k=k: np.full(leaf.shape, k, "f4"), shapes), path
        )
    return tuple(map(str, paths))


def test_a_chunk_level_learner_beside_a_pi0_is_named(request_for, singles, learners):
    one, _ = learners
    for checkpoints in ((singles["var1"], one), (one, singles["var1"])):
        with pytest.raises(ValueError, match=r"\(one is a chunk-level learner, the other is not\)"):
            mix.mix(common.get_config(), request_for(checkpoints=checkpoints))


@pytest.mark.parametrize("validation", ["", VALIDATION])
@pytest.mark.parametrize("method", [*requests.BY_LOSS, "average"])
def test_chunk_level_learners_have_no_loss(method, validation, request_for, learners, tmp_path):
    request = request_for(checkpoints=learners, method=method, validation=validation)
    if method in requests.BY_LOSS or validation:
        with pytest.raises(ValueError, match="learner0 is a chunk-level learner, which has no val"):
            mix.mix(common.get_config(), request)
        assert not (tmp_path / "out").exists()
    else:
        assert mix.mix(common.get_config(), request)["coefficients"] == [0.5, 0.5]


def test_a_method_that_the_config_names_needs_a_loss_too(request_for, learners):
    config = common.get_config()
    config.mix.method = "greedy"
    with pytest.raises(ValueError, match="judge mixes by evaluate.py"):
        mix.mix(config, request_for(checkpoints=learners))
    with pytest.raises(ValueError, match="judge mixes by evaluate.py"):
        mix.mix(common.get_config(), request_for(checkpoints=learners, landscape=True))


@pytest.mark.parametrize("method", ["average", "gradient_descent"])
def test_nan_in_a_checkpoint_is_named_by_file_and_key(method, request_for, singles, tmp_path):
    def poison(flat):
        flat["action_out_proj/bias"][3] = np.nan

    request = request_for(
        checkpoints=(singles["var1"], broken(tmp_path, poison)),
        method=method,
        validation=VALIDATION,
    )
    with pytest.raises((ValueError, FloatingPointError), match="broken.*NaN"):
        mix.mix(debug_config(), request)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_loss_that_is_not_finite_names_the_checkpoint(request_for, singles, tmp_path):
    def explode(flat):
        flat["action_out_proj/kernel"] *= 1e30

    request = request_for(
        checkpoints=(singles["var1"], broken(tmp_path, explode)),
        method="greedy",
        validation=VALIDATION,
    )
    with pytest.raises(FloatingPointError, match="broken.*loss.*is (inf|nan)"):
        mix.mix(debug_config(), request)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"checkpoints": ()}, "--checkpoints is empty"),
        ({"checkpoints": ("/nowhere/a", "/nowhere/b")}, "/nowhere/a does not exist"),
        ({"coefficients": (0.5, 0.5)}, "3 checkpoints need 3 coefficients"),
        ({"coefficients": (1.0, -1.0, 0.0)}, "sum to zero"),
        ({"coefficients": (1.0, float("nan"), 0.0)}, "finite"),
        ({"method": "manual"}, "manual needs it"),
        (
            {"method": "average", "coefficients": (1, 1, 1)},
            "--coefficients goes with --method=manual",
        ),
        ({"method": "avrage"}, "expected one of average, manual"),
        ({"method": "greedy"}, "greedy needs validation batches"),
        ({"method": "interpolate"}, "interpolate needs a base"),
        ({"format": "gguf"}, "--format 'gguf': expected one of"),
        ({"landscape": True}, "--landscape needs validation batches"),
        (
            {"merge_ratios": (0.5,), "method": "average"},
            "--merge_ratio goes with --method=interpolate",
        ),
        ({"checkpoints": ("a", "")}, "does not exist|path is empty"),
        ({"validation": "/nowhere/val.npz"}, "/nowhere/val.npz does not exist"),
        ({"validation": __file__}, "not an .npz archive"),
    ],
)
def test_bad_requests_are_refused_before_any_work(fields, message, request_for, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        mix.mix(debug_config(), request_for(**fields))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_iterations": 0}, "num_iterations must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate positive"),
        ({"power": float("nan")}, "power finite"),
        ({"dtype": "int8"}, "config.mix.dtype is 'int8'"),
        ({"norm_stats": "pol"}, "expected equal, pool, average, or the path"),
        ({"held_out": 1.0}, "config.mix.held_out is 1.0"),
    ],
)
def test_bad_settings_are_refused_before_any_work(settings, message, request_for, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        mix.mix(debug_config(**settings), request_for(validation=VALIDATION))
    assert not (tmp_path / "out").exists()


def test_negative_parts_cannot_be_pooled(request_for, tmp_path):
    request = request_for(checkpoints=different_stats(tmp_path), coefficients=(2.0, -1.0, 0.5))
    with pytest.raises(ValueError, match="cannot be pooled with the negative coefficients"):
        mix.mix(debug_config(norm_stats="pool"), request)


def test_interpolate_without_a_base_says_where_to_name_it(request_for):
    with pytest.raises(ValueError, match=r"pass --base, or a --config whose train.init_from"):
        mix.mix(common.get_config(), request_for("var1", method="interpolate"))


def test_a_loss_without_a_model_asks_for_a_config(request_for):
    with pytest.raises(ValueError, match="config.model is empty: pass --config"):
        mix.mix(common.get_config(), request_for(method="greedy", validation=VALIDATION))


def test_a_model_that_is_not_the_checkpoints_is_refused(request_for):
    with pytest.raises(ValueError, match="config.model and .* are not the same architecture"):
        mix.mix(debug_config("pi05"), request_for(method="greedy", validation=VALIDATION))


def test_validation_of_another_shape_is_refused(request_for):
    other = str(oracle.OPENPI / "pi05" / "val_batches.npz")
    with pytest.raises(
        ValueError, match=r"batch 0 does not fit config.model.*prompt_tokens is \(2, 24\)"
    ):
        mix.mix(debug_config(), request_for(method="greedy", validation=other))


def test_existing_output_stays_unless_overwritten(request_for, tmp_path):
    mix.mix(common.get_config(), request_for())
    before = (tmp_path / "out" / "mix.json").read_bytes()
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        mix.mix(common.get_config(), request_for(coefficients=(1, 2, 3)))
    assert (tmp_path / "out" / "mix.json").read_bytes() == before
    report = mix.mix(common.get_config(), request_for(coefficients=(1, 2, 3), overwrite=True))
    assert (
        json.loads((tmp_path / "out" / "mix.json").read_text())["coefficients"]
        == report["coefficients"]
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_overwrite_replaces_nothing_but_a_mix(request_for, tmp_path):
    (tmp_path / "out" / "sub").mkdir(parents=True)
    (tmp_path / "out" / "sub" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="was not written by this command"):
        mix.mix(common.get_config(), request_for(overwrite=True))
    assert (tmp_path / "out" / "sub" / "thesis.txt").read_text() == "precious"


def test_overwrite_does_not_replace_a_base_that_the_config_names(request_for, singles, tmp_path):
    mix.mix(common.get_config(), request_for())
    config = common.get_config()
    config.train.init_from = str(tmp_path / "out")
    with pytest.raises(ValueError, match="overlaps the input"):
        mix.mix(config, request_for("var1", method="interpolate", overwrite=True))


def test_output_may_not_lie_in_an_input(request_for, singles):
    inside = pathlib.Path(singles["var1"]) / "mixed"
    with pytest.raises(ValueError, match="overlaps the input"):
        mix.mix(common.get_config(), request_for(output=inside))


def test_inputs_are_not_touched(request_for, singles):
    def state():
        files = sorted(
            p for w in singles.values() for p in pathlib.Path(w).rglob("*") if p.is_file()
        )
        return [(p, p.stat().st_mtime_ns, p.read_bytes()) for p in files]

    before = state()
    mix.mix(common.get_config(), request_for())
    assert state() == before
