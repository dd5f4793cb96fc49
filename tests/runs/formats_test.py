"""Mixes of checkpoints in every format, of several at once, and what is written beside them."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from configs import common
from policymix import trees
from policymix.checkpoints import assets, keymaps, processors, safetensors, store
from policymix.runs import mix
from policymix.transforms.normalize import NormStats
from tests import oracle
from tests.runs.mix_test import assert_close, numpy_mix

TORCH = keymaps.NAMINGS
C = (0.5, 0.3, 0.2)


def stats(scale=1.0):
    entry = NormStats(np.zeros(7), scale * np.ones(7), -np.ones(7), np.ones(7))
    return {"state": entry, "actions": entry}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(variant, format) → a checkpoint's path; all have the same norm stats."""
    root, made = tmp_path_factory.mktemp("formats"), {}

    def write(which: str, form: str, model: str = "pi0") -> str:
        path = root / f"{model}_{which}_{form}"
        if path not in made:
            params = oracle.params(model, which)
            if form == "orbax":
                store.save_params(params, path, stats(), "robot")
            else:
                safetensors.save_params(params, path, form)
                assets.write_norm_stats(path / "assets/robot/norm_stats.json", stats())
                (path / "config.json").write_text(json.dumps({"type": "pi0", "name": which}))
            made[path] = str(path)
        return made[path]

    return write


def run(tmp_path, checkpoints, config=None, **fields):
    request = mix.Request(checkpoints=tuple(checkpoints), output=tmp_path / "out", **fields)
    return mix.mix(config or common.get_config(), request)


def mixed_by_name(checkpoints, c=C):
    opened = [store.open_checkpoint(path).leaves for path in checkpoints]
    return {
        name: sum(k * leaf[name].read().astype(float) for k, leaf in zip(c, opened, strict=True))
        for name in opened[0]
    }


@pytest.mark.parametrize("form", TORCH)
def test_pytorch_checkpoints_give_one_like_them(form, written, tmp_path):
    inputs = [written(w, form) for w in oracle.VARIANTS]
    report = run(tmp_path, inputs, coefficients=C)
    assert report["format"] == form
    found = store.open_checkpoint(tmp_path / "out")
    assert found.format == form
    assert found.files == store.open_checkpoint(inputs[0]).files  # the same order and metadata
    expected = mixed_by_name(inputs)
    assert found.leaves.keys() == expected.keys()
    for name, leaf in found.leaves.items():
        np.testing.assert_allclose(leaf.read(), expected[name], atol=1e-6, err_msg=name)
    assert_close(store.load_params(tmp_path / "out"), numpy_mix(C))
    assert json.loads((tmp_path / "out/config.json").read_text())["name"] == "var1"
    for place in ("norm_stats.json", "assets/robot/norm_stats.json"):
        assert (tmp_path / "out" / place).is_file()


FORMATS = ("orbax", *TORCH)


@pytest.mark.parametrize("wanted", ["", *FORMATS])
@pytest.mark.parametrize(
    "forms", [("orbax", "lerobot", "openpi"), ("lerobot_first", "openpi", "lerobot")]
)
def test_inputs_of_different_formats_meet(forms, wanted, written, tmp_path):
    inputs = [written(w, form) for w, form in zip(oracle.VARIANTS, forms, strict=True)]
    report = run(tmp_path, inputs, coefficients=C, format=wanted)
    assert report["format"] == (wanted or forms[0])
    assert store.open_checkpoint(tmp_path / "out").format == report["format"]
    assert [entry["format"] for entry in report["inputs"]] == list(forms)
    assert_close(store.load_params(tmp_path / "out"), numpy_mix(C))


@pytest.mark.parametrize("wanted", TORCH)
@pytest.mark.parametrize("model", oracle.MODELS)
def test_orbax_checkpoints_are_written_as_whole_pytorch_files(wanted, model, written, tmp_path):
    inputs = [written(w, "orbax", model) for w in ("var1", "var2")]
    run(tmp_path, inputs, coefficients=(0.25, 0.75), format=wanted)
    expected = numpy_mix((0.25, 0.75), ("var1", "var2"), model)
    assert_close(store.load_params(tmp_path / "out"), expected)
    found = store.open_checkpoint(tmp_path / "out").leaves
    # What `save_params` writes of the same model: the tied head too, and the unused one as zeros.
    safetensors.save_params(oracle.params(model), tmp_path / "like", wanted)
    like = store.open_checkpoint(tmp_path / "like").leaves
    assert {n: leaf.shape for n, leaf in found.items()} == {n: x.shape for n, x in like.items()}
    head = next(n for n in found if n.endswith("gemma_expert.lm_head.weight"))
    assert not found[head].read().any()


