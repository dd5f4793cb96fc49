"""The names and shapes of real files, and tensors as OpenPI's own converter cuts them from a tree.

`testdata/keys/torch.json.gz` lists the tensors of OpenPI's PyTorch models, of LeRobot 0.6's, and of
LeRobot's first published π0; and of tiny files that OpenPI and LeRobot saved ("tiny …").
`testdata/keys/torch_converter.json` says itself how it was made.
"""

import collections
import functools
import gzip
import hashlib
import json
import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policymix import trees
from policymix.checkpoints import keymaps
from policymix.models import pi0, siglip, variants
from tests import oracle

KEYS = oracle.TESTDATA / "keys"
MODELS = pytest.mark.parametrize("model", oracle.MODELS)
FULL = [f"{n}/{m}" for n in ("openpi", "lerobot") for m in oracle.MODELS] + ["lerobot_first/pi0"]
EMBEDDING, HEAD = next(iter(keymaps.TIED.items()))
EXPERT = "paligemma_with_expert.gemma_expert."


@functools.cache
def listed(which: str) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of "NAMING/MODEL", or "tiny NAMING/MODEL"."""
    everything = json.loads(gzip.decompress((KEYS / "torch.json.gz").read_bytes()))
    return {name: tuple(shape) for name, shape in everything[which].items()}


@functools.cache
def full_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Our leaves of the real model."""
    described = json.loads((KEYS / f"{model}.json").read_text())
    return {path: tuple(shape) for path, (shape, _) in described.items()}


