import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policymix.data import statistics


def random(seed, length, dtype=np.float64):
    return (np.random.default_rng(seed).normal(size=(length, 3)) * 50).astype(dtype)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 1000))
def test_moments_of_parts_are_those_of_the_whole(lengths, seed):
    parts = [random(seed + k, length) for k, length in enumerate(lengths)]
    found = statistics.aggregate([statistics.of_numbers(part) for part in parts])
    whole = statistics.of_numbers(np.concatenate(parts))
    assert tuple(found) == statistics.NAMES
    for name in statistics.MOMENTS:
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-9, atol=1e-9, err_msg=name)


def test_the_envelope_of_quantiles_is_the_one_of_lerobot_06():
    values = [random(k, 2000) + 40 * k for k in range(3)]
    parts = [statistics.of_numbers(part) for part in values]
    found, whole = statistics.aggregate(parts), statistics.of_numbers(np.concatenate(values))
    assert (found["q01"] < whole["q01"]).all()
    assert (found["q99"] > whole["q99"]).all()
    for name in ("q01", "q10", "q50"):
        np.testing.assert_array_equal(found[name], np.min([p[name] for p in parts], 0))
    for name in ("q90", "q99"):
        np.testing.assert_array_equal(found[name], np.max([p[name] for p in parts], 0))
    del parts[1]["q10"]
    assert "q10" not in statistics.aggregate(parts)


def histogram_of(images):
    return statistics.of_histogram(sum(map(statistics.histogram, images)), len(images))


def test_moments_of_pictures_are_pooled_exactly():
    images = np.random.default_rng(0).integers(0, 256, (9, 6, 8, 3), dtype=np.uint8)
    found = statistics.aggregate([histogram_of(images[:2]), histogram_of(images[2:])])
    whole = histogram_of(images)
    for name in statistics.MOMENTS:
        assert found[name].shape == ((1,) if name == "count" else (3, 1, 1))
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-12)


def test_kinds_of_numbers_are_kept():
    parts = [statistics.of_numbers(np.array(v)) for v in ([1, 2, 3], [-4, 9])]
    found = statistics.aggregate(parts)
    assert (found["min"].dtype, found["min"].tolist()) == (np.int64, [-4])
    bools = [statistics.of_numbers(np.array(v)) for v in ([True, True], [False])]
    found = statistics.aggregate(bools)
    assert (found["min"].tolist(), found["max"].tolist()) == ([False], [True])
    np.testing.assert_allclose(found["mean"], 2 / 3)


def pictures(**changes):
    stats = {name: np.full((3, 1, 1), 0.25).tolist() for name in statistics.NAMES}
    return stats | {"count": [4], "max": np.ones((3, 1, 1)).tolist()} | changes


def test_stored_statistics_of_pictures_are_taken():
    found = statistics.of_pictures(pictures(), "d")
    assert tuple(found) == statistics.NAMES
    assert found["mean"].shape == (3, 1, 1)
    assert tuple(statistics.of_pictures(pictures(q01=None), "d")) == statistics.MOMENTS
    black = pictures(**dict.fromkeys(("min", "max", "mean", "std"), np.zeros((3, 1, 1))))
    assert statistics.of_pictures(black, "d")["std"].sum() == 0  # which is right


def by_lerobot_04(images):
    """The deviation as LeRobot 0.4 computes it, from squares that are kept in bytes."""
    found = histogram_of(images)
    squares = (images**2).astype(float).mean((0, 1, 2)).reshape(3, 1, 1) / 255**2  # modulo 256
    return found | {"std": np.sqrt(np.maximum(0, squares - found["mean"] ** 2))}


@pytest.mark.parametrize("brightest", [12, 16, 25, 40, 120, 255])
def test_deviations_of_squares_in_bytes_are_not_believed(brightest):
    rng = np.random.default_rng(brightest)
    images = rng.integers(0, brightest + 1, (4, 32, 32, 3), dtype=np.uint8)
    right, wrong = histogram_of(images), by_lerobot_04(images)
    if brightest < 16:
        np.testing.assert_allclose(wrong["std"], right["std"])
        assert statistics.of_pictures(wrong, "d") is not None
    else:
        assert (np.abs(wrong["std"] / right["std"] - 1) > 1e-4).any()
        assert statistics.of_pictures(wrong, "d") is None
    bright = brightest > 25
    assert (statistics.of_pictures(right, "d") is not None) == (bright or brightest < 16)


@given(st.lists(st.booleans(), min_size=1, max_size=7))
def test_a_running_total_is_of_all_episodes(given):
    images = np.random.default_rng(0).integers(0, 256, (2 * len(given), 4, 4, 3), dtype=np.uint8)
    total = statistics.Total()
    for part, known in zip(np.split(images, len(given)), given, strict=True):
        counts = sum(map(statistics.histogram, part))
        one = statistics.Pictures(counts, len(part))
        total.add(statistics.Pictures(known=one.stats()) if known else one)
    found, whole = total.stats(), histogram_of(images)
    for name in statistics.MOMENTS:
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-12)
    if not any(given):
        np.testing.assert_equal(found, whole)


@pytest.mark.parametrize(
    "changes", [{"std": np.zeros((3, 1, 1))}, {"mean": None}, {"count": [0]}, {"count": None}]
)
def test_stored_statistics_that_are_worth_nothing(changes):
    assert statistics.of_pictures(pictures(**changes), "d") is None
    assert statistics.of_pictures({}, "d") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mean": [0.5, 0.5, 0.5]},
            r"d: statistic 'mean' is \[0.5, 0.5, 0.5\], expected .*3, 1, 1",
        ),
        ({"max": np.full((3, 1, 1), np.inf)}, r"d: statistic 'max' is .* expected finite"),
        ({"count": [[4]]}, r"d: statistic 'count' is \[\[4\]\], expected .* shape \[1\]"),
        ({"min": "a"}, r"d: statistic 'min' is a, expected"),
    ],
)
def test_stored_statistics_that_are_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        statistics.of_pictures(pictures(**changes), "d")


@pytest.mark.parametrize(("num_frames", "count"), [(1, 1), (80, 80), (400, 100), (5000, 594)])
def test_sampled_frames_are_those_of_lerobot(num_frames, count):
    found = statistics.sampled(num_frames)
    assert (len(found), found[0], found[-1]) == (count, 0, num_frames - 1)
    expected = np.round(np.linspace(0, num_frames - 1, count)).astype(int).tolist()
    assert found.tolist() == expected
