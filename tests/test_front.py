"The front page is short and its links lead somewhere."
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_front_page_is_short_and_has_one_title():
    assert len(README.split()) <= 900
    assert re.findall(r"^# .*", re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S), re.M) == ["# heed_nb"]
    assert README.index("![") < README.index("## ")


def test_links_of_the_front_page_lead_to_files_and_to_every_notebook():
    links = {target for target in re.findall(r"\]\(([^)#\s]+)", README) if "://" not in target}
    assert not [target for target in links if not (ROOT / target).exists()]
    assert {f"nbs/{path.name}" for path in (ROOT / "nbs").glob("[0-9]*.ipynb")} <= links


def test_front_page_names_the_families():
    for path in (ROOT / "heed_nb" / "configs").glob("*.json"):
        assert path.stem.removesuffix("-8b") in README.lower()
