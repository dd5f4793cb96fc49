"""Notebooks: they run as they are, and are kept without what they print."""

import pathlib

import nbformat
import pytest

from tests import commands

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "experiments/notebooks").glob("*.ipynb"))
PICTURES = {"look_inside.ipynb": 9, "mix_and_look.ipynb": 3, "values_along_an_episode.ipynb": 3}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_is_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_runs_and_draws(path, tmp_path, monkeypatch):
    """In the folder it lies in, in a kernel of its own, as with jupyter."""
    from nbconvert.preprocessors import ExecutePreprocessor

    monkeypatch.setenv("XLA_FLAGS", commands.ONE_DEVICE["XLA_FLAGS"])
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # and no one's profile
    notebook = nbformat.read(path, as_version=4)
    ExecutePreprocessor(timeout=300, kernel_name="python3").preprocess(
        notebook, {"metadata": {"path": str(path.parent)}}
    )
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", ())]
    assert [o for o in outputs if o.output_type == "error"] == []
    assert sum("image/png" in o.get("data", {}) for o in outputs) == PICTURES[path.name]