def test_a_file_without_the_tied_embedding_keeps_its_tensors(written, tmp_path):
    """OpenPI's files hold the head and not the embedding, LeRobot's both; training moves one."""
    embedding, head = next(iter(keymaps.TIED.items()))
    for k, which in enumerate(("var1", "var2")):
        source = store.open_checkpoint(written(which, "openpi")).leaves
        arrays = {n: leaf.read() for n, leaf in source.items() if n != embedding}
        (tmp_path / str(k)).mkdir()
        safetensors.write(tmp_path / str(k), arrays)
    lerobot = {
        keymaps.rename(n, "openpi", "lerobot"): leaf.read()
        for n, leaf in store.open_checkpoint(written("var3", "openpi")).leaves.items()
    }
    lerobot["model." + head] = lerobot["model." + head] + 1  # gone stale: it is not the embedding
    (tmp_path / "2").mkdir()
    safetensors.write(tmp_path / "2", lerobot)
    for wanted in ("", "lerobot", "orbax"):
        inputs = [str(tmp_path / str(k)) for k in range(3)]
        out = tmp_path / (wanted or "same")
        request = mix.Request(tuple(inputs), out, coefficients=C, format=wanted)
        mix.mix(common.get_config(), request)
        assert_close(store.load_params(out), numpy_mix(C))
        names = store.open_checkpoint(out).leaves
        assert (embedding in names) is False
        assert (head in names) == (wanted == "")


def test_any_architecture_is_mixed_by_name(tmp_path):
    rng, paths = np.random.default_rng(0), []
    for k in range(3):
        arrays = {
            "conv.weight": rng.standard_normal((3, 4)).astype(np.float32),
            "half.weight": rng.standard_normal(600_000).astype(ml_dtypes.bfloat16),
            "f16.weight": rng.standard_normal((5,)).astype(np.float16),
            "position_ids": np.arange(7),
            "flag": np.array([True]),
            "scale": np.array(k, np.float32),
        }
        paths.append(tmp_path / str(k))
        paths[-1].mkdir()
        safetensors.write(paths[-1], arrays)
    run(tmp_path, map(str, paths), coefficients=C)
    found = {n: x.read() for n, x in store.open_checkpoint(tmp_path / "out").leaves.items()}
    expected = mixed_by_name(map(str, paths))
    for name in ("conv.weight", "scale"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)
    for name, dtype in (("half.weight", ml_dtypes.bfloat16), ("f16.weight", np.float16)):
        assert found[name].dtype == dtype
        correct = expected[name].astype(np.float32).astype(dtype)
        assert np.mean(found[name] == correct) >= 0.996
    np.testing.assert_array_equal(found["position_ids"], np.arange(7))
    assert found["flag"].dtype == bool


def test_indices_that_differ_cannot_be_mixed(tmp_path):
    for k in range(2):
        (tmp_path / str(k)).mkdir()
        arrays = {"a": np.ones(2, np.float32), "ids": np.arange(3) + k}
        safetensors.write(tmp_path / str(k), arrays)
    with pytest.raises(ValueError, match="'ids' is int64 in .*/0 and not the same in .*/1"):
        run(tmp_path, [str(tmp_path / "0"), str(tmp_path / "1")])
    assert not (tmp_path / "out").exists()


def test_shards_and_their_index_are_kept(tmp_path):
    names = [f"layer.{i}" for i in range(4)]
    layout = safetensors.Layout(
        (("model-00001-of-00002.safetensors", tuple(names[:2])),
         ("model-00002-of-00002.safetensors", tuple(names[2:]))), {"format": "pt"}, index=True,
    )  # fmt: skip
    for k in range(2):
        (tmp_path / str(k)).mkdir()
        arrays = {n: np.full(3, i + k, np.float32) for i, n in enumerate(names)}
        safetensors.write(tmp_path / str(k), arrays, layout)
    run(tmp_path, [str(tmp_path / "0"), str(tmp_path / "1")])
    found = store.open_checkpoint(tmp_path / "out")
    assert found.files == layout
    np.testing.assert_array_equal(found.leaves["layer.2"].read(), np.full(3, 2.5))
    expected = sorted(p.name for p in (tmp_path / "0").iterdir())
    ours = {"mix.json", "mix.png"}
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name not in ours) == expected


