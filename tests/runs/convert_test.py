"""Checkpoints in other formats: bit for bit, with the files that others expect, or refused."""

import dataclasses
import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import ml_dtypes
import numpy as np
import pytest

from configs import pi0_libero, pi05_libero
from policymix import trees
from policymix.checkpoints import assets, keymaps, processors, safetensors, store
from policymix.models import pi0
from policymix.runs import convert, mix, policies
from policymix.transforms import normalize
from tests import oracle
from tests.models import text_test
from tests.models.pi0_test import random_inputs

TORCH = keymaps.NAMINGS


def config_of(model):
    """The `:debug` config that the oracle's checkpoints belong to."""
    return {"pi0": pi0_libero, "pi05": pi05_libero}[model].get_config("debug")


def run(checkpoint, output, form, config=None, **fields):
    request = convert.Request(str(checkpoint), pathlib.Path(output), form, **fields)
    return convert.convert(config or config_of("pi0"), request)


@functools.cache
def awkward(model):
    """Parameters of several dtypes, with zeros of both signs."""
    rng, dtypes = np.random.default_rng(0), itertools.cycle(["float32", "bfloat16", "float16"])

    def one(leaf):
        array = rng.standard_normal(leaf.shape).astype(jnp.dtype(next(dtypes)))
        array.reshape(-1)[:2] = 0.0, -0.0
        return array

    flat = trees.flatten(pi0.shapes(oracle.config(model)))
    return trees.unflatten({path: one(leaf) for path, leaf in flat.items()})


