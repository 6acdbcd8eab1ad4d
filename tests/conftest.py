import os
import shutil
import subprocess
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes side by side
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # nothing here needs a network

# Files whose tests take minutes, the longest first: they are begun first, and `make check` leaves them out.
LONG = ("batch", "many", "families", "toy_teachers", "trainer", "evaluate", "failures", "notebooks")


def pytest_collection_modifyitems(items):
    "A file's tests share a process and its fixtures; notebooks are run one by one, wherever a process is free."
    rank = {name: place for place, name in enumerate(LONG)}
    for item in items:
        name = item.path.stem.removeprefix("test_")
        if name in LONG:
            item.add_marker("slow")
        if name != "notebooks":
            item.add_marker(pytest.mark.xdist_group(name))
    items.sort(key=lambda item: rank.get(item.path.stem.removeprefix("test_"), len(LONG)))


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
