"""Fingerprints, leaks of validation episodes, and distances between inputs in words."""

import shutil

import numpy as np
import pytest

from policymix.checkpoints import assets, provenance, store


def _save(path, seed=0, episodes=None):
    rng = np.random.default_rng(seed)
    store.save_params({"w": rng.standard_normal(300).astype(np.float32)}, path)
    if episodes is not None:
        record = [{"fingerprint": "f", "episodes": episodes}]
        assets.write_episodes(path / "assets" / "robot" / assets.EPISODES, record)
    return str(path)


def test_a_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path):
    one, two = _save(tmp_path / "one"), _save(tmp_path / "two", seed=1)
    shutil.copytree(one, tmp_path / "copy")
    assert provenance.fingerprint(one) == provenance.fingerprint(str(tmp_path / "copy"))
    assert provenance.fingerprint(one) != provenance.fingerprint(two)
    data = [p for p in (tmp_path / "copy/params").rglob("*") if p.is_file()]
    largest = max(data, key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert provenance.fingerprint(one) != provenance.fingerprint(str(tmp_path / "copy"))


def test_validation_episodes_among_the_training_episodes_are_told(tmp_path):
    leaky = _save(tmp_path / "leaky", episodes=[1, 2, 3])
    clean = _save(tmp_path / "clean", episodes=[7])
    unknown = _save(tmp_path / "unknown")
    meta = {"fingerprint": "f", "episodes": [2, 3, 4]}
    (sentence,) = provenance.leaks([leaky, clean, unknown], meta)
    assert sentence.startswith(f"{leaky} was trained on 2 of the 3 validation episodes (2, 3)")
    assert provenance.leaks([leaky], meta | {"fingerprint": "another dataset"}) == []
    assert provenance.leaks([leaky], {}) == []


def _geometry(vectors, base=0):
    vectors = np.asarray(vectors, float)
    apart = vectors - vectors[0]
    return provenance.geometry(apart @ apart.T, float(vectors[0] @ vectors[0]), base=base)


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        ([[1, 0, 0], [1, 0, 0]], "at least two inputs do not differ anywhere"),
        ([[1, 0, 0], [1, 1e-5, 0]], "nearly the same model"),
        ([[1, 0, 0], [-1, 0, 0]], "different ancestors"),
        ([[1, 0, 0], [1, 0.1, 0], [1, 0.2, 0]], "they learned the same"),
        ([[1, 0, 0], [1, 0.1, 0], [1, 0, 0.1]], "they learned unrelated things"),
        ([[1, 0, 0]], "nothing to compare"),
    ],
)
def test_geometry_says_in_words_what_it_means(vectors, words):
    assert words in _geometry(vectors)["meaning"]


def test_without_a_base_there_are_no_task_vectors():
    found = _geometry([[3, 4], [0, 0]], base=None)
    assert found["cosine"] is None
    np.testing.assert_allclose(found["distance"], [[0, 5], [5, 0]])
    np.testing.assert_allclose(found["relative_distance"], [[0, 1], [1, 0]])
