"The requirements come from settings.ini, so that they stand in one place."

from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
lists = {name: value.split() for name, value in settings["DEFAULT"].items() if name.endswith("requirements")}

setup(
    install_requires=lists["requirements"],
    extras_require={extra: lists[f"{extra}_requirements"] for extra in ("dev", "eval", "posttrain", "gpu")},
)
