import os
import shutil
import subprocess
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes side by side
for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # of `make test`; an inner make would print its folder
    os.environ.pop(name, None)
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # nothing here needs a network

# Files that are begun first, so that no process is left idle at the end; `make check` leaves them out.
LONG = ("batch", "notebooks", "families", "trainer", "evaluate")


def pytest_collection_modifyitems(items):
    rank = {f"test_{name}": place for place, name in enumerate(LONG)}
    for item in items:
        if item.path.stem in rank:
            item.add_marker("slow")
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def root():
    "The repository's folder."
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def copy_of_repository(root):
    "A function that copies what git tracks, or would track, into a folder and returns it."

    def copy(folder):
        listed = subprocess.run(
            ["git", "ls-files", "-coz", "--exclude-standard"], cwd=root, check=True, capture_output=True
        )
        for name in listed.stdout.decode().split("\0"):
            if (root / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / name, folder / name)
        return folder

    return copy
