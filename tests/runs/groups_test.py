"""Coefficients of their own for vision, language, the action expert and the projections."""

import json

import numpy as np
import pytest

from configs import common
from policymix import trees
from policymix.checkpoints import keymaps, safetensors, store
from policymix.runs import mix
from tests import oracle
from tests.runs.mix_support import VALIDATION, debug_config

COEFFICIENTS = {
    "vision": (1.0, 0.0),
    "action_expert": (0.0, 1.0),
    "language": (0.5, 0.5),
    "projections": (3.0, 1.0),
}


def expected(coefficients, which):
    """Computed leaf by leaf from `coefficients` by group name."""
    flats = [trees.flatten(oracle.params("pi0", w)) for w in which]
    group_of = trees.match([(r, n) for n, r in keymaps.GROUPS.items()], list(flats[0]), what="x")
    found = {}
    for path in flats[0]:
        c = np.array(coefficients[group_of[path]])
        found[path] = sum(k * flat[path] for k, flat in zip(c / c.sum(), flats, strict=True))
    return found


def assert_close(path, wanted):
    for name, leaf in trees.flatten(store.load_params(path)).items():
        np.testing.assert_allclose(leaf, wanted[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("torch", [False, True])
def test_manual_coefficients_by_group(torch, request_for, tmp_path):
    config = common.get_config()
    config.mix.groups = tuple(keymaps.GROUPS)
    request = request_for("var1", "var2", coefficients=COEFFICIENTS)
    if torch:  # the same names select the same parameters under PyTorch's names
        config.mix.norm_stats = str(oracle.step("pi0", "var3") / "assets/fake_robot")
        for which in ("var1", "var2"):
            safetensors.save_params(oracle.params("pi0", which), tmp_path / which, "lerobot")
        checkpoints = tuple(str(tmp_path / which) for which in ("var1", "var2"))
        request = mix.Request(checkpoints, tmp_path / "out", coefficients=COEFFICIENTS)
    mix.mix(config, request)
    assert_close(tmp_path / "out", expected(COEFFICIENTS, ("var1", "var2")))
    told = json.loads((tmp_path / "out" / "mix.json").read_text())
    assert told["groups"] == keymaps.GROUPS
    assert told["coefficients"]["projections"] == [0.75, 0.25]


def test_merge_ratios_by_group(request_for, singles, tmp_path):
    ratios = {"vision": (1.0,), "action_expert": (0.0,), "language": (0.7,), "projections": (0.25,)}
    config = common.get_config()
    config.mix.groups = tuple(keymaps.GROUPS)
    mix.mix(config, request_for("var1", base=singles["base"], merge_ratios=ratios))
    c = {name: (r, 1 - r) for name, (r,) in ratios.items()}
    assert_close(tmp_path / "out", expected(c, ("base", "var1")))


def test_groups_that_match_nothing_are_told_before_any_work(request_for, tmp_path):
    config = common.get_config()
    config.mix.groups = ("vison=PaliGemma/imgs/.*", "rest=.*")
    request = request_for("var1", "var2", coefficients={"vison": (1, 1), "rest": (1, 1)})
    with pytest.raises(ValueError, match="the rule 'PaliGemma/imgs/.*' matches no parameter"):
        mix.mix(config, request)
    assert not (tmp_path / "out").exists()


METHODS = ["gradient_descent", "bfgs", pytest.param("gauss_newton", marks=pytest.mark.slow)]


@pytest.mark.parametrize("method", METHODS)
def test_coefficients_are_learned_by_group(method, request_for, tmp_path):
    config = debug_config(num_iterations=3)
    config.mix.groups = ("vision", "action_expert", "rest=.*")
    request = request_for("var1", "var2", method=method, validation=VALIDATION)
    report = mix.mix(config, request)
    c = report["coefficients"]
    assert list(c) == ["vision", "action_expert", "rest"]
    assert all(sum(one) == pytest.approx(1) for one in c.values())
    assert len({tuple(one) for one in c.values()}) > 1
    found = {**c, "language": c["rest"], "projections": c["rest"]}
    assert_close(tmp_path / "out", expected(found, ("var1", "var2")))


def test_skills_are_merged_one_after_another(request_for, singles, tmp_path):
    mix.mix(common.get_config(), request_for("var1", "var2", base=singles["base"],
                                             merge_ratios=(0.6,)))  # fmt: skip
    flats = [trees.flatten(oracle.params("pi0", w)) for w in ("base", "var1", "var2")]
    first = {p: 0.6 * flats[0][p] + 0.4 * flats[1][p] for p in flats[0]}
    assert_close(tmp_path / "out", {p: 0.6 * first[p] + 0.4 * flats[2][p] for p in first})