def assert_same_bits(found, expected):
    found, expected = trees.flatten(found), trees.flatten(expected)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype, path
        assert found[path].tobytes() == np.ascontiguousarray(array).tobytes(), path


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Per model: a step directory, whose name says that it is the other one."""

    @functools.cache
    def write(model):
        other = "pi05" if model == "pi0" else "pi0"
        path = tmp_path_factory.mktemp("steps") / f"{other}_base" / "7"
        store.save_params(awkward(model), path, *reversed(assets.norm_stats_of(
            oracle.step(model, "base"))))  # fmt: skip
        return path

    return write


@pytest.mark.parametrize("form", TORCH)
@pytest.mark.parametrize("model", oracle.MODELS)
def test_there_and_back_keeps_every_bit(model, form, steps, tmp_path):
    told = run(steps(model), tmp_path / "torch", form, config_of(model))
    assert told["holds"] == f"a {'π0.5' if model == 'pi05' else 'π0'} of dummy and dummy"
    assert_same_bits(store.load_params(tmp_path / "torch"), awkward(model))
    heads = oracle.config(model)
    assert_same_bits(safetensors.load_params(tmp_path / "torch", heads), awkward(model))
    run(tmp_path / "torch", tmp_path / "back", "orbax", config_of(model))
    assert_same_bits(store.load_params(tmp_path / "back"), awkward(model))
    (asset_id, first), (again, last) = (
        assets.norm_stats_of(path) for path in (steps(model), tmp_path / "back")
    )
    if form == "openpi":  # LeRobot's directories have no name for the robot
        assert asset_id == again == "fake_robot"
    assert normalize.difference(first, last) is None


def test_what_is_written_says_where_it_comes_from(steps, tmp_path, capsys):
    run(steps("pi0"), tmp_path / "out", "openpi")
    told = json.loads((tmp_path / "out/convert.json").read_text())
    assert told["checkpoint"] == str(steps("pi0"))
    assert (told["format"], told["lora_merged"], told["not_finite"]) == ("openpi", 0, [])
    assert set(told["dtypes"]) == {"float32", "bfloat16", "float16"}
    assert "a π0 of dummy and dummy, 50 arrays" in capsys.readouterr().out


# Beside the parameters


@pytest.mark.parametrize("model", oracle.MODELS)
def test_lerobots_directory_has_config_processors_and_statistics(model, steps, tmp_path):
    config = config_of(model)
    config.data.cameras.base_0_rgb = "observation.images.top"
    run(steps(model), tmp_path / "out", "lerobot", config, dtype="bfloat16")
    told = json.loads((tmp_path / "out/config.json").read_text())
    assert told["type"] == model
    assert told["dtype"] == "bfloat16"
    assert told["chunk_size"] == oracle.config(model).action_horizon
    # The others are absent at :debug.
    assert list(told["input_features"]) == ["observation.images.top", "observation.state"]
    _, stats = assets.norm_stats_of(steps(model))
    assert normalize.difference(processors.read(tmp_path / "out"), stats) is None
    kinds = {leaf.dtype for leaf in store.open_checkpoint(tmp_path / "out").leaves.values()}
    assert kinds == {np.dtype(ml_dtypes.bfloat16)}


def test_openpis_directory_says_its_sizes(steps, tmp_path):
    run(steps("pi05"), tmp_path / "out", "openpi", config_of("pi05"), dtype="float32")
    told = json.loads((tmp_path / "out/config.json").read_text())
    assert told["action_dim"] == 8
    assert told["precision"] == "float32"
    assert (tmp_path / "out/assets/fake_robot/norm_stats.json").is_file()


def test_without_a_config_lerobots_directory_is_refused_and_openpis_lacks_a_file(
    steps, tmp_path, capsys
):
    config = config_of("pi0")
    config.model = {}
    with pytest.raises(ValueError, match="--format=lerobot: no config.json .* pass --config"):
        run(steps("pi0"), tmp_path / "out", "lerobot", config)
    run(steps("pi0"), tmp_path / "out", "openpi", config)
    assert "no config.json is written" in capsys.readouterr().out
    assert not (tmp_path / "out/config.json").exists()


def test_statistics_of_several_robots_all_stay_in_orbax(tmp_path):
    one = assets.norm_stats_of(oracle.step("pi0", "base"))[1]
    store.save_params(awkward("pi0"), tmp_path / "step", one, "a/b")
    assets.write_norm_stats(tmp_path / "step/assets/c/norm_stats.json", one)
    run(tmp_path / "step", tmp_path / "out", "orbax")
    assert set(assets.find(tmp_path / "out", "norm_stats.json")) == {"a/b", "c"}
    with pytest.raises(ValueError, match=r"a/b, c; choose one with --config.data.asset_id"):
        run(tmp_path / "step", tmp_path / "torch", "openpi")


def test_a_copied_config_says_the_dtype_of_its_tensors(steps, tmp_path):
    for form, field in (("lerobot", "dtype"), ("openpi", "precision")):
        run(steps("pi0"), tmp_path / form, form, dtype="float32")
        run(tmp_path / form, tmp_path / f"half_{form}", form, dtype="bfloat16")
        one, two = (
            json.loads((tmp_path / name / "config.json").read_text())
            for name in (form, f"half_{form}")
        )
        assert (one[field], two[field]) == ("float32", "bfloat16")
        assert one | {field: "bfloat16"} == two


@pytest.mark.parametrize("form", ["openpi", "lerobot"])
def test_tensors_without_a_config_of_their_own_get_one(form, steps, tmp_path):
    run(steps("pi0"), tmp_path / "whole", form)
    (tmp_path / "bare").mkdir()
    (tmp_path / "whole/model.safetensors").rename(tmp_path / "bare/model.safetensors")
    run(tmp_path / "bare", tmp_path / "out", form)
    assert (tmp_path / "out/config.json").is_file()


def test_float16_is_nothing_that_lerobot_computes_in(steps, tmp_path):
    with pytest.raises(ValueError, match="float16"):
        run(steps("pi0"), tmp_path / "out", "lerobot", dtype="float16")
    assert not (tmp_path / "out").exists()


# Low-rank updates


LORA_SIZE = {
    "width": 64, "depth": 4, "mlp_dim": 128, "num_heads": 8, "num_kv_heads": 1, "head_dim": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A config whose experts have updates of several scales, and a checkpoint of it."""
    config = config_of("pi05")
    variants = {
        "paligemma_variant": LORA_SIZE | {"lora": {"rank": 2, "alpha": 6.0}},
        "action_expert_variant": LORA_SIZE | {"lora": {"rank": 3, "alpha": 1.5}},
    }
    config.model = ml_collections.ConfigDict(config.model.to_dict() | variants)
    model, rng = policies.model_config(config, why="a test"), np.random.default_rng(0)
    shapes = trees.flatten(pi0.shapes(model))
    params = {p: 0.1 * rng.standard_normal(x.shape, np.float32) for p, x in shapes.items()}
    path = tmp_path_factory.mktemp("lora") / "1"
    store.save_params(trees.unflatten(params), path)
    return config, path


