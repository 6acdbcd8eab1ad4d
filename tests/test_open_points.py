"The page of open points: its table, what it makes of runs with another choice, and what the batch runs for it."

import pandas as pd
import pytest

from heed_nb.batch import ordered, run_parameters, run_scale
from heed_nb.conditions import BENCHMARKS, FINE_GRAINED, differing
from heed_nb.pages import PAGES, Run, RunPlan, choices, open_points
from heed_nb.runs import read_runs
from heed_nb.scales import load_scale
from test_results import ROOT, evaluated, notebook

BUDGET = 3000


def scored(fine, reasoning):
    return {key: fine if key in FINE_GRAINED else reasoning for key in BENCHMARKS}


def page(folder, **given):
    "The Markdown and the CSV."
    notebook(ROOT, "open_points", scale="smoke", runs=str(folder / "runs"), out=str(folder / "out"), **given)
    return (folder / "out/tables/open_points.md").read_text(), pd.read_csv(folder / "out/tables/open_points.csv")


def test_without_runs_the_table_stands_alone_and_says_what_was_not_tried(tmp_path):
    text, table = page(tmp_path)
    assert all(f"| {row.point}" in text for row in open_points().itertuples()) and len(open_points()) == 27
    assert "No choice was tried" in text and all(f"`{name}` not tried" in text for name in choices())
    assert "Not tried: `" in text and table.empty and "measured" not in text


def test_a_choice_is_paired_by_seed_budget_and_questions(tmp_path):
    runs, visual = tmp_path / "runs", "normalize_over=visual"
    of_choice = {0: scored(61, 99), 1: scored(57, 99), 2: scored(90, 99)}
    default = {0: scored(60, 98.5), 1: scored(53, 98.5), 3: scored(10, 98.5)}
    forced = {"C3-forced": {0: scored(20, 40)}, "C3": {0: scored(50, 40)}}
    evaluated(runs, {f"C4-{visual}": of_choice, "C4": default} | forced, BUDGET)
    evaluated(runs, {"C4-init=mamba": {0: scored(1, 1)}}, 2 * BUDGET)
    evaluated(runs, {"C4-reduce=max": {0: scored(1, 1)}}, BUDGET, questions=7)
    text, table = page(tmp_path, choices=list(choices()), seeds=[0, 1, 2, 3])
    at = table.set_index(["choice", "row"])
    assert set(table.choice) == {visual, "condition=C3-forced"}
    row = at.loc[(visual, "fine_grained")]
    assert (row["n"], row["mean"], row["ahead"]) == (2, 2.5, 2) and row["se"] == pytest.approx(1.5)  # of 1 and 4
    assert "+2.50 ± 1.50 (n=2)" in text and "**+0.50 ± 0.00** (n=2)" in text
    row = at.loc[("condition=C3-forced", "fine_grained")]
    assert (row["a"], row["b"], row["mean"], row["n"]) == ("C3-forced", "C3", -30, 1) and pd.isna(row["se"])
    assert "`init=mamba` not tried; `init=identity` not tried" in text
    assert "`reduce=max`" in text.partition("Not tried: ")[2]
    assert page(tmp_path, seeds=[0, 1])[1].choice.unique().tolist() == [visual]


def test_runs_with_a_choice_are_no_other_tables(tmp_path):
    evaluated(tmp_path, {"C4": {0: 60}, "C4-temper=0.5": {0: 1}}, BUDGET)
    assert [run["name"] for run in read_runs(tmp_path)] == ["C4-seed0-budget3000"]


def test_an_unknown_choice_is_refused(tmp_path):
    message = "^unknown choice 'init=warm' in open_points of scale smoke; one of reduce="
    with pytest.raises(ValueError, match=message):
        page(tmp_path, choices=["init=warm"])
    assert not (tmp_path / "out").exists()


def test_what_a_choice_changes_is_what_its_name_says():
    toy = load_scale("toy")
    for name, choice in choices().items():
        changed = load_scale("toy", choice.overrides)
        if not choice.overrides:
            assert differing(choice.condition, choice.baseline) == {"teacher_forced"}
            continue
        key = name.partition("=")[0]
        before, after = (getattr(s if hasattr(s, key) else s.settings(), key) for s in (toy, changed))
        assert before != after and str(after) == name.partition("=")[2]


def test_the_batch_runs_what_a_scale_tries_beside_the_default():
    scale = load_scale("smoke", {"open_points": ["temper=0.5", "condition=C3-forced"], "side_seeds": [0, 4]})
    batch = RunPlan(scale)
    names = [run.name.removesuffix("-budget3000") for run in PAGES["open_points"].reads(batch)]
    assert names == [
        "C5-temper=0.5-seed0",
        "C5-seed0",
        "C5-temper=0.5-seed4",
        "C5-seed4",
        "C3-forced-seed0",
        "C3-seed0",
        "C3-forced-seed4",
        "C3-seed4",
    ]
    run = Run("C5", 0, BUDGET, choice="temper=0.5")
    assert run in ordered(batch) and ordered(batch)[-1].choice and run_scale(batch, run).train["temper"] == 0.5
    assert run_parameters(batch, run) == dict(
        scale="smoke",
        condition="C5",
        seed=0,
        token_budget=BUDGET,
        overrides={"train.temper": 0.5},
        out="outputs/smoke/runs/C5-temper=0.5-seed0-budget3000",
    )
    assert not PAGES["open_points"].reads(RunPlan(scale, ["C5"])) and run not in PAGES["claims"].reads(batch)
