"""The small files beside model.safetensors, against those that LeRobot 0.4.4 wrote."""

import json

import numpy as np
import pytest

from policymix.checkpoints import assets, pretrained, processors, safetensors
from policymix.models import variants
from policymix.models.config import OPENPI_CAMERAS, Pi0Config
from policymix.transforms import normalize
from tests import oracle

LEROBOT = oracle.TESTDATA / "lerobot"
NAMES = ("policy_preprocessor", "policy_postprocessor")


def theirs(kind):
    """The directory of LeRobot's own files, and what they hold by name."""
    directory = LEROBOT / f"policy_files_{kind}"
    return directory, contents(directory)


def contents(directory):
    return {path.name: json.loads(path.read_text()) for path in directory.glob("*.json")}


def model(kind="pi0", **fields):
    return Pi0Config(pi05=kind == "pi05", **fields)


def stats(proprio=3, action=2, quantiles=True):
    def entry(dim):
        values = np.random.default_rng(dim).normal(size=(100, dim))
        found = normalize.compute(values)
        return found if quantiles else normalize.NormStats(found.mean, found.std)

    return {"state": entry(proprio), "actions": entry(action)}


def written(path, config, found, cameras=None, dtype="float32", **other):
    pretrained.write_lerobot(path, config, found, cameras=cameras or {}, dtype=dtype, **other)
    return contents(path)


def step(pipeline, name):
    """(place, step) of the one of this name."""
    names = [entry["registry_name"] for entry in pipeline["steps"]]
    return names.index(name), pipeline["steps"][names.index(name)]


@pytest.fixture(params=["pi0", "pi05"])
def pair(request, tmp_path):
    """(kind, LeRobot's directory, ours of the same policy)."""
    directory, _ = theirs(request.param)
    config = model(request.param, image_keys=("base_0_rgb",))
    cameras = {"base_0_rgb": "observation.images.top"}
    written(tmp_path, config, processors.read(directory), cameras)
    return request.param, directory, tmp_path


def with_our_pictures(content):
    """LeRobot notes the size of the dataset's pictures, which no configuration of ours knows."""
    text = json.dumps(content)
    assert "[3, 480, 640]" in text
    return json.loads(text.replace("[3, 480, 640]", "[3, 224, 224]"))


def test_config_json_is_lerobots_field_for_field(pair):
    _, directory, ours = pair
    expected = with_our_pictures(contents(directory)["config.json"])
    assert contents(ours)["config.json"] == expected


def test_the_processors_are_lerobots_but_for_two_numbers(pair):
    kind, directory, ours = pair
    expected = contents(directory)
    normalizer = step(expected[f"{NAMES[0]}.json"], "normalizer_processor")[1]
    unnormalizer = step(expected[f"{NAMES[1]}.json"], "unnormalizer_processor")[1]
    for entry in (normalizer, unnormalizer):
        entry["config"]["eps"] = 1e-6  # ours in place of 1e-8
    if kind == "pi05":  # proprio in the prompt as the policy knows it, not padded to 32 numbers
        words = step(expected[f"{NAMES[0]}.json"], "pi05_prepare_state_tokenizer_processor_step")[1]
        words["config"] = {"max_state_dim": 2}
    found = contents(ours)
    assert found[f"{NAMES[0]}.json"] == with_our_pictures(expected[f"{NAMES[0]}.json"])
    assert found[f"{NAMES[1]}.json"] == expected[f"{NAMES[1]}.json"]