@pytest.mark.parametrize("form", [pytest.param("orbax", marks=pytest.mark.slow), "lerobot"])
def test_a_merged_checkpoint_computes_what_its_updates_did(lora, form, tmp_path):
    config, path = lora
    told = run(path, tmp_path / "plain", form, config, merge_lora=True)
    assert told["lora_merged"] == 10
    model = policies.model_config(config, why="a test")
    observation, x_t, t = random_inputs(model)
    plain = store.load_params(tmp_path / "plain")
    found = pi0.velocity(model.without_lora(), plain, observation, x_t, t)
    expected = pi0.velocity(model, store.load_params(path), observation, x_t, t)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected).max() > 0.1
    wrong = dataclasses.replace(model.without_lora(), action_dim=7)
    with pytest.raises(ValueError, match="action_dim is 8 there, 7 here"):
        pi0.velocity(wrong, plain, observation, x_t[..., :7], t)


def test_updates_stay_in_orbax_and_are_refused_elsewhere(lora, tmp_path):
    config, path = lora
    run(path, tmp_path / "copy", "orbax", config)
    assert_same_bits(store.load_params(tmp_path / "copy"), store.load_params(path))
    with pytest.raises(ValueError, match="has low-rank updates, .* pass --merge_lora"):
        run(path, tmp_path / "torch", "openpi", config)


def test_updates_of_another_rank_than_the_configs_are_refused(lora, tmp_path):
    config, path = lora
    other = config.copy_and_resolve_references()
    other.model.paligemma_variant.lora.rank = 4
    with pytest.raises(ValueError, match="paligemma_variant is .*'rank': 2.* there, .*'rank': 4"):
        run(path, tmp_path / "out", "orbax", other, merge_lora=True)


def test_a_mix_scales_updates_as_a_conversion_does(lora, tmp_path):
    config, path = lora
    run(path, tmp_path / "plain", "orbax", config, merge_lora=True)
    mix.mix(config, mix.Request(checkpoints=(str(path),), output=tmp_path / "mix"))
    for array, other in zip(
        *(jax.tree.leaves(store.load_params(tmp_path / n)) for n in ("plain", "mix")), strict=True
    ):
        np.testing.assert_allclose(array, other, rtol=1e-6)


# PaliGemma alone


def test_paligemma_becomes_orbax(tmp_path):
    config = config_of("pi0")
    config.model = {}
    (tmp_path / "hf").mkdir()
    safetensors.write(tmp_path / "hf", text_test.WEIGHTS)
    expected = store.load_params(tmp_path / "hf")
    run(tmp_path / "hf", tmp_path / "out", "orbax", config)
    assert_same_bits(store.load_params(tmp_path / "out"), expected)
    flat = trees.flatten(expected)
    members = {f"params/{path.removeprefix('PaliGemma/')}": x for path, x in flat.items()}
    np.savez(tmp_path / "pt_224.npz", **members)
    run(tmp_path / "pt_224.npz", tmp_path / "again", "orbax", config)
    assert_same_bits(store.load_params(tmp_path / "again"), expected)
    with pytest.raises(ValueError, match="is no π0: it can be converted to --format=orbax alone"):
        run(tmp_path / "pt_224.npz", tmp_path / "torch", "openpi", config)


def test_open_pi_zeros_conventions_are_not_forgotten(tmp_path):
    """No array tells them, so that what is converted has them on record."""
    (tmp_path / "a").mkdir()
    store.save_params(awkward("pi0"), tmp_path / "a/0")
    config = config_of("pi0")
    config.model.variant = "open_pi_zero"
    told = run(tmp_path / "a", tmp_path / "b", "orbax", config)
    assert told["variant"] == "open_pi_zero"
    with pytest.raises(ValueError, match="b is an open-pi-zero, which other programs compute oth"):
        run(tmp_path / "b", tmp_path / "c", "openpi", config)
    with pytest.raises(ValueError, match="is an open-pi-zero, config.model.variant is 'openpi'"):
        run(tmp_path / "b/0", tmp_path / "c", "orbax")


# Dtypes, and numbers that are none


def test_another_dtype_rounds_to_nearest(steps, tmp_path):
    run(steps("pi0"), tmp_path / "out", "orbax", dtype="bfloat16")
    found = trees.flatten(store.load_params(tmp_path / "out"))
    for path, array in trees.flatten(awkward("pi0")).items():
        np.testing.assert_array_equal(found[path], array.astype(ml_dtypes.bfloat16))


