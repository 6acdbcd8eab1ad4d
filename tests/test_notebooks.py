"Every notebook of the library runs from top to bottom, and leaves nothing behind."

import multiprocessing
import os
from pathlib import Path

import matplotlib.image
import nbformat
import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import Markdown
from traitlets.config import Config

import heed_nb.evaluate  # noqa: F401  loaded once, so that every notebook begins with it
import heed_nb.trainer  # noqa: F401

NOTEBOOKS = Path(__file__).resolve().parent.parent / "nbs"
NAMES = sorted(p.name for p in NOTEBOOKS.glob("*.ipynb"))


@pytest.fixture(scope="session")
def copy(tmp_path_factory, copy_of_repository):
    return copy_of_repository(tmp_path_factory.mktemp("repository"))


def run(path):
    "The notebook's code cells, in a shell of its own."
    os.chdir(path.parent)
    torch.set_num_threads(1)  # here, before threads race to replace the pool that a fork has lost
    shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}))
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            done = shell.run_cell(cell.source)
            done.raise_error()
            if isinstance(done.result, Markdown):  # the front page's sentences and tables
                assert cell.outputs[-1].data["text/markdown"] == done.result.data, (
                    f"run nbs/{path.name}, then make readme"
                )


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name, copy):
    before = {p for p in copy.rglob("*") if "__pycache__" not in p.parts}
    pictures = {p: p.stat().st_mtime_ns for p in (copy / "nbs" / "images").iterdir()}
    process = multiprocessing.get_context("fork").Process(target=run, args=(copy / "nbs" / name,))
    process.start()
    process.join()
    assert process.exitcode == 0, f"{name} fails"
    left = {p for p in copy.rglob("*") if "__pycache__" not in p.parts} - before
    assert not left, f"{name} leaves {sorted(str(p.relative_to(copy)) for p in left)}"
    for picture in (p for p, time in pictures.items() if p.stat().st_mtime_ns != time):  # drawn again
        drawn, committed = (matplotlib.image.imread(path) for path in (picture, NOTEBOOKS / "images" / picture.name))
        np.testing.assert_allclose(drawn, committed, atol=4 / 255, err_msg=f"run nbs/{name}; it changes {picture.name}")
