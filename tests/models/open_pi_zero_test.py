"""open-pi-zero's conventions, against numbers computed by that program (MIT) on a tiny model.

testdata/open_pi_zero/tiny_plain.npz: its state dict under w/ (float16, exact in float32; the
proprio mixture is the action mixture), inputs, loss, and actions of four Euler steps. Its times run
the other way: τ = 1 - t.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import common
from policymix import trees
from policymix.checkpoints import conversions, open_pi_zero, store
from policymix.models import flow, pi0, siglip, variants
from policymix.runs import sample_actions
from policymix.structs import Observation
from tests import oracle

GOLDEN = dict(np.load(oracle.TESTDATA / "open_pi_zero/tiny_plain.npz"))
HEADS = {"depth": 2, "num_heads": 4, "num_kv_heads": 1, "head_dim": 8}
CONFIG = pi0.Pi0Config(
    paligemma_variant=variants.Size(width=32, mlp_dim=48, **HEADS),
    action_expert_variant=variants.Size(width=16, mlp_dim=24, **HEADS),
    siglip_variant=siglip.Size(width=24, depth=2, mlp_dim=32, num_heads=2, patch=14),
    vocab_size=64,
    action_dim=4,
    proprio_dim=5,
    action_horizon=3,
    max_token_len=5,
    image_keys=("camera",),
    image_resolution=(28, 28),
    dtype="float32",
    variant="open_pi_zero",
    expert_rope_base=100.0,
    time_max_period=100.0,
)
PICTURE_TOKENS = 4


def state_dict():
    """As the program has it: proprio and action mixtures are one."""
    state = {k[2:]: x.astype(np.float32) for k, x in GOLDEN.items() if k.startswith("w/")}
    tied = {k.replace("mixtures.action", "mixtures.proprio"): x for k, x in state.items()}
    return state | tied


def params_of(tensors):
    tree = conversions.tree_of(tensors, "openpi", "tiny", CONFIG.siglip_variant.num_heads)
    return jax.tree.map(lambda leaf: leaf.read(), trees.unflatten(tree))


@pytest.fixture(scope="module")
def params():
    return params_of(open_pi_zero.tensors(state_dict(), "tiny"))


@pytest.fixture(scope="module")
def observation():
    ids, seen = (GOLDEN[name][:, PICTURE_TOKENS:] for name in ("ids", "am"))
    return Observation(
        # On the device, where nobody looks at values: these reach beyond a picture's [-1, 1].
        {"camera": jnp.transpose(GOLDEN["pix"], (0, 2, 3, 1))},
        {"camera": np.ones(2, bool)},
        GOLDEN["prop"][:, 0],
        ids.astype(np.int32),
        seen.astype(bool),
    )


def test_the_tree_is_that_of_a_pi0(params):
    trees.check_same(pi0.shapes(CONFIG), params, names=("the model", "the checkpoint"))


def test_loss_and_actions_are_open_pi_zeros(params, observation):
    t = jnp.asarray(1 - GOLDEN["t"])
    loss = pi0.flow_loss(
        CONFIG, params, observation, GOLDEN["act"], noise=GOLDEN["noise"], t=t
    ).mean()
    np.testing.assert_allclose(loss, GOLDEN["loss"], atol=1e-5)
    actions = pi0.sample_actions(
        CONFIG, params, observation, noise=GOLDEN["noise"], num_flow_steps=4
    )
    np.testing.assert_allclose(actions, GOLDEN["action"], atol=1e-5)
    assert np.abs(actions).max() <= 1


def test_times_are_embedded_as_there():
    found = flow.embed_time_by_position(jnp.asarray(GOLDEN["t"]), 16, 100.0)
    np.testing.assert_allclose(found, GOLDEN["time_emb"], atol=1e-6)


def test_every_convention_matters(params, observation):
    """Without the variant, the same parameters compute something else."""
    t = jnp.asarray(1 - GOLDEN["t"])
    plain = dataclasses.replace(CONFIG, variant="openpi")
    loss = pi0.flow_loss(
        plain, params, observation, GOLDEN["act"], noise=GOLDEN["noise"], t=t
    ).mean()
    assert abs(float(loss) - float(GOLDEN["loss"])) > 1e-2


# Its files


def test_a_file_is_read_without_running_it(params, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra torch")
    state = {f"_orig_mod.{k}": torch.from_numpy(x) for k, x in state_dict().items()}
    torch.save({"model": state, "cnt_update": 3}, tmp_path / "step3.pt")
    opened = store.open_checkpoint(tmp_path / "step3.pt")
    jax.tree.map(np.testing.assert_array_equal, params_of(opened.leaves), params)


def test_a_file_acts(tmp_path, capsys):
    """`experiments/sample_actions.py --config=… --checkpoint=step3.pt`."""
    torch = pytest.importorskip("torch", reason="needs the extra torch")
    state = {k: torch.from_numpy(x) for k, x in state_dict().items()}
    torch.save({"model": state}, tmp_path / "step3.pt")
    config = common.get_config()
    config.model = ml_collections.ConfigDict(dataclasses.asdict(CONFIG))
    request = sample_actions.Request(checkpoint=str(tmp_path / "step3.pt"), num_calls=1)
    sample_actions.sample(config, request)
    assert "actions (1, 1, 3, 4)" in capsys.readouterr().out


def test_bfloat16_is_kept(params, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra torch")
    state = {k: torch.from_numpy(x).bfloat16() for k, x in state_dict().items()}
    torch.save({"model": state}, tmp_path / "step3.pt")
    found = store.open_checkpoint(tmp_path / "step3.pt").leaves["action_in_proj.weight"]
    assert found.dtype == jnp.bfloat16
    expected = params["action_in_proj"]["kernel"].T.astype(jnp.bfloat16)
    np.testing.assert_array_equal(found.read(), expected)


def test_an_object_in_a_file_is_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra torch")
    torch.save({"model": pathlib.PurePosixPath("code")}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="cannot be read as tensors alone"):
        store.open_checkpoint(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="it is damaged, or holds objects"):
        store.open_checkpoint(tmp_path / "b.pt")


def test_other_state_dicts_are_named():
    with pytest.raises(ValueError, match="not a checkpoint of open-pi-zero"):
        open_pi_zero.tensors({"x": np.zeros(2)}, "a.pt")
    state = state_dict()
    lowrank = state | {"joint_model.mixtures.vlm.layers.0.q_proj.lora_A": np.zeros(2)}
    with pytest.raises(ValueError, match="low-rank parameter"):
        open_pi_zero.tensors(lowrank, "a.pt")
    name = "joint_model.mixtures.proprio.norm.weight"
    with pytest.raises(ValueError, match="whose proprio and action experts are one"):
        open_pi_zero.tensors(state | {name: state[name] + 1}, "a.pt")
