"""What config.train may ask for, and what is refused before anything is compiled."""

import jax
import pytest

from configs import pi0_libero, pi0_state
from policymix.runs import policies, train, train_settings


def settings(**changes):
    config = pi0_state.get_config("debug")
    config.train.update(changes)
    return config


def update_of(**changes):
    config = settings(**changes)
    return train_settings.update_of(config, policies.model_config(config, why="a test"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamww"}, r"config.train.optimizer is 'adamww'.*adamw"),
        ({"freeze": (".*",)}, "config.train.freeze .*so nothing is left to train"),
        ({"freeze": ("nothing",)}, "config.train.freeze.*'nothing' matches no parameter"),
        ({"learning_rates": ("nothing=2",)}, "config.train.learning_rates.*matches no parameter"),
        ({"learning_rates": ("PaliGemma/.*",)}, "learning_rates has 'PaliGemma/.*'; expected"),
        ({"learning_rates": ("PaliGemma/.*=-1",)}, "expected 'PATH REGEX=FACTOR'"),
        ({"shard": ("nothing=0",)}, "config.train.shard.*matches no parameter"),
        ({"shard": ("PaliGemma/.*=x",)}, "config.train.shard"),
        ({"frozen_dtype": "int3"}, "frozen_dtype is 'int3'.*nf4"),
        ({"accumulate": 0}, "config.train.accumulate is 0"),
        ({"eval_every": -1}, "config.train.eval_every is -1"),
        ({"pull": -0.1}, "config.train.pull is -0.1"),
        ({"b2": 1.0}, "config.train.b2 is 1.0"),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(changes, message):
    with pytest.raises(ValueError, match=message):
        update_of(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 12}, "batch_size is 12, which the 8 devices.*multiple of 8"),
        ({"batch_size": 8, "accumulate": 2}, "accumulate = 2 parts: make it a multiple of 16"),
    ],
)
def test_a_batch_that_devices_cannot_share_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        train_settings.mesh_of(settings(**changes).train, None)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("train", {"batch_size": 12}, "config.train.batch_size is 12"),
        ("train", {"freeze": ("nothing",)}, "config.train.freeze"),
        ("train", {"optimizer": "sgd"}, "config.train.optimizer is 'sgd'"),
        ("train", {"freeze": (".*",)}, "nothing is left to train"),
        ("model", {"action_dim": 1, "proprio_dim": 2}, "action_dim is 1"),
        ("data", {"norm_stats": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_all_of_it_is_said_before_anything_is_compiled(
    section, changes, message, tmp_path, monkeypatch
):
    config = settings(batch_size=8)
    config[section].update(changes)
    monkeypatch.setattr(train_settings, "compiled", None)
    with pytest.raises((ValueError, OSError), match=message):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_low_memory_config_freezes_and_keeps_in_bfloat16():
    config = pi0_libero.get_config("lora")
    model = policies.model_config(config, why="a test")
    update = train_settings.update_of(config, model)
    shapes = train_settings.state_shapes(update, model)
    assert shapes.ema_params is None
    layers = shapes.params["PaliGemma"]["llm"]["layers"]["mlp"]
    assert layers["linear"].dtype == "bfloat16"
    assert layers["linear_lora_a"].dtype == "float32"
    trained = {leaf.shape for leaf in jax.tree.leaves(shapes.opt_state) if len(leaf.shape) > 1}
    assert layers["linear"].shape not in trained
