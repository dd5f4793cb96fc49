"""Random inputs through any policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common, pi0_metaworld, pi0_pusht, pi05_libero
from policymix.checkpoints import store
from policymix.models import pi0
from policymix.runs import policies, sample_actions
from tests import oracle


def sampled(config, **fields):
    return sample_actions.sample(config, sample_actions.Request(num_calls=2, **fields))


def test_fresh_parameters_of_a_config_act(capsys):
    told = sampled(pi0_metaworld.get_config("debug"), batch_size=2, num_samples=3)
    out = capsys.readouterr().out
    assert "actions (2, 3, 8, 4)" in out
    assert "a π0 of 64-wide and 128-wide" in out
    assert 0 < told["p50_ms"] <= told["p99_ms"]


def test_a_checkpoint_needs_no_config(capsys):
    sampled(common.get_config(), checkpoint=str(oracle.step("pi05", "base")))
    assert "a π0.5 of dummy and dummy" in capsys.readouterr().out


def test_a_config_of_another_model_is_refused():
    with pytest.raises(ValueError, match="base/1000 holds a π0 of dummy and dummy: pi05 is False"):
        sampled(pi05_libero.get_config("debug"), checkpoint=str(oracle.step("pi0", "base")))


@pytest.mark.slow
def test_absent_cameras_are_left_out(monkeypatch):
    seen = []

    def sample(model, params, observation, **rest):
        seen.append((model.image_keys, list(observation.images)))
        return np.zeros((1, 1, 6, 8), np.float32)

    monkeypatch.setattr(pi0, "sample_actions", sample)
    config = pi05_libero.get_config("debug")
    config.data.cameras.left_wrist_0_rgb = "wrist"
    sampled(config)
    assert seen[0] == (("left_wrist_0_rgb",), ["left_wrist_0_rgb"])


@pytest.mark.slow
def test_a_policy_without_vocabulary_needs_no_config(tmp_path, capsys):
    config = pi0_pusht.get_config("small,debug")
    model = policies.model_config(config, why="a test")
    store.save_params(pi0.init(model, jax.random.key(0)), tmp_path / "step")
    sampled(common.get_config(), checkpoint=str(tmp_path / "step"))
    assert "a π0 of 64-wide and 128-wide" in capsys.readouterr().out


def test_without_either_it_says_what_to_give():
    with pytest.raises(ValueError, match="a policy needs a model, and config.model is empty"):
        sampled(common.get_config())
    with pytest.raises(ValueError, match="--num_samples is 0"):
        sampled(common.get_config(), num_samples=0)


def test_a_dry_run_computes_nothing(capsys, monkeypatch):
    monkeypatch.setattr(pi0, "sample_actions", None)
    assert sampled(pi05_libero.get_config(), dry_run=True) == {}
    assert "a π0.5 of gemma_2b and gemma_300m: 3,353,433,872 parameters" in capsys.readouterr().out


def test_what_is_read_of_the_parameters():
    """PaliGemma and what depends on time alone once, the rest of the actions' at every step."""
    tree = {
        "PaliGemma": {
            "img": {"LayerNorm_1": jnp.zeros(1)},
            "llm": {"layers": {"mlp": jnp.zeros(10), "mlp_1": {"linear": jnp.zeros(100)},
                               "pre_ffw_norm_1": {"Dense_0": {"kernel": jnp.zeros(7)}}},
                    "embedder": {"input_embedding": jnp.zeros(1000)}},
        },
        "action_in_proj": {"kernel": jnp.zeros(10_000, jnp.bfloat16)},
        "time_mlp_in": {"kernel": jnp.zeros(3)},
        "action_time_mlp_in": {"kernel": jnp.zeros(20)},
    }  # fmt: skip
    expected = 4 * (1 + 10 + 7 + 3 + 5 * (100 + 20)) + 2 * 5 * 10_000
    assert sample_actions.bytes_read(tree, 5) == expected
    assert 1e8 < sample_actions.copy_bandwidth() < 1e13  # from a slow disk's to no device's