@functools.cache
def tiny_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Our leaves of a model in which few lengths are equal by chance."""
    heads = {"depth": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    config = pi0.Pi0Config(
        paligemma_variant=variants.Size(width=32, mlp_dim=48, **heads),
        action_expert_variant=variants.Size(width=24, mlp_dim=40, **heads),
        siglip_variant="mu/14",
        siglip_depth=2,
        vocab_size=64,
        pi05=model == "pi05",
        action_dim=8,
        image_keys=("base_0_rgb",),
        image_resolution=(28, 28),
    )
    return {path: tuple(x.shape) for path, x in trees.flatten(pi0.shapes(config)).items()}


def of_sizes(**sizes: int) -> dict[str, keymaps.Made]:
    """A π0 of any sizes, by the letters of the table."""
    sizes |= {"1": 1, "2": 2, "3": 3, "g": 3 * sizes["e"], "y": 2 * sizes["e"]}
    sizes["w"] = sizes["s"] * sizes["c"]
    return {r.path: r.made(sizes) for r in keymaps._RULES if r.models != "pi05"}


def counted(shapes):
    """A tree whose elements are all different: 0, 1, 2, … over its leaves in sorted order."""
    leaves, start = {}, 0
    for path in sorted(shapes):
        stop = start + math.prod(shapes[path])
        leaves[path] = np.arange(start, stop, dtype=np.float32).reshape(shapes[path])
        start = stop
    return leaves


def pieces(made):
    return [(path, piece) for path, one in made.items() for piece in one.pieces]


def foreign_shapes(made):
    return {piece.name: piece.tensor for _, piece in pieces(made)}


def template(name: str) -> str:
    return re.sub(r"\.layers\.\d+\.", ".layers.*.", name)


# Names


@pytest.mark.parametrize("which", [*FULL, *(f"tiny {which}" for which in FULL[:4])])
def test_a_naming_is_known_by_its_names(which):
    assert keymaps.naming(iter(listed(which))) == which.removeprefix("tiny ").split("/")[0]


def test_what_is_no_pi0_has_no_naming():
    assert keymaps.naming([]) is None
    assert keymaps.naming(["model.vlm_with_expert.vlm.lm_head.weight", "state_proj.weight"]) is None
    assert keymaps.naming(full_shapes("pi0")) is None


@pytest.mark.parametrize("which", FULL)
@pytest.mark.parametrize("target", keymaps.NAMINGS)
def test_every_name_has_one_in_every_other_naming(which, target):
    source, model = which.split("/")
    renamed = {keymaps.rename(name, source, target): name for name in listed(which)}
    assert len(renamed) == len(listed(which)) == {"pi0": 778, "pi05": 813}[model]
    if f"{target}/{model}" in FULL:
        assert renamed.keys() == listed(f"{target}/{model}").keys()
    assert all(keymaps.rename(new, target, source) == old for new, old in renamed.items())


def test_what_is_not_of_the_network_keeps_its_name():
    name = "normalize_inputs.buffer_observation_state.mean"
    for target in keymaps.NAMINGS:
        assert keymaps.rename(name, "lerobot_first", target) == name
        assert keymaps.rename(name, "openpi", target) == name
    with pytest.raises(ValueError, match="naming 'hf': expected one of"):
        keymaps.rename(name, "hf", "openpi")


# Shapes


@pytest.mark.parametrize("which", FULL)
def test_the_real_models_are_our_trees(which):
    naming, model = which.split("/")
    found = {keymaps.rename(n, naming, "openpi"): shape for n, shape in listed(which).items()}
    made, unused = keymaps.leaves(found)
    assert {path: one.shape for path, one in made.items()} == full_shapes(model)
    assert len(made) == {"pi0": 50, "pi05": 51}[model]
    assert set(unused) == {HEAD, EXPERT + "lm_head.weight"}
    assert keymaps.tensors(full_shapes(model)) == made

    extra = keymaps.extra_tensors(full_shapes(model))
    assert {name: kind for name, (kind, _) in extra.items()} == {
        HEAD: "tied",
        EXPERT + "lm_head.weight": "zeros",
    }
    whole = foreign_shapes(made) | {name: shape for name, (_, shape) in extra.items()}
    assert whole == found
    assert len(pieces(made)) + len(extra) == len(found)


@MODELS
def test_the_pieces_of_a_leaf_fill_it_in_order(model):
    for one in keymaps.tensors(full_shapes(model)).values():
        outer = one.shape[: len(one.pieces[0].index)]
        assert [piece.index for piece in one.pieces] == list(np.ndindex(outer))
        assert {piece.part for piece in one.pieces} == {one.shape[len(outer) :]}
        assert all(math.prod(p.tensor) == math.prod(p.part) for p in one.pieces)


@functools.cache
def tower_of_the_files():
    tower = siglip.SigLIP(siglip.Size(24, 2, 40, num_heads=4, patch=14), 32, jnp.float32)
    image = jnp.zeros((1, 28, 28, 3))
    params = jax.eval_shape(tower.init, jax.random.key(0), image)["params"]
    return {f"PaliGemma/img/{path}": leaf.shape for path, leaf in trees.flatten(params).items()}


@pytest.mark.parametrize("naming", ["openpi", "lerobot"])
@MODELS
def test_saved_files_are_the_tree_of_their_config(model, naming):
    found = listed(f"tiny {naming}/{model}")
    found = {keymaps.rename(name, naming, "openpi"): shape for name, shape in found.items()}
    with pytest.raises(ValueError, match="no SigLIP is 24 wide: pass the config"):
        keymaps.leaves(found)
    made, unused = keymaps.leaves(found, siglip_heads=4)

    # The file's tower is of no variant; the rest is that of `tiny_shapes`.
    expected = {path: s for path, s in tiny_shapes(model).items() if "/img/" not in path}
    expected |= tower_of_the_files()
    assert {path: one.shape for path, one in made.items()} == expected

    # OpenPI's save_model leaves out the twin of the head; LeRobot's files have both.
    embedder = made.pop("PaliGemma/llm/embedder/input_embedding").pieces[0]
    assert embedder.name == (HEAD if naming == "openpi" else EMBEDDING)
    assert (HEAD in unused) == (naming == "lerobot")
    written = keymaps.tensors(expected)
    assert written.pop("PaliGemma/llm/embedder/input_embedding").pieces == (
        embedder._replace(name=EMBEDDING),
    )
    assert made == written


@pytest.mark.parametrize("absent", ["/img/", "/embedder/", "/(img|embedder)/"])
@MODELS
def test_models_without_pictures_or_prompts_are_known_too(model, absent):
    shapes = {p: s for p, s in tiny_shapes(model).items() if not re.search(absent, p)}
    made = keymaps.tensors(shapes)
    assert {path: one.shape for path, one in made.items()} == shapes
    extra = keymaps.extra_tensors(shapes)
    assert bool(extra) == ("embedder" not in absent)
    found = foreign_shapes(made) | {name: shape for name, (_, shape) in extra.items()}
    assert keymaps.leaves(found) == (made, list(extra))


def test_statistics_among_the_parameters_are_unused():
    statistics = {
        f"{x}.buffer_action.mean": (7,) for x in ("normalize_targets", "normalize_inputs")
    }
    statistics["unnormalize_outputs.buffer_action.std"] = (7,)
    made, unused = keymaps.leaves(listed("openpi/pi0") | statistics)
    assert unused == [HEAD, EXPERT + "lm_head.weight", *statistics]
    assert made == keymaps.tensors(full_shapes("pi0"))


def test_the_heads_of_every_siglip_are_known():
    letters = dict.fromkeys("LKvdmefnhrtpab", 2)
    for name in siglip._SIZES:
        size = siglip.size(f"{name}/14")
        made = of_sizes(**letters, s=size.num_heads, c=size.width // size.num_heads)
        assert keymaps.leaves(foreign_shapes(made)) == (made, [])


# Values


@MODELS
def test_tensors_are_those_of_openpis_converter(model):
    golden = json.loads((KEYS / "torch_converter.json").read_text())[model]
    shapes = tiny_shapes(model)
    leaves, found = counted(shapes), collections.defaultdict(dict)
    for path, piece in pieces(keymaps.tensors(shapes)):
        tensor = np.ascontiguousarray(piece.to_tensor(leaves[path][piece.index]))
        assert tensor.shape == piece.tensor
        layer = re.findall(r"\.layers\.(\d+)\.", piece.name)
        digest = hashlib.sha256(tensor.tobytes()).hexdigest()[:12]
        found[template(piece.name)][int(*layer)] = digest
    assert {n: [by[i] for i in sorted(by)] for n, by in found.items()} == golden


def test_an_output_projection_is_right_where_the_heads_are_not_as_wide_as_the_model():
    """OpenPI's converter gives PaliGemma's (n h, d), which is right only for n h = d."""
    shapes = {path: leaf.shape for path, leaf in trees.flatten(oracle.params("pi0")).items()}
    path = "PaliGemma/llm/layers/attn/attn_vec_einsum/w"
    leaf, piece = counted(shapes)[path], keymaps.tensors(shapes)[path].pieces[1]
    weight = piece.to_tensor(leaf[1])
    assert leaf.shape == (4, 8, 16, 64)
    assert weight.shape == (64, 128)
    encoded = np.random.default_rng(0).standard_normal((8, 16))
    expected = np.einsum("nh,nhd->d", encoded, leaf[1])
    np.testing.assert_allclose(weight @ encoded.reshape(-1), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
@MODELS
def test_tensors_and_parts_are_each_others_inverse(model, dtype):
    shapes = tiny_shapes(model)
    leaves = {path: leaf.astype(dtype) for path, leaf in counted(shapes).items()}
    for path, one in keymaps.tensors(shapes).items():
        again = np.zeros(one.shape, dtype)
        for piece in one.pieces:
            tensor = piece.to_tensor(leaves[path][piece.index])
            assert tensor.dtype == dtype
            again[piece.index] = piece.to_part(np.ascontiguousarray(tensor))
        assert again.tobytes() == leaves[path].tobytes()


@settings(deadline=None, max_examples=25)
@given(st.fixed_dictionaries(dict.fromkeys("LKvdmefnhrsctpab", st.integers(1, 3))))
def test_any_sizes_are_read_from_the_shapes(sizes):
    """Equal ones among them, as in real models."""
    made = of_sizes(**sizes)
    shapes = {path: one.shape for path, one in made.items()}
    assert keymaps.tensors(shapes) == made
    assert keymaps.leaves(foreign_shapes(made), siglip_heads=sizes["s"]) == (made, [])
    leaves = counted(shapes)
    for path, piece in pieces(made):
        part = leaves[path][piece.index]
        assert np.array_equal(piece.to_part(piece.to_tensor(part)), part)


def test_a_linear_map_is_a_view():
    made = keymaps.tensors(tiny_shapes("pi0"))
    piece = made["PaliGemma/llm/layers/mlp/gating_einsum"].pieces[3]
    assert piece.name.endswith("language_model.layers.1.mlp.up_proj.weight")
    assert piece.index == (1, 1)
    tensor = np.ones(piece.tensor)
    assert np.shares_memory(piece.to_part(tensor), tensor)


# Errors


@MODELS
def test_a_tensor_that_is_missing_or_odd_is_named(model):
    found = foreign_shapes(keymaps.tensors(tiny_shapes(model)))
    found[EXPERT + "lm_head.weight"] = (64, 24)  # there is a vocabulary: its embedding is missed
    one_per_leaf = {template(name): name for name in found if "lm_head" not in name}.values()
    for place, name in enumerate(one_per_leaf):
        rest = {other: shape for other, shape in found.items() if other != name}
        with pytest.raises(ValueError, match=re.escape(f"{name} is missing")):
            keymaps.leaves(rest)
        shape = found[name]
        # Longer, or with one dim more; what only these two tell cannot be checked for length.
        wrong = (shape[0] + 1, *shape[1:]) if place % 2 else (*shape, 1)
        if name.endswith(("embed_tokens.weight", "position_embedding.weight")):
            wrong = (*shape, 1)
        said = re.escape(f"{name} has shape {wrong}, expected {shape}")
        with pytest.raises(ValueError, match=said):
            keymaps.leaves(found | {name: wrong})


@MODELS
def test_a_leaf_that_is_missing_or_odd_is_named(model):
    shapes = tiny_shapes(model)
    for path, shape in shapes.items():
        rest = {other: s for other, s in shapes.items() if other != path}
        if path != "PaliGemma/llm/embedder/input_embedding":
            with pytest.raises(ValueError, match=f"{path} is missing"):
                keymaps.tensors(rest)
        with pytest.raises(ValueError, match=re.escape(f"{path} has shape {(*shape, 1)}")):
            keymaps.tensors(shapes | {path: (*shape, 1)})


def test_a_lost_layer_is_named():
    found = foreign_shapes(keymaps.tensors(tiny_shapes("pi0")))
    rest = {n: s for n, s in found.items() if not n.startswith(EXPERT + "model.layers.1.")}
    with pytest.raises(ValueError, match=r"layers\.1\..* is missing, .* and 5 more"):
        keymaps.leaves(rest)
    rest = {n: s for n, s in found.items() if "self_attn" not in n}
    with pytest.raises(ValueError, match=r"self_attn\..* is missing"):
        keymaps.leaves(rest)
    with pytest.raises(ValueError, match="is missing"):
        keymaps.leaves({})


def test_what_is_unknown_is_named():
    shapes = tiny_shapes("pi0")
    found = foreign_shapes(keymaps.tensors(shapes))
    with pytest.raises(ValueError, match=r"time_mlp_in.weight \(24, 24\) is unknown"):
        keymaps.leaves(found | {"time_mlp_in.weight": (24, 24)})
    with pytest.raises(ValueError, match=r"critic/kernel \(3, 4\) is unknown"):
        keymaps.tensors(shapes | {"critic/kernel": (3, 4)})


def test_lora_has_to_be_merged_first():
    shapes = tiny_shapes("pi0")
    found = foreign_shapes(keymaps.tensors(shapes))
    name = EXPERT + "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    with pytest.raises(ValueError, match="lora_A.default.weight belongs to a LoRA adapter: merge"):
        keymaps.leaves(found | {name: (4, 24)})
    with pytest.raises(ValueError, match="q_einsum/lora_a belongs to a LoRA adapter: merge"):
        keymaps.tensors(shapes | {"PaliGemma/llm/layers/attn/q_einsum/lora_a": (2, 2, 32, 4)})


def test_several_key_value_heads_have_no_place():
    shapes = tiny_shapes("pi0") | {"PaliGemma/llm/layers/attn/kv_einsum/w": (2, 2, 2, 32, 16)}
    with pytest.raises(ValueError, match=re.escape("kv_einsum/w has shape (2, 2, 2, 32, 16)")):
        keymaps.tensors(shapes)


def test_a_piece_refuses_another_shape():
    piece = keymaps.tensors(tiny_shapes("pi0"))["state_proj/kernel"].pieces[0]
    with pytest.raises(
        ValueError, match=r"state_proj.weight has shape \(8, 24\), expected \(24, 8\)"
    ):
        piece.to_part(np.zeros((8, 24)))
    with pytest.raises(ValueError, match=r"part for state_proj.weight has shape \(24, 8\)"):
        piece.to_tensor(np.zeros((24, 8)))


# Groups


def groups_of(names):
    rules = [(pattern, group) for group, pattern in keymaps.GROUPS.items()]
    return collections.Counter(trees.match(rules, list(names), what="groups").values())


@pytest.mark.parametrize("which", FULL)
def test_every_tensor_belongs_to_its_group(which):
    expert, projections = (164, 10) if which.endswith("pi0") else (201, 8)
    expected = {"vision": 439, "action_expert": expert, "language": 165, "projections": projections}
    assert groups_of(listed(which)) == expected


@MODELS
def test_every_path_belongs_to_its_group_and_so_do_its_tensors(model):
    expert, projections = (8, 10) if model == "pi0" else (11, 8)
    expected = {"vision": 23, "action_expert": expert, "language": 9, "projections": projections}
    assert groups_of(full_shapes(model)) == expected
    rules = [(pattern, group) for group, pattern in keymaps.GROUPS.items()]
    for path, piece in pieces(keymaps.tensors(full_shapes(model))):
        for naming in keymaps.NAMINGS:
            name = keymaps.rename(piece.name, "openpi", naming)
            group = next(group for pattern, group in rules if re.fullmatch(pattern, name))
            assert group == next(g for pattern, g in rules if re.fullmatch(pattern, path))
