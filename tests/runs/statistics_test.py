"""Statistics of what training sees, equal to those of all examples laid out in memory."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from policymix.data import lerobot, loader, writer
from policymix.runs import statistics
from policymix.transforms import compose, histograms, normalize

LENGTHS = (1, 9, 4, 30)


def vector(size):
    return {"dtype": "float32", "shape": [size], "names": None}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("statistics") / "d", np.random.default_rng(0)
    features = {"observation.state": vector(3), "action": vector(2)}
    with writer.Writer(path, fps=10, features=features) as opened:
        for length in LENGTHS:
            arrays = {k: rng.normal(size=(length, f["shape"][0])) for k, f in features.items()}
            opened.add_episode(arrays, "push")
    return path


@hypothesis.given(st.integers(1, 40), st.booleans())
@hypothesis.settings(deadline=None, max_examples=20)
def test_exact_statistics_are_those_of_all_examples(path, horizon, relative):
    adapt = compose.chain([compose.DeltaActions((True, False))] if relative else [])
    dataset = lerobot.open_dataset(path)
    chosen = [loader.ActionChunks(dataset, horizon, e) for e in ([3, 0], [1, 2])]
    found = statistics.of_chunks(chosen, adapt)
    examples = [adapt.apply(chunks.get(np.arange(len(chunks)))) for chunks in chosen]
    for key, size in (("state", 3), ("actions", 2)):
        values = np.concatenate([example[key].reshape(-1, size) for example in examples])
        values = values.astype(np.float64)
        np.testing.assert_allclose(found[key].mean, values.mean(0), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(found[key].std, values.std(0), rtol=1e-6)
        for name, q in (("q01", 0.01), ("q99", 0.99)):
            expected = np.quantile(values, q, axis=0)
            np.testing.assert_allclose(getattr(found[key], name), expected, rtol=1e-6, atol=1e-7)


def test_openpis_rule_reads_quantiles_off_its_histograms(path):
    chunks = loader.ActionChunks(lerobot.open_dataset(path), 5)
    found = statistics.of_chunks([chunks], compose.chain([]), "openpi")
    everything = chunks.get(np.arange(len(chunks)))
    for key in ("state", "actions"):
        expected = histograms.finish(histograms.update(None, everything[key]))
        assert normalize.difference({key: found[key]}, {key: expected}) is None
        exact = normalize.compute(everything[key])
        assert normalize.difference({key: found[key]}, {key: exact}) is not None


def test_another_rule_is_refused(path):
    chunks = loader.ActionChunks(lerobot.open_dataset(path), 5)
    with pytest.raises(ValueError, match="quantile_rule is 'histogram'; expected one of exact"):
        statistics.of_chunks([chunks], compose.chain([]), "histogram")
