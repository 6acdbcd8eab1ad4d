import os
import shutil
import subprocess
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes side by side
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # nothing here needs a network

LONG = ("batch", "families", "trainer", "evaluate")  # files that are begun first; `make check` leaves them out


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    "The tests of a file share a process and its fixtures. Notebooks come last, each wherever a process is free."
    rank = {name: place for place, name in enumerate(LONG)} | {"notebooks": len(LONG) + 1}
    file = lambda item: item.path.stem.removeprefix("test_")
    for item in items:
        if file(item) in rank:
            item.add_marker("slow")
        if file(item) != "notebooks":
            item.add_marker(pytest.mark.xdist_group(file(item)))
    items.sort(key=lambda item: rank.get(file(item), len(LONG)))


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
