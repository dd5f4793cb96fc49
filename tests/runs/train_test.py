"""Training: exact resume, what lies beside a checkpoint, what is refused."""

import dataclasses
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import ml_collections
import numpy as np
import pytest

from configs import common, pi0_libero, pi0_state
from policymix import metrics, trees
from policymix.checkpoints import assets, safetensors, store
from policymix.data import lerobot
from policymix.models import pi0
from policymix.runs import policies, train
from tests import commands
from tests.models import text_test

ROOT = pathlib.Path(__file__).parents[2]


def debug_config(**settings):
    config = pi0_state.get_config("debug")
    config.train.update(settings)
    return config


def run(config, workdir, **options):
    """On one device: eight pretended ones share two cores, and most of these tests are not about
    them.
    """
    return train.train(config, workdir, devices=jax.devices()[:1], **options)


def train_state(path: pathlib.Path) -> dict:
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointer().restore(path / "train_state")


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, dict(a), dict(b))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Four steps without a stop."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    run(debug_config(), workdir)
    return workdir


def test_two_steps_and_two_more_equal_four(straight, tmp_path, capsys):
    workdir = tmp_path / "run"
    run(debug_config(num_steps=2), workdir)
    assert not (workdir / "4").exists()
    run(debug_config(), workdir)
    assert "resumed from step 2" in capsys.readouterr().out
    assert_identical(store.load_params(workdir / "4"), store.load_params(straight / "4"))
    assert_identical(train_state(workdir / "4"), train_state(straight / "4"))
    losses = [
        [row["loss"] for row in metrics.read(w / "metrics.jsonl")] for w in (workdir, straight)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_params_hold_the_average_and_train_state_the_raw(straight):
    averaged = trees.flatten(store.load_params(straight / "4"))
    raw = trees.flatten(train_state(straight / "4")["params"])
    assert averaged.keys() == raw.keys()
    assert any((averaged[path] != raw[path]).any() for path in raw)


def test_without_average_params_are_raw_and_not_stored_twice(tmp_path):
    state = run(debug_config(num_steps=1, ema_decay=0.0), tmp_path / "run")
    assert state.ema_params is None
    assert_identical(store.load_params(tmp_path / "run" / "1"), state.params)
    assert not train_state(tmp_path / "run" / "1")["params"]


def test_records_episodes_and_norm_stats_beside_the_checkpoint(straight):
    config = debug_config()
    dataset = lerobot.open_dataset(config.data.path)
    (recorded,) = assets.trainings_of(straight / "4")
    assert recorded["fingerprint"] == dataset.fingerprint()
    assert 0 < len(recorded["episodes"]) < dataset.num_episodes
    asset_id, stats = assets.norm_stats_of(straight / "4")
    frames = np.concatenate(
        [np.arange(dataset.episode_from[e], dataset.episode_to[e]) for e in recorded["episodes"]]
    )
    states = dataset.column("observation.state")[frames]
    assert asset_id == pathlib.Path(config.data.path).name
    np.testing.assert_allclose(stats["state"].mean, states.mean(0, dtype=np.float64), rtol=1e-6)


def test_init_from_loads_and_says_so(straight, tmp_path, capsys):
    config = debug_config(
        num_steps=1, learning_rate=0.0, final_learning_rate=0.0, init_from=str(straight / "4")
    )
    state = run(config, tmp_path / "run")
    assert "27 arrays loaded, 0 newly initialised, 0 ignored" in capsys.readouterr().out
    assert_identical(
        state.params, store.load_params(straight / "4")
    )  # nothing moves at learning rate 0


def test_init_from_a_paligemma_leaves_the_expert_fresh(straight, tmp_path, capsys):
    """Its vocabulary has rows that pad it, as Hugging Face's has."""
    flat = trees.flatten(store.load_params(straight / "4"))
    known = {p: x for p, x in flat.items() if p.startswith("PaliGemma/") and "_1" not in p}
    table = "PaliGemma/llm/embedder/input_embedding"
    padded = known | {table: np.pad(known[table], [(0, 64), (0, 0)], constant_values=9.0)}
    arrays = {f"params/{p.removeprefix('PaliGemma/')}": x for p, x in padded.items()}
    np.savez(tmp_path / "pt.npz", **arrays)
    still = {"learning_rate": 0.0, "final_learning_rate": 0.0, "num_steps": 1}
    config = debug_config(init_from=str(tmp_path / "pt.npz"), **still)
    state = trees.flatten(run(config, tmp_path / "run").params)
    fresh = len(flat) - len(known)
    told = f"{len(known)} arrays loaded, {fresh} newly initialised"
    assert told in capsys.readouterr().out
    for path, array in known.items():
        np.testing.assert_array_equal(state[path], array)


def test_so_does_hugging_faces_with_its_vision_tower(tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    safetensors.write(tmp_path / "hf", text_test.WEIGHTS)
    loaded = trees.flatten(store.load_params(tmp_path / "hf"))
    still = {"learning_rate": 0.0, "final_learning_rate": 0.0, "ema_decay": 0.0, "num_steps": 1}
    config = debug_config(init_from=str(tmp_path / "hf"), **still)
    model = dataclasses.asdict(dataclasses.replace(text_test.CONFIG, vocab_size=90, action_dim=8))
    config.model = ml_collections.ConfigDict(model)
    config.model.proprio_dim = 8
    config.data.update({"tokenizer": "words", "cameras": {"camera": "absent"}})
    run(config, tmp_path / "run")
    assert f"{len(loaded)} arrays loaded, 18 newly initialised" in capsys.readouterr().out
    found = trees.flatten(store.load_params(tmp_path / "run/1"))
    embedder = "PaliGemma/llm/embedder/input_embedding"
    assert found[embedder].shape == (90, 32)
    for path, array in loaded.items():
        np.testing.assert_array_equal(found[path], array[:90] if path == embedder else array)
    kernel = found["PaliGemma/llm/layers/mlp_1/linear"]
    assert 0.5 < kernel.std() * kernel.shape[1] ** 0.5 < 2  # and not zero


def test_init_from_of_another_shape_names_the_key(straight, tmp_path):
    config = debug_config(init_from=str(straight / "4"))
    config.model.action_dim = 9
    with pytest.raises(ValueError, match=r"action_in_proj/kernel.*\(9, 128\).*\(8, 128\)"):
        run(config, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "fsdp_devices"), [(2, 1), (8, 1), (2, 2), (8, 4)])
def test_several_devices_train_as_one_does(devices, fsdp_devices, tmp_path):
    """To the middle; from there two go on with what they have written, and one alone does."""
    config = debug_config(num_steps=2, batch_size=8)
    several = debug_config(num_steps=2, batch_size=8)
    several.train.update({"fsdp_devices": fsdp_devices, "shard": (".*/mlp/linear=1",)})
    run(config, tmp_path / "one")
    train.train(several, tmp_path / "several", devices=jax.devices()[:devices])
    shutil.copytree(tmp_path / "several", tmp_path / "changed")
    for settings in (config, several):
        settings.train.num_steps = 4
    run(config, tmp_path / "one")
    train.train(several, tmp_path / "several", devices=jax.devices()[:devices])
    run(config, tmp_path / "changed")
    one, *others = (
        [row["loss"] for row in metrics.read(tmp_path / name / "metrics.jsonl")]
        for name in ("one", "several", "changed")
    )
    assert len(one) == 4
    for losses in others:
        np.testing.assert_allclose(one, losses, rtol=1e-5)


def test_a_batch_that_devices_cannot_share_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size is 4, which the 8 devices cannot share"):
        train.train(debug_config(), tmp_path / "run")


def test_frozen_parameters_stay(straight, tmp_path):
    config = debug_config(
        num_steps=2, freeze=("PaliGemma/.*",), init_from=str(straight / "4"), ema_decay=0.0
    )
    after = trees.flatten(run(config, tmp_path / "run").params)
    before = trees.flatten(store.load_params(straight / "4"))
    moved = {path for path in after if (np.asarray(after[path]) != before[path]).any()}
    assert moved
    assert not any(path.startswith("PaliGemma/") for path in moved)


def test_the_loss_falls(tmp_path):
    config = debug_config(
        num_steps=30, warmup_steps=3, decay_steps=30, save_every=30, learning_rate=1e-3
    )
    run(config, tmp_path / "run")
    losses = [row["loss"] for row in metrics.read(tmp_path / "run" / "metrics.jsonl")]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.data.update({"path": ""}), "config.data.path is empty"),
        (lambda c: c.data.update({"path": "nowhere"}), "nowhere"),
        (lambda c: c.data.update({"state_key": "observation.stat"}), "observation.state"),
        (lambda c: c.model.update({"proprio_dim": 1}), "2 dimensions.*proprio_dim is 1"),
        (lambda c: c.model.update({"action_dim": 1, "proprio_dim": 2}), "action_dim is 1"),
        (lambda c: c.model.update({"vocab_size": 100}), "vocab_size is 100"),
        (lambda c: c.model.update({"image_keys": ("base_0_rgb",)}), "image_keys"),
        (lambda c: c.train.update({"freeze": ("nothing",)}), "'nothing' matches no parameter"),
        (lambda c: c.train.update({"fsdp_devices": 2}), "fsdp_devices is 2"),
        (lambda c: c.train.update({"decay_steps": 1}), "decay_steps 1"),
        (lambda c: c.train.update({"save_every": 0}), "save_every is 0"),
        (lambda c: c.train.update({"seed": -1}), "seed is -1"),
        (lambda c: c.train.update({"ema_decay": 1.5}), "ema_decay is 1.5"),
        (lambda c: c.train.update({"learning_rate": float("nan")}), "learning_rate is nan"),
        (lambda c: c.train.update({"freeze": ("[",)}), "not a regular expression"),
        (lambda c: c.train.update({"init_from": "s3://bucket/x"}), "remote paths are gs://"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(change, message, tmp_path):
    config = debug_config()
    change(config)
    with pytest.raises((ValueError, OSError), match=message):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_model_says_which_config_to_give(tmp_path):
    with pytest.raises(ValueError, match="config.model is empty"):
        run(common.get_config(), tmp_path / "run")


def test_a_changed_config_is_refused_with_the_fields(straight, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    before = sorted(workdir.rglob("*"))
    with pytest.raises(ValueError, match=r"train.seed: 42 then, 7 now"):
        run(debug_config(seed=7), workdir)
    assert sorted(workdir.rglob("*")) == before


def test_a_foreign_directory_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="not a run of train.py"):
            run(debug_config(), tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_somebody_elses_config_json_does_not_make_a_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "pi0"}')
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(FileExistsError, match="not a run of train.py"):
        run(debug_config(), tmp_path, overwrite=True)
    assert (tmp_path / "model.safetensors").exists()


def test_overwrite_does_not_delete_what_it_starts_from(straight, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    with pytest.raises(ValueError, match="overlaps the input"):
        run(debug_config(init_from=str(workdir / "4")), workdir, overwrite=True)
    assert (workdir / "4" / "params").is_dir()


def test_resume_keeps_the_normalisation_though_its_source_is_gone(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "base")
    config = debug_config(num_steps=1, keep_period=1, init_from=str(tmp_path / "base" / "4"))
    run(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "base")
    config.train.num_steps = 2
    run(config, tmp_path / "run")
    first, second = (assets.norm_stats_of(tmp_path / "run" / step)[1] for step in ("1", "2"))
    np.testing.assert_array_equal(first["state"].mean, second["state"].mean)


def test_a_start_that_is_not_there_is_an_error_and_not_new_statistics(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        run(debug_config(init_from=str(tmp_path / "nowhere")), tmp_path / "run")


def test_resume_refuses_data_that_changed(straight, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(debug_config().data.path, data)
    config = debug_config(num_steps=1)
    config.data.path = str(data)
    run(config, tmp_path / "run")
    info = json.loads((data / "meta/info.json").read_text())
    (data / "meta/info.json").write_text(json.dumps(info | {"robot_type": "another"}))
    config.train.num_steps = 2
    with pytest.raises(ValueError, match=r"content changed.*that checkpoint \(init_from\) in an"):
        run(config, tmp_path / "run")


def test_a_step_without_train_state_is_not_silently_restarted(straight, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    shutil.rmtree(workdir / "4" / "train_state")
    message = r"4 has no train_state, so it cannot be resumed: start from it \(init_from\) in an"
    with pytest.raises(ValueError, match=message):
        run(debug_config(num_steps=6), workdir)


def test_a_model_with_cameras_trains_on_numbers_only_if_told_so(tmp_path):
    config = pi0_libero.get_config("debug")
    config.data.cameras.left_wrist_0_rgb = ""
    with pytest.raises(ValueError, match="image_keys names the cameras"):
        run(config, tmp_path / "run")


def test_overwrite_starts_again(straight, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    run(debug_config(seed=7, num_steps=1), workdir, overwrite=True)
    assert [p.name for p in workdir.iterdir() if p.name.isdigit()] == ["1"]


def test_divergence_stops_with_the_step_and_keeps_the_last_checkpoint(straight, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["train"]["learning_rate"] = config["train"]["final_learning_rate"] = 1e30
    (workdir / "config.json").write_text(json.dumps(config))
    bad = debug_config(learning_rate=1e30, final_learning_rate=1e30, num_steps=12, save_every=1)
    with pytest.raises(FloatingPointError, match=r"at step \d+.*learning_rate"):
        run(bad, workdir)
    model = policies.model_config(bad, why="the test")
    params = store.load_params(workdir / "4")
    assert trees.difference(params, pi0.shapes(model)) is None


def test_dry_run_writes_nothing(tmp_path, capsys):
    assert run(debug_config(), tmp_path / "run", dry_run=True) is None
    assert "1,202,312 parameters" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_kill_9_and_resume_equals_an_uninterrupted_run(tmp_path):
    def command(workdir):
        settings = (
            "num_steps=60",
            "save_every=10",
            "log_every=10",
            "decay_steps=60",
            "keep_period=60",
        )
        return [
            sys.executable,
            str(ROOT / "experiments/train.py"),
            f"--config={ROOT / 'configs/pi0_state.py'}:debug",
            f"--workdir={workdir}",
            *(f"--config.train.{setting}" for setting in settings),
        ]

    env = commands.ONE_DEVICE
    subprocess.run(command(tmp_path / "straight"), check=True, timeout=300, env=env)
    for after in (10, 40):
        process = subprocess.Popen(command(tmp_path / "killed"), env=env)
        while not any(
            int(p.name) >= after for p in (tmp_path / "killed").glob("[0-9]*") if p.name.isdigit()
        ):
            time.sleep(0.01)
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed" / "60").exists()
    subprocess.run(command(tmp_path / "killed"), check=True, timeout=300, env=env)
    for load in (store.load_params, train_state):
        assert_identical(load(tmp_path / "killed" / "60"), load(tmp_path / "straight" / "60"))