def test_low_rank_updates_are_merged_first(written, tmp_path):
    rng = np.random.default_rng(0)
    flat = trees.flatten(oracle.params("pi0", "var1"))
    expected = dict(flat)
    for path, names in {
        "PaliGemma/llm/layers/attn/q_einsum/w": ("lora_a", "lora_b"),
        "PaliGemma/llm/layers/attn/kv_einsum_1/w": ("lora_a", "lora_b"),
        "PaliGemma/llm/layers/attn/attn_vec_einsum/w": ("lora_a", "lora_b"),
        "PaliGemma/llm/layers/mlp/gating_einsum": ("gating_einsum_lora_a", "gating_einsum_lora_b"),
        "PaliGemma/llm/layers/mlp_1/linear": ("linear_lora_a", "linear_lora_b"),
    }.items():
        weight, folder = flat[path], path.rpartition("/")[0]
        a = rng.standard_normal((*weight.shape[:-1], 2)).astype(np.float32)
        b = rng.standard_normal((*weight.shape[:-2], 2, weight.shape[-1])).astype(np.float32)
        flat |= {f"{folder}/{names[0]}": a, f"{folder}/{names[1]}": b}
        flat[path] = weight.astype(jnp.bfloat16)  # frozen, as OpenPI keeps it
        if "attn_vec" in path:  # whose heads share an update
            b = b.sum(axis=1, keepdims=True)
        expected[path] = np.asarray(flat[path], float) + a.astype(float) @ b.astype(float)
    store.save_params(trees.unflatten(flat), tmp_path / "lora", stats(), "robot")
    report = run(tmp_path, [str(tmp_path / "lora")], base=written("base", "orbax"),
                 merge_ratios=(0.0,))  # fmt: skip
    assert_close(store.load_params(tmp_path / "out"), expected, atol=1e-5)
    assert report["dtypes"] == {"float32": 50}  # the base's
    del flat["PaliGemma/llm/layers/mlp_1/linear_lora_b"]
    store.save_params(trees.unflatten(flat), tmp_path / "half", stats(), "robot")
    with pytest.raises(ValueError, match="linear_lora_a' is half of a low-rank update"):
        run(tmp_path, [str(tmp_path / "half")], base=written("base", "orbax"), overwrite=True)


def test_an_adapter_alone_is_refused_with_the_command(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"PEFT adapter.*merge_and_unload\(\)"):
        run(tmp_path, [str(tmp_path / "a"), "b"])
    safetensors.write(tmp_path / "a", {"x.lora_A.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(
        ValueError, match=r"low-rank update 'x.lora_A.weight'.*merge_and_unload\(\)"
    ):
        run(tmp_path, [str(tmp_path / "a"), "b"])


# LeRobot's statistics


def lerobot(path: pathlib.Path, source: str, std: float) -> str:
    """A LeRobot directory with processors as LeRobot 0.4.4 wrote them."""
    shutil.copytree(source, path)
    shutil.rmtree(path / "assets")
    for file in (oracle.TESTDATA / "lerobot/policy_files_pi0").iterdir():
        shutil.copyfile(file, path / file.name)
    entry = NormStats(np.zeros(2), std * np.ones(2), -np.ones(2), np.ones(2))
    processors.write(path, {"state": entry, "actions": entry})
    return str(path)


def test_lerobots_processors_take_the_mixs_statistics(written, tmp_path):
    inputs = [
        lerobot(tmp_path / w, written(w, "lerobot"), s) for w, s in (("var1", 1), ("var2", 3))
    ]
    with pytest.raises(ValueError, match=r"norm stats of .* differ: state/std\[0\] is 1 and 3"):
        run(tmp_path, inputs)
    config = common.get_config()
    config.mix.norm_stats = "pool"
    run(tmp_path, inputs, config)
    found = assets.norm_stats_of(tmp_path / "out")[1]
    np.testing.assert_allclose(found["actions"].std, np.sqrt(5), rtol=1e-6)
    for file in processors.state_files(tmp_path / "out"):
        tensors, _ = safetensors.open_tensors(file)
        np.testing.assert_allclose(tensors["observation.state.std"].read(), np.sqrt(5), rtol=1e-6)


def test_statistics_among_the_tensors_are_not_averaged_by_accident(written, tmp_path):
    paths = []
    for k, which in enumerate(("var1", "var2")):
        opened = store.open_checkpoint(written(which, "lerobot_first"))
        arrays = {n: leaf.read() for n, leaf in opened.leaves.items()}
        for role in ("normalize_inputs", "unnormalize_outputs"):
            name = "observation_state" if role == "normalize_inputs" else "action"
            arrays[f"{role}.buffer_{name}.mean"] = np.zeros(2, np.float32)
            arrays[f"{role}.buffer_{name}.std"] = np.full(2, 1 + 2 * k, np.float32)
        paths.append(tmp_path / which)
        paths[-1].mkdir()
        safetensors.write(paths[-1], arrays)
    with pytest.raises(ValueError, match=r"state/std\[0\] is 1 and 3"):
        run(tmp_path, map(str, paths))
    config = common.get_config()
    config.mix.norm_stats = "pool"
    run(tmp_path, map(str, paths), config)
    buffers = store.open_checkpoint(tmp_path / "out").buffers
    std = buffers["unnormalize_outputs.buffer_action.std"].read()
    np.testing.assert_allclose(std, np.sqrt(5), rtol=1e-6)