def test_the_statistics_are_lerobots(pair):
    _, directory, ours = pair
    assert {p.name for p in ours.iterdir()} == {p.name for p in directory.iterdir()}
    for file in directory.glob("*.safetensors"):
        expected, layout = safetensors.open_tensors(file)
        found, layout_found = safetensors.open_tensors(ours / file.name)
        wanted = [
            n
            for n in expected
            if n.endswith(normalize.FIELDS) and not n.startswith("observation.images")
        ]
        assert list(found) == wanted
        assert layout_found.metadata == layout.metadata
        for name in wanted:
            assert found[name].shape == expected[name].shape
            assert found[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(found[name].read(), expected[name].read())


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_the_statistics_read_back(tmp_path, kind):
    given = stats()
    written(tmp_path, model(kind), given)
    _, found = assets.norm_stats_of(tmp_path)
    for key in given:
        for field in normalize.FIELDS:
            expected = getattr(given[key], field).astype(np.float32)
            np.testing.assert_array_equal(getattr(found[key], field), expected)


def test_features_are_as_long_as_the_statistics(tmp_path):
    config = written(tmp_path, model(), stats(proprio=8, action=7))["config.json"]
    assert config["input_features"]["observation.state"] == {"type": "STATE", "shape": [8]}
    assert config["output_features"] == {"action": {"type": "ACTION", "shape": [7]}}
    assert (config["max_state_dim"], config["max_action_dim"]) == (32, 32)


def test_what_the_configuration_says_is_written(tmp_path):
    config = model(
        "pi05",
        action_dim=7,
        proprio_dim=9,
        action_horizon=10,
        max_token_len=180,
        image_resolution=(112, 112),
        time_sampling="uniform",
        time_max_period=2.0,
    )
    found = written(tmp_path, config, stats(), dtype="bfloat16")
    expected = {
        "type": "pi05",
        "dtype": "bfloat16",
        "chunk_size": 10,
        "n_action_steps": 10,
        "max_state_dim": 9,
        "max_action_dim": 7,
        "image_resolution": [112, 112],
        "tokenizer_max_length": 180,
        "time_sampling_beta_alpha": 1.0,
        "max_period": 2.0,
    }
    assert {name: found["config.json"][name] for name in expected} == expected
    tokens = step(found[f"{NAMES[0]}.json"], "tokenizer_processor")[1]
    assert tokens["config"]["max_length"] == 180


def test_cameras_are_named_as_the_dataset_does_in_the_models_order(tmp_path):
    cameras = {
        "right_wrist_0_rgb": "observation.image",
        "base_0_rgb": "exterior_image",
        "left_wrist_0_rgb": "",
    }
    config = written(tmp_path, model(), stats(), cameras)["config.json"]
    assert list(config["input_features"]) == [
        "observation.images.exterior_image",
        "observation.images.left_wrist_0_rgb",
        "observation.image",
        "observation.state",
    ]


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_without_statistics_there_are_no_state_files(tmp_path, kind):
    found = written(tmp_path, model(kind, proprio_dim=9), None)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        *(f"{n}.json" for n in sorted(NAMES)),
    ]
    assert not any("state_file" in s for name in NAMES for s in found[f"{name}.json"]["steps"])
    assert found["config.json"]["input_features"]["observation.state"]["shape"] == [9]
    assert found["config.json"]["output_features"]["action"]["shape"] == [32]
    assert processors.read(tmp_path) is None


def test_a_pi05_without_proprio_in_its_prompt_has_pi0s_words_and_its_own_quantiles(tmp_path):
    config = model("pi05", discrete_state_input=False)
    found = written(tmp_path, config, stats())[f"{NAMES[0]}.json"]
    pi0s = theirs("pi0")[1][f"{NAMES[0]}.json"]
    assert [s["registry_name"] for s in found["steps"]] == [
        s["registry_name"] for s in pi0s["steps"]
    ]
    place, entry = step(found, "normalizer_processor")
    assert entry["config"]["norm_map"]["STATE"] == "QUANTILES"
    assert entry["state_file"] == f"{NAMES[0]}_step_{place}_normalizer_processor.safetensors"
    assert (tmp_path / entry["state_file"]).is_file()