def test_numbers_that_do_not_fit_are_named_and_nan_is_kept_and_told(tmp_path, capsys):
    params = trees.flatten(awkward("pi0"))
    params["state_proj/bias"] = np.full(64, 1e6, np.float32)
    store.save_params(trees.unflatten(params), tmp_path / "large")
    with pytest.raises(ValueError, match="'state_proj/bias' holds numbers that do not fit into fl"):
        run(tmp_path / "large", tmp_path / "out", "orbax", dtype="float16")
    assert not (tmp_path / "out").exists()
    params["state_proj/bias"][9] = np.nan
    store.save_params(trees.unflatten(params), tmp_path / "both")
    with pytest.raises(ValueError, match="'state_proj/bias' holds numbers that do not fit into fl"):
        run(tmp_path / "both", tmp_path / "out", "orbax", dtype="float16")
    params["state_proj/bias"] = np.where(np.arange(64) == 9, np.nan, 1).astype(np.float32)
    store.save_params(trees.unflatten(params), tmp_path / "nan")
    told = run(tmp_path / "nan", tmp_path / "out", "openpi")
    assert told["not_finite"] == ["state_proj/bias"]
    assert "WARNING: 1 arrays hold NaN" in capsys.readouterr().out
    assert_same_bits(store.load_params(tmp_path / "out"), trees.unflatten(params))


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"form": ""}, "--format is missing: one of orbax, openpi, lerobot, lerobot_first"),
        ({"form": "gguf"}, "--format 'gguf': expected one of"),
        ({"dtype": "int8"}, "--dtype is 'int8'; expected one of float32, bfloat16, float16"),
    ],
)
def test_what_cannot_be_asked_is_refused(fields, message, steps, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(steps("pi0"), tmp_path / "out", **{"form": "openpi"} | fields)
    assert not list(tmp_path.iterdir())


def test_a_config_of_another_model_says_which_it_is(steps, tmp_path):
    message = "7 holds a π0.5 of dummy and dummy: pi05 is True there, False here"
    with pytest.raises(ValueError, match=message):
        run(steps("pi05"), tmp_path / "out", "openpi", config_of("pi0"))


def test_only_its_own_output_is_replaced(steps, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match="was not written by this command"):
        run(steps("pi0"), tmp_path / "mine", "openpi", overwrite=True)
    run(steps("pi0"), tmp_path / "out", "openpi")
    mix.mix(
        config_of("pi0"), mix.Request(checkpoints=(str(tmp_path / "out"),), output=tmp_path / "mix")
    )
    assert not (tmp_path / "mix/convert.json").exists()
    (tmp_path / "mix/convert.json").write_text("{}")
    with pytest.raises(FileExistsError, match="was not written by this command"):
        run(steps("pi0"), tmp_path / "mix", "openpi", overwrite=True)
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        run(steps("pi0"), tmp_path / "out", "openpi")
    run(steps("pi0"), tmp_path / "out", "orbax", overwrite=True)
    assert not (tmp_path / "out/model.safetensors").exists()
    with pytest.raises(ValueError, match="overlaps the input"):
        run(tmp_path / "out", tmp_path / "out/0", "orbax", overwrite=True)


def test_a_damaged_checkpoint_leaves_nothing(steps, tmp_path):
    run(steps("pi0"), tmp_path / "whole", "openpi")
    file = tmp_path / "whole/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or damaged"):
        run(tmp_path / "whole", tmp_path / "out", "orbax")
    assert [p.name for p in tmp_path.iterdir()] == ["whole"]


def test_a_bucket_is_no_place_to_write_to(steps):
    with pytest.raises(ValueError, match="is not a local path: write to a local disk"):
        run(steps("pi0"), "gs://bucket/out", "orbax")


def test_a_mix_is_not_labelled_as_another_model(tmp_path):
    request = mix.Request(
        checkpoints=(str(oracle.step("pi0", "base")),), output=tmp_path / "out", format="lerobot"
    )
    with pytest.raises(ValueError, match="pi05 is False there, True here"):
        mix.mix(config_of("pi05"), request)


def test_a_dry_run_writes_nothing(steps, tmp_path):
    run(steps("pi0"), tmp_path / "out", "lerobot", dry_run=True)
    assert not list(tmp_path.iterdir())
