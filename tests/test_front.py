"The front page is short, its links lead somewhere, and its ten lines of Python run."

import json
import re
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

import tiny

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)


def block(language):
    "The front page's only code block in a language."
    (code,) = [text for name, text in BLOCKS if name == language]
    return code


def test_front_page_is_short_and_has_one_title():
    assert len(README.split()) <= 900
    assert re.findall(r"^# .*", re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S), re.M) == ["# heed_nb"]
    assert README.index("![") < README.index("## ")


def test_links_of_the_front_page_lead_to_files_and_to_every_notebook():
    links = {target for target in re.findall(r"\]\(([^)#\s]+)", README) if "://" not in target}
    assert not [target for target in links if not (ROOT / target).exists()]
    assert {f"nbs/{path.name}" for path in (ROOT / "nbs").glob("[0-9]*.ipynb")} <= links


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "nbs/69_known_gaps.ipynb"])
def test_commands_name_targets_and_files_that_exist(name):
    spans = re.findall(r"`([^`\n]+)`", (ROOT / name).read_text(encoding="utf-8"))
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert {match[1] for span in spans if (match := re.match(r"make ([a-z-]+)", span))} <= set(targets)
    paths = re.findall(r"\b(?:nbs|tests|workflow|benchmarks|docs)/[\w./-]*\w", "\n".join(spans))
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_front_page_names_the_families():
    for path in (ROOT / "heed_nb" / "configs").glob("*.json"):
        assert path.stem.removesuffix("-8b") in README.lower()


@pytest.mark.filterwarnings("ignore")
def test_ten_lines_convert_distil_and_evaluate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.teacher("qwen3_vl").save_pretrained("path/to/model")
    tiny.processor("qwen3_vl").save_pretrained("path/to/model")
    row = json.loads(block("json"))
    for name in row["images"]:
        tiny.page(64, 48).save(name)
    for name in ("train.jsonl", "held_out.jsonl"):
        Path(name).write_text(4 * (json.dumps(row) + "\n"))

    code, budgets = re.subn(r"token_budget=[\d_]+", "token_budget=2000", block("python"))
    assert budgets == 1 and len(code.strip().splitlines()) <= 11
    exec(code, {})
    scores = eval(capsys.readouterr().out.strip().splitlines()[-1])
    assert scores and all(0 <= score <= 100 for score in scores.values())

    (loading,) = re.findall(r"`(AutoModelForImageTextToText[^`]+)`", README)
    student = eval(loading, {"AutoModelForImageTextToText": AutoModelForImageTextToText})
    assert student.config.text_config.layer_types.count("linear_attention") == 3
