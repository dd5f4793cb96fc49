"""PaliGemma alone, against Hugging Face's.

testdata/paligemma_tiny.npz: a tiny PaliGemma (transformers 5.23) with random weights, exact in
float16, under the names it is saved with; one picture and prompt, the logits after them, and the
twelve tokens that greedy generation gives. Renewed by `PaliGemmaForConditionalGeneration.generate`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policymix import trees
from policymix.checkpoints import safetensors, store
from policymix.models import pi0, siglip, text, variants
from policymix.structs import Observation
from tests import oracle

GOLDEN = dict(np.load(oracle.TESTDATA / "paligemma_tiny.npz"))
WEIGHTS = {k[2:]: x.astype(np.float32) for k, x in GOLDEN.items() if k.startswith("w/")}
SIZE = variants.Size(width=32, depth=2, mlp_dim=48, num_heads=4, num_kv_heads=1, head_dim=8)
CONFIG = pi0.Pi0Config(
    paligemma_variant=SIZE,
    action_expert_variant=SIZE,
    siglip_variant=siglip.Size(width=32, depth=2, mlp_dim=128, num_heads=2, patch=14),
    vocab_size=96,
    max_token_len=6,
    image_keys=("camera",),
    image_resolution=(28, 28),
    dtype="float32",
)
PICTURE_TOKENS = 4


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    """Read from a file as Hugging Face writes it."""
    path = tmp_path_factory.mktemp("paligemma")
    safetensors.write(path, WEIGHTS)
    return store.load_params(path)


def observation(batch_size=1):
    prompt = GOLDEN["ids"][:, PICTURE_TOKENS:].astype(np.int32)
    padding = CONFIG.max_token_len - prompt.shape[1]
    single = Observation(
        {"camera": np.transpose(GOLDEN["pixels"], (0, 2, 3, 1))},
        {"camera": np.ones(1, bool)},
        np.zeros((1, CONFIG.proprio_dim), np.float32),
        np.pad(prompt, [(0, 0), (0, padding)]),
        np.pad(np.ones(prompt.shape, bool), [(0, 0), (0, padding)]),
    )
    return jax.tree.map(lambda x: np.repeat(x, batch_size, axis=0), single)


def test_a_paligemma_is_a_pi0_without_its_expert(params):
    whole, found = trees.flatten(pi0.shapes(CONFIG)), trees.flatten(params)
    missing = whole.keys() - found.keys()
    assert not found.keys() - whole.keys()
    assert all("_1" in path or not path.startswith("PaliGemma") for path in missing)
    for path, leaf in found.items():
        assert leaf.shape == whole[path].shape, path


def test_greedy_generation_is_hugging_faces(params):
    tokens, kept = text.generate(CONFIG, params, observation(), max_new_tokens=12)
    np.testing.assert_array_equal(tokens, GOLDEN["generated"])
    assert kept.all()


def test_generation_stops_at_the_end_of_sequence(params):
    written = GOLDEN["generated"][0].tolist()
    end = next(token for token in written if token != written[0])
    stop = written.index(end)
    tokens, kept = text.generate(CONFIG, params, observation(), max_new_tokens=12, eos_id=end)
    assert tokens[0].tolist() == written[:stop] + [0] * (12 - stop)
    assert kept[0].tolist() == [True] * stop + [False] * (12 - stop)


def test_each_of_a_batch_is_what_it_is_alone(params):
    longer = observation(2)
    longer.prompt_tokens[1, 4:] = (5, 9)
    longer.prompt_mask[1] = True
    both, _ = text.generate(CONFIG, params, longer, max_new_tokens=6)
    for row in range(2):
        alone = jax.tree.map(lambda x, row=row: x[row : row + 1], longer)
        tokens, _ = text.generate(CONFIG, params, alone, max_new_tokens=6)
        np.testing.assert_array_equal(both[row], tokens[0])
    assert both[0].tolist() != both[1].tolist()


def test_a_temperature_draws(params):
    def draw(seed, temperature):
        return text.generate(
            CONFIG,
            params,
            observation(),
            max_new_tokens=8,
            temperature=jnp.float32(temperature),
            key=jax.random.key(seed),
        )[0].tolist()

    assert draw(0, 3.0) == draw(0, 3.0)
    assert len({str(draw(seed, 3.0)) for seed in range(4)}) > 1
    assert draw(5, 1e-4) == draw(6, 0.0)


def test_computing_in_bfloat16_runs(params):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    tokens, _ = text.generate(config, params, observation(), max_new_tokens=4)
    assert tokens.shape == (1, 4)
