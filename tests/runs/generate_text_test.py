"""Text from files: a tiny PaliGemma as Hugging Face writes it, a picture, a tokenizer."""

import shutil

import numpy as np
import pytest
from PIL import Image

from configs import common, pi0_libero
from policymix import trees
from policymix.checkpoints import safetensors, store
from policymix.data import pictures
from policymix.models import text
from policymix.runs import generate_text, policies
from tests import oracle, small_sentencepiece
from tests.models import text_test


@pytest.fixture(scope="module")
def paligemma(tmp_path_factory):
    """A directory as `hf download` leaves it, with tokenizer.model, and a picture beside it."""
    folder = tmp_path_factory.mktemp("paligemma")
    safetensors.write(folder, text_test.WEIGHTS)
    small_sentencepiece.train(folder)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(folder / "photo.png")
    return folder


def request(folder, **changes):
    given = {
        "checkpoint": str(folder),
        "image": str(folder / "photo.png"),
        "prompt": "pick up the red cup",
        "max_new_tokens": 6,
        "dtype": "float32",
    }
    return generate_text.Request(**given | changes)


def said(folder, **changes):
    return generate_text.generate(common.get_config(), request(folder, **changes))


def test_the_text_is_what_the_model_generates(paligemma, monkeypatch, capsys):
    found, original = {}, text.generate

    def generate(model, params, observation, **settings):
        found.update(model=model, observation=observation, settings=settings)
        found["text"] = original(model, params, observation, **settings)
        return found["text"]

    monkeypatch.setattr(generate_text.text, "generate", generate)
    answer = said(paligemma)
    coder = generate_text._tokenizer("bytes", str(paligemma))
    tokens, kept = (np.asarray(x)[0] for x in found["text"])
    assert answer == coder.decode(tokens[kept])
    assert answer in capsys.readouterr().out
    assert found["settings"]["eos_id"] == coder.eos_id == 1
    observation, length = found["observation"], found["model"].max_token_len
    prompt, mask = coder.encode(["pick up the red cup\n"])
    assert mask.sum() == length
    np.testing.assert_array_equal(observation.prompt_tokens, prompt[:, :length])
    assert observation.prompt_mask.all()
    assert observation.images["image"].shape == (1, 28, 28, 3)
    assert found["model"].vocab_size == small_sentencepiece.VOCAB_SIZE  # 56 rows fewer


def test_pictures_matter_and_may_be_left_out(paligemma):
    with_picture, without = (said(paligemma, image=i) for i in (str(paligemma / "photo.png"), ""))
    assert with_picture != without


def test_a_temperature_draws_by_the_seed(paligemma):
    hot = [said(paligemma, temperature=2.0, seed=s) for s in (0, 0, 1, 2)]
    assert hot[0] == hot[1]
    assert len(set(hot)) > 1


def test_a_pi0_speaks_by_the_paligemma_within_it(paligemma, tmp_path):
    """Given its config, whose cameras and prompts are others, or not."""
    params = trees.flatten(oracle.params("pi0"))
    embedder = "PaliGemma/llm/embedder/input_embedding"
    store.save_params(trees.unflatten(params | {embedder: params[embedder][:50]}), tmp_path / "1")
    config = common.get_config()
    config.data.tokenizer = str(paligemma / "tokenizer.model")
    asked = request(paligemma, checkpoint=str(tmp_path / "1"), max_new_tokens=3)
    alone = generate_text.generate(config, asked)
    config.model = pi0_libero.get_config("debug").model
    assert generate_text.generate(config, asked) == alone
    config.model.siglip_depth = 1
    with pytest.raises(ValueError, match="siglip_depth is 2 there, None here"):
        generate_text.generate(config, asked)


def test_a_dry_run_reads_headers_alone(paligemma, monkeypatch, capsys):
    monkeypatch.setattr(generate_text.policies, "read_params", None)
    assert said(paligemma, dry_run=True) == ""
    assert "a PaliGemma without action expert of 32-wide" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "--max_new_tokens is 0; at least 1"),
        ({"temperature": -1.0}, "--temperature is -1.0; expected 0 or more"),
        ({"temperature": float("nan")}, "--temperature is nan"),
    ],
)
def test_numbers_that_cannot_be_are_refused(paligemma, changes, message):
    with pytest.raises(ValueError, match=message):
        said(paligemma, **changes)


def test_what_is_missing_is_named(paligemma, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere.png does not exist"):
        said(paligemma, image=str(tmp_path / "nowhere.png"))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="text.png cannot be read as a picture"):
        said(paligemma, image=str(tmp_path / "text.png"))

    def unreachable(url):
        raise ConnectionError(f"{url} cannot be reached")

    monkeypatch.setattr(generate_text.tokenizer.hub, "fetch", unreachable)
    shutil.copy(paligemma / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="PaliGemma's tokenizer is not in the cache"):
        said(tmp_path, image="")


def without(paligemma, folder, change):
    """The same checkpoint after a change of its parameters, with its tokenizer."""
    params = store.load_params(str(paligemma))
    change(params["PaliGemma"])
    store.save_params(params, folder / "changed")
    shutil.copy(paligemma / "tokenizer.model", folder / "changed")
    return str(folder / "changed")


def test_a_tokenizer_of_another_model_is_refused(paligemma, tmp_path):
    def rows(count):
        def change(tree):
            tree["llm"]["embedder"]["input_embedding"] = np.zeros((count, 32), np.float32)

        return without(paligemma, tmp_path / str(count), change)

    for count in (39, 40 + policies.VOCABULARY_PADDING + 1):
        with pytest.raises(ValueError, match=f"has {count} tokens, the tokenizer 40: it is anoth"):
            said(paligemma, checkpoint=rows(count))
    blank = without(paligemma, tmp_path / "none", lambda tree: tree["llm"].pop("embedder"))
    with pytest.raises(ValueError, match="has no language model with a vocabulary"):
        said(paligemma, checkpoint=blank)


def test_a_tokenizer_that_is_none_is_named(paligemma):
    config = common.get_config()
    config.data.tokenizer = str(paligemma)
    with pytest.raises(ValueError, match="expected paligemma, the path of a SentencePiece"):
        generate_text.generate(config, request(paligemma))


def test_a_model_without_eyes_says_so(paligemma, tmp_path):
    with pytest.raises(ValueError, match="has no vision tower: leave --image out"):
        said(paligemma, checkpoint=without(paligemma, tmp_path, lambda tree: tree.pop("img")))


def test_pictures_of_files_are_stretched(tmp_path):
    Image.new("RGBA", (10, 30), (255, 0, 0, 128)).save(tmp_path / "red.png")
    found = pictures.read_file(tmp_path / "red.png", (28, 56))
    assert (found.shape, found.dtype) == ((28, 56, 3), np.uint8)
    assert (found == [255, 0, 0]).all()
