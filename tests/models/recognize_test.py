"""Which policy a parameter tree belongs to, told by its shapes."""

import jax
import numpy as np
import pytest

from policymix import trees
from policymix.models import pi0, recognize
from policymix.rl import networks
from policymix.rl.config import LearnerConfig
from tests.models.pi0_test import SMALL, noisy_params, random_inputs, small_config

CONFIGS = {
    "pi0": pi0.Pi0Config(),
    "pi05": pi0.Pi0Config(pi05=True),
    "lora": pi0.Pi0Config(
        paligemma_variant="gemma_2b_lora", action_expert_variant="gemma_300m_lora", action_dim=7
    ),
    "one expert's lora": pi0.Pi0Config(pi05=True, action_expert_variant="gemma_300m_lora"),
    "dummy": pi0.Pi0Config("dummy", "dummy", "mu/28", siglip_depth=2, vocab_size=512),
    "as many heads of both kinds": pi0.Pi0Config(
        paligemma_variant=SMALL | {"num_kv_heads": 2},
        action_expert_variant=SMALL | {"num_kv_heads": 2, "width": 8},
        siglip_variant={"width": 24, "depth": 3, "mlp_dim": 40, "num_heads": 3, "patch": 14},
        proprio_dim=9,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_tree_says_its_model(name):
    config = CONFIGS[name]
    assert recognize.model(pi0.shapes(config)) == config


def test_a_paligemma_alone_is_one():
    whole = trees.flatten(pi0.shapes(CONFIGS["pi0"]))
    alone = {p: x for p, x in whole.items() if p.startswith("PaliGemma") and "_1/" not in p}
    assert recognize.describe(alone) == "a PaliGemma without action expert of gemma_2b"
    model = recognize.model(alone, image_keys=("image",), max_token_len=7)
    assert (model.paligemma_variant, model.vocab_size) == (CONFIGS["pi0"].paligemma_variant, 257152)
    with pytest.raises(ValueError, match="neither a π0 nor a PaliGemma"):
        recognize.model({"w": np.zeros(3)})


@pytest.mark.parametrize("algorithm", ["chunk_iql", "qc_fql", "cloning"])
@pytest.mark.parametrize("network", ["plain", "fused"])
def test_a_chunk_level_learner_is_told_from_a_pi0(algorithm, network):
    config = LearnerConfig(algorithm, network=network, hidden_dim=8, feature_dim=8)
    params = jax.eval_shape(lambda: networks.init(config, jax.random.key(0)))
    for tree in (params, trees.flatten(params)):
        assert recognize.is_chunk_level(tree)
        assert recognize.describe(tree) == "a chunk-level learner"
    with pytest.raises(ValueError, match="run/1 holds a chunk-level learner"):
        recognize.check(pi0.shapes(CONFIGS["pi0"]), params, "run/1")
    for other in (pi0.shapes(CONFIGS["pi05"]), {"w": np.zeros(3)}):
        assert not recognize.is_chunk_level(other)
    assert recognize.describe({"w": np.zeros(3)}) == "no π0 that is known"


def test_a_tree_without_pictures_has_no_cameras():
    assert recognize.model(pi0.shapes(small_config(image_keys=()))).image_keys == ()


def test_weights_of_another_variant_say_which_and_what_differs():
    with pytest.raises(ValueError, match="same architecture") as caught:
        recognize.check(pi0.shapes(CONFIGS["pi0"]), pi0.shapes(CONFIGS["lora"]), "run/1")
    told = str(caught.value)
    assert "run/1 holds a π0 of gemma_2b_lora and gemma_300m_lora" in told
    assert "paligemma_variant is gemma_2b_lora there, gemma_2b here" in told
    assert "action_dim is 7 there, 32 here" in told
    assert (
        "only in run/1: PaliGemma/llm/layers/attn/attn_vec_einsum/lora_a (18, 8, 256, 16)" in told
    )
    assert "action_in_proj/kernel: (32, 1024) in config.model, (7, 1024) in run/1" in told


@pytest.mark.parametrize(
    "use",
    [
        lambda config, params, given, x_t, t: pi0.velocity(config, params, given, x_t, t),
        lambda config, params, given, x_t, _: pi0.sample_actions(config, params, given, noise=x_t),
    ],
    ids=["velocity", "sample_actions"],
)
def test_parameters_of_another_variant_are_named_where_they_are_used(use):
    config, params = small_config(), noisy_params(small_config(pi05=True))
    given = random_inputs(config)
    with pytest.raises(
        ValueError, match=r"params holds a π0.5 of 16-wide and 8-wide: pi05 is True"
    ):
        use(config, params, *given)


def test_what_the_model_does_not_need_may_be_there():
    """As the vision tower of a policy whose cameras are all absent."""
    config = small_config()
    observation, x_t, t = random_inputs(config)
    found = pi0.velocity(config.seeing(()), noisy_params(config), observation, x_t, t)
    assert found.shape == x_t.shape
    with pytest.raises(ValueError, match="only in params"):
        recognize.check(pi0.shapes(config.seeing(())), noisy_params(config), "params")


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("PaliGemma/llm/layers/attn/q_einsum/w", lambda x: x[0]),
        ("PaliGemma/llm/layers/attn/q_einsum/w", lambda x: x[..., :7]),
        ("PaliGemma/llm/layers/mlp_1/gating_einsum", lambda x: x[None]),
        ("PaliGemma/img/pos_embedding", lambda x: x[0, 0, 0]),
        (
            "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel",
            lambda x: x[:, :, :1],
        ),
    ],
)
def test_arrays_that_no_model_has_are_named(path, change):
    config = small_config()
    flat = trees.flatten(noisy_params(config))
    with pytest.raises(ValueError, match=path):
        recognize.check(pi0.shapes(config), flat | {path: change(flat[path])}, "params")


def test_shapes_are_the_callers_own():
    first = pi0.shapes(small_config())
    first["PaliGemma"].clear()
    assert jax.tree.leaves(pi0.shapes(small_config())["PaliGemma"])
