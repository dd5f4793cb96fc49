"""Random inputs through any policy."""

import jax.numpy as jnp
import numpy as np
import pytest

from configs import common, pi0_metaworld, pi05_libero
from policymix.models import pi0
from policymix.runs import sample_actions
from tests import oracle


def sampled(config, **fields):
    return sample_actions.sample(config, sample_actions.Request(num_calls=2, **fields))


def test_fresh_parameters_of_a_config_act(capsys):
    told = sampled(pi0_metaworld.get_config("debug"), batch_size=2, num_samples=3)
    out = capsys.readouterr().out
    assert "actions (2, 3, 8, 4)" in out
    assert "a π0 of 64-wide and 128-wide" in out
    assert 0 < told["p50_ms"] <= told["p99_ms"]
    assert told["floor_ms"] > 0


def test_a_checkpoint_needs_no_config(capsys):
    sampled(common.get_config(), checkpoint=str(oracle.step("pi05", "base")))
    assert "a π0.5 of dummy and dummy" in capsys.readouterr().out


def test_a_config_of_another_model_is_refused():
    with pytest.raises(ValueError, match="base/1000 holds a π0 of dummy and dummy: pi05 is False"):
        sampled(pi05_libero.get_config("debug"), checkpoint=str(oracle.step("pi0", "base")))


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
    """PaliGemma once, what serves the actions at every step, and no vocabulary."""
    tree = {
        "PaliGemma": {
            "img": {"LayerNorm_1": jnp.zeros(1)},
            "llm": {"layers": {"mlp": jnp.zeros(10), "mlp_1": {"linear": jnp.zeros(100)}},
                    "embedder": {"input_embedding": jnp.zeros(1000)}},
        },
        "action_in_proj": {"kernel": jnp.zeros(10_000, jnp.bfloat16)},
    }  # fmt: skip
    assert sample_actions.bytes_read(tree, 5) == 4 * (1 + 10 + 5 * 100) + 2 * 5 * 10_000
    assert np.isfinite(sample_actions.copy_bandwidth())