def test_how_values_are_normalised_can_be_said(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    quantiles = written(tmp_path / "a", model(), stats(), quantiles=True)["config.json"]
    assert quantiles["normalization_mapping"]["ACTION"] == "QUANTILES"
    deviation = written(tmp_path / "b", model("pi05"), stats(quantiles=False), quantiles=False)
    assert deviation["config.json"]["normalization_mapping"]["STATE"] == "MEAN_STD"


def test_lerobots_formula_with_its_epsilon_is_ours(tmp_path):
    given = stats()
    given["state"].std[0] = 0
    found = written(tmp_path, model(), given, dtype="bfloat16")[f"{NAMES[0]}.json"]
    eps = step(found, "normalizer_processor")[1]["config"]["eps"]
    read = processors.read(tmp_path)["state"]
    x = np.random.default_rng(0).normal(size=(5, 3))
    expected = normalize.normalize(x, read, scheme="mean_std")
    np.testing.assert_array_equal((x - read.mean) / (read.std + eps), expected)


def test_statistics_without_quantiles_serve_a_pi0(tmp_path):
    written(tmp_path, model(), stats(quantiles=False))
    tensors, _ = safetensors.open_tensors(next(tmp_path.glob("*.safetensors")))
    names = ["action.mean", "action.std", "observation.state.mean", "observation.state.std"]
    assert list(tensors) == names


SMALL = {
    "width": 32,
    "depth": 4,
    "mlp_dim": 64,
    "num_heads": 8,
    "num_kv_heads": 1,
    "head_dim": 16,
}


def test_sizes_without_a_name_are_written_by_their_numbers(tmp_path):
    config = model(paligemma_variant="dummy", action_expert_variant=SMALL)
    found = written(tmp_path, config, stats())["config.json"]
    assert (found["paligemma_variant"], found["action_expert_variant"]) == ("dummy", SMALL)
    assert variants.size(found["action_expert_variant"]) == config.action_expert_variant


def test_low_rank_variants_are_called_what_they_become(tmp_path):
    config = model(paligemma_variant="gemma_2b_lora", action_expert_variant="gemma_300m_lora")
    found = written(tmp_path, config, stats())["config.json"]
    assert found["paligemma_variant"] == "gemma_2b"
    assert found["action_expert_variant"] == "gemma_300m"


@pytest.mark.parametrize(
    ("config", "found", "other", "message"),
    [
        (model("pi05"), stats(quantiles=False), {}, r"'actions' have no q01 and no q99"),
        (model(), stats(quantiles=False), {"quantiles": True}, r"have no q01 and no q99"),
        (model(), {"state": stats()["state"]}, {}, r"no 'actions', only \['state'\]"),
        (model(), {"actions": stats()["actions"]}, {}, r"no 'state', only \['actions'\]"),
        (model(action_dim=1), stats(), {}, r"'actions' have 2 dimensions, the model has 1"),
        (model(proprio_dim=2), stats(), {}, r"'state' have 3 dimensions, the model has 2"),
        (model(), stats(), {"dtype": "float16"}, r"LeRobot knows .*float32, not 'float16'"),
        (model(variant="open_pi_zero"), stats(), {}, r"variant='open_pi_zero'"),
        (model(expert_rope_base=100.0), stats(), {}, r"expert_rope_base=100.0, only with 10000.0"),
        (model(), stats(), {"cameras": {"front": "a"}}, r"'front', the model's are base_0_rgb, "),
        (
            model(),
            stats(),
            {"cameras": dict.fromkeys(OPENPI_CAMERAS[:2], "top")},
            r"'base_0_rgb' and 'left_wrist_0_rgb' both have .* 'observation.images.top'",
        ),
    ],
)
def test_what_lerobot_cannot_express_is_named_before_anything_is_written(
    tmp_path, config, found, other, message
):
    with pytest.raises(ValueError, match=message):
        written(tmp_path, config, found, **other)
    assert not list(tmp_path.iterdir())


# OpenPI


def test_openpis_config(tmp_path):
    pretrained.write_openpi(tmp_path, model("pi05", action_horizon=10), "bfloat16")
    assert contents(tmp_path) == {
        "config.json": {
            "action_dim": 32,
            "action_horizon": 10,
            "paligemma_variant": "gemma_2b",
            "action_expert_variant": "gemma_300m",
            "precision": "bfloat16",
        }
    }


@pytest.mark.parametrize(
    ("config", "dtype", "message"),
    [
        (model(), "float16", "OpenPI knows .* not 'float16'"),
        (model(variant="open_pi_zero"), "float32", "OpenPI has no policy with variant"),
        (model(time_max_period=2.0), "float32", "time_max_period=2.0, only with 4.0"),
    ],
)
def test_what_openpi_cannot_express_is_named(tmp_path, config, dtype, message):
    with pytest.raises(ValueError, match=message):
        pretrained.write_openpi(tmp_path, config, dtype)
    assert not list(tmp_path.iterdir())
