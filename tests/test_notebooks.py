"Every notebook of the library runs from top to bottom, and leaves nothing behind."
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NAMES = sorted(p.name for p in (Path(__file__).resolve().parent.parent / "nbs").glob("*.ipynb"))


@pytest.fixture(scope="session")
def copy(tmp_path_factory, copy_of_repository):
    return copy_of_repository(tmp_path_factory.mktemp("repository"))


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name, copy, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(copy), os.environ.get("PYTHONPATH", "")]))
    before = {p for p in copy.rglob("*") if "__pycache__" not in p.parts}
    nb = nbformat.read(copy / "nbs" / name, as_version=4)
    NotebookClient(nb, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(copy / "nbs")}}).execute()
    left = {p for p in copy.rglob("*") if "__pycache__" not in p.parts} - before
    assert not left, f"{name} leaves {sorted(str(p.relative_to(copy)) for p in left)}"
