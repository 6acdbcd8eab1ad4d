"The page of open points: its table, what it makes of runs with another choice, and what the batch runs for it."

import pandas as pd
import pytest

from heed_nb.batch import ordered, run_notebook, run_parameters, run_scale
from heed_nb.conditions import BENCHMARKS, FINE_GRAINED, differing
from heed_nb.pages import PAGES, Batch, Run, choices, open_points
from heed_nb.scales import load_scale
from heed_nb.runs import read_runs, write_run

PAGE = "nbs/paper/open_points.ipynb"
BUDGET = 3000


@pytest.fixture(autouse=True)
def at_root(root, monkeypatch):
    monkeypatch.chdir(root)


def evaluated(runs, run, fine, reasoning, questions=50):
    scores = {key: fine if key in FINE_GRAINED else reasoning for key in BENCHMARKS}
    write_run(
        runs / run.name / "evaluate.json", "evaluate", {}, dict(scores=scores, n=dict.fromkeys(BENCHMARKS, questions))
    )


def page(tmp_path, **given):
    run_notebook(
        PAGE,
        dict(scale="smoke", runs=str(tmp_path / "runs"), out=str(tmp_path / "out"), **given),
        log=tmp_path / "log.ipynb",
    )
    return (tmp_path / "out/tables/open_points.md").read_text(), pd.read_csv(tmp_path / "out/tables/open_points.csv")


def test_without_runs_the_table_stands_alone_and_says_what_was_not_tried(tmp_path):
    text, table = page(tmp_path)
    assert all(f"| {row.point}" in text for row in open_points().itertuples()) and len(open_points()) == 27
    assert "No choice was tried" in text and all(f"`{name}` not tried" in text for name in choices())
    assert "Not tried: `" in text
    assert table.empty and "measured" not in text


def test_a_choice_is_paired_by_seed_budget_and_questions(tmp_path):
    runs, visual = tmp_path / "runs", "normalize_over=visual"
    for seed, with_choice, default in ((0, 61, 60), (1, 57, 53), (2, 90, None), (3, None, 10)):
        if with_choice:
            evaluated(runs, Run("C4", seed, BUDGET, choice=visual), with_choice, 99)
        if default:
            evaluated(runs, Run("C4", seed, BUDGET), default, 98.5)
    evaluated(runs, Run("C4", 0, 2 * BUDGET, choice="init=mamba"), 1, 1)  # of another budget
    evaluated(runs, Run("C4", 0, BUDGET, choice="reduce=max"), 1, 1, questions=7)  # asked other questions
    evaluated(runs, Run("C3-forced", 0, BUDGET), 20, 40)
    evaluated(runs, Run("C3", 0, BUDGET), 50, 40)
    text, table = page(tmp_path, choices=list(choices()), seeds=[0, 1, 2, 3])
    assert set(table.choice) == {visual, "condition=C3-forced"}
    row = table[(table.choice == visual) & (table.row == "fine_grained")].iloc[0]
    assert (row["n"], row["mean"], row["ahead"]) == (2, 2.5, 2) and row["se"] == pytest.approx(1.5)  # of 1 and 4
    assert "+2.50 ± 1.50" in text and "+0.50 ± 0.00" in text
    forced = table[(table.choice == "condition=C3-forced") & (table.row == "fine_grained")].iloc[0]
    assert (forced["a"], forced["b"], forced["mean"], forced["n"]) == ("C3-forced", "C3", -30, 1) and pd.isna(
        forced["se"]
    )
    assert (
        "`init=mamba` not tried; `init=identity` not tried" in text and "Not tried: `reduce=mean`, `reduce=max`" in text
    )
    assert page(tmp_path, seeds=[0, 1])[1].choice.unique().tolist() == [visual]


def test_runs_with_a_choice_are_no_other_tables(tmp_path):
    evaluated(tmp_path, Run("C4", 0, BUDGET), 60, 99)
    evaluated(tmp_path, Run("C4", 0, BUDGET, choice="temper=0.5"), 1, 1)
    assert [run["name"] for run in read_runs(tmp_path)] == ["C4-seed0-budget3000"]


def test_an_unknown_choice_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="^unknown choice 'init=warm' in open_points of scale smoke; one of reduce=mean, "
    ):
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
        values = [
            getattr(scale, key) if hasattr(scale, key) else getattr(scale.settings(), key) for scale in (toy, changed)
        ]
        assert values[0] != values[1] and str(values[1]) == name.partition("=")[2]


def test_the_batch_runs_what_a_scale_tries_beside_the_default():
    scale = load_scale("smoke", {"open_points": ["temper=0.5", "condition=C3-forced"], "side_seeds": [0, 4]})
    batch = Batch(scale)
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
    assert not PAGES["open_points"].reads(Batch(scale, ["C5"])) and run not in PAGES["claims"].reads(batch)
