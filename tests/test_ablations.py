"Tables 3, 8 and 9, App. A.8's curves and the picture of the pipeline, from runs made by hand and from the registry."

import re
import statistics
from dataclasses import replace

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy import stats

from heed_nb import conditions as registry
from heed_nb import pages
from heed_nb.conditions import CONDITIONS, RECIPES, Condition
from heed_nb.pages import PAGES, RunPlan
from heed_nb.paper_numbers import ABLATIONS, SWEEP, paper_table
from heed_nb.scales import load_scale
from test_results import ROOT, cell, notebook, page

# Table 8


def test_table_8_of_one_seed(tmp_path):
    ocr = {"C0": {0: 90}, "C4": {0: 60, 1: 99}, "-Residual": {0: 40}, "-Density": {0: 58}, "+LD": {0: 61}}
    text, lines, _ = page(tmp_path, "table_08", ocr, seeds=[0])
    assert [cell(text, "-Residual", column) for column in ("OCRBench v2", "Δ to C4")] == ["40.0", "**-20.0** (n=1)"]
    assert [cell(text, "C4 HEED", column) for column in ("OCRBench v2", "Δ to C4")] == ["60.0", ""]
    assert "*-2.5*" in next(line for line in text.splitlines() if line.startswith("| -Residual"))
    assert "**Missing**: +SL-seed0-budget2000, tau-0.25-seed0" in text
    line = lines["ocrbench_v2", "-Residual-C4"]
    assert (line["mean"], line["paper"], line["verdict"]) == ("-20.0", "-2.5", "behind")
    assert float(lines["fine_grained", "-Residual-C4"]["mean"]) == pytest.approx(-20 / 6, abs=1e-4)
    assert float(lines["reasoning", "-Density-C4"]["mean"]) == 0
    assert lines["ocrbench_v2", "+SL-C4"]["verdict"] == "not run"


def test_table_8_over_seeds_is_paired(tmp_path):
    given = {"C4": {0: 60, 1: 70, 2: 81}, "+SL": {0: 58.95, 1: 68.85, 3: 5}}
    text, lines, _ = page(tmp_path, "table_08", given, seeds=[0, 1, 2, 3], conditions=["C4", "+SL"])
    assert cell(text, "+SL", "Δ to C4") == "**-1.1 ± 0.1** (n=2)" and lines["ocrbench_v2", "+SL-C4"]["n"] == "2"
    assert cell(text, "+LD", "OCRBench v2") == "" and "*58.6*" in text


def test_heed_at_several_tau_and_beta(tmp_path):
    ocr = {"C4": {0: 60, 1: 70}, "tau-0.25": {0: 58}, "tau-1": {0: 61, 1: 73}, "beta-4": {0: 66}}
    text, lines, _ = page(tmp_path, "table_08", ocr, seeds=[0, 1], conditions=["C4", *SWEEP])
    ablations, _, sweep = text.partition("C4 at other temperatures")
    rows = [[word.strip() for word in line.split("|")[1:-1]] for line in sweep.splitlines() if line.startswith("|")]
    assert rows[0][:5] == ["", "τ", "β", "OCRBench v2", "Δ to C4"]
    assert [row[:5] for row in rows[2:]] == [
        ["tau-0.25", "0.25", "2", "58.0", "-2.0 (n=1)"],
        ["beta-1", "0.5", "1", "", ""],
        ["C4", "0.5", "2", "65.0 ± 7.1", ""],
        ["beta-4", "0.5", "4", "66.0", "+6.0 (n=1)"],
        ["tau-1", "1", "2", "67.0 ± 8.5", "+2.0 ± 1.0 (n=2)"],
    ]
    assert lines["ocrbench_v2", "tau-1-C4"]["mean"] == "2.0" and lines["ocrbench_v2", "tau-1"]["paper"] == ""
    assert "tau-1" not in ablations and cell(ablations, "-Density", "OCRBench v2") == ""


def test_the_papers_rows_are_those_of_the_registry():
    assert list(paper_table(8).index) == ["C0", "C4", *ABLATIONS]
    assert all(CONDITIONS[c].source == "Tab. 8" for c in ABLATIONS)
    masks = {round(100 * c.mask_share) for c in CONDITIONS.values() if c.mask_share}
    assert masks | {0} == set(paper_table("A.8").index)


# The recipes of Table 3


def test_recipes_that_ran_stand_beside_those_that_did_not(tmp_path):
    ocr = {"C0": {0: 90}, "C1": {0: 40, 1: 44}, "C4": {0: 60, 1: 62}, "LoLCATs": {0: 30}, "mmMamba": {0: 61, 1: 99}}
    text, lines, _ = page(tmp_path, "table_03_runs", ocr, seeds=[0, 1])
    for recipe, expected in {
        "LoLCATs": ["1 seed", "30.0", "**-30.0** (n=1)"],
        "C1: KD": ["2 seeds", "42.0 ± 2.8", "**-19.0 ± 1.0** (n=2)"],
        "mmMamba": ["2 seeds", "80.0 ± 26.9", "+19.0 ± 18.0 (n=2)"],
        "Mamba-in-Llama": ["2 seeds of C1", "42.0 ± 2.8", "**-19.0 ± 1.0** (n=2)"],
        "MOHAWK / Llama": ["not run", "", ""],
        "MaTVLM": ["not run", "", ""],
        "C0: Teacher": ["", "90.0", ""],
    }.items():
        assert [cell(text, recipe, column) for column in ("run", "OCRBench v2", "Δ to C4")] == expected
    assert cell(text, "C4: HEED", "RSA") == "✓ᵂ"
    assert [cell(text, "LoLCATs", column) for column in ("KD", "Reasoning Avg. (4)")] == ["", "50.00"]
    assert "MaTVLM-seed1-budget2000" in text.partition("**Missing**")[2] and "Mamba-in-Llama-seed" not in text
    assert lines["ocrbench_v2", "LoLCATs"]["mean"] == "30.0" and ("ocrbench_v2", "Mamba-in-Llama") not in lines


def test_a_recipe_of_its_own_runs_where_it_is_asked_for(tmp_path):
    ocr, conditions = {"C1": {0: 40}, "Mamba-in-Llama": {0: 41}}, ["C1", "Mamba-in-Llama"]
    text, _, _ = page(tmp_path, "table_03_runs", ocr, conditions=conditions)
    assert [cell(text, "Mamba-in-Llama", column) for column in ("run", "OCRBench v2")] == ["1 seed", "41.0"]
    assert cell(text, "C4: HEED", "run") == "not run"


# Table 9


def test_table_9_is_the_paired_difference(tmp_path):
    c3, c4 = [50, 52, 57], [53, 58, 59]
    ocr = {"C0": {0: 90}, "C3": dict(enumerate(c3)), "C4": dict(enumerate(c4)), "C1": {0: 7}}
    text, lines, _ = page(tmp_path, "table_09", ocr, seeds=[0, 1, 2])
    line, paired = lines["ocrbench_v2", "C4-C3"], stats.ttest_rel(c4, c3)
    assert float(line["mean"]) == pytest.approx(statistics.mean(c4) - statistics.mean(c3), abs=1e-3)
    assert float(line["se"]) == pytest.approx(stats.sem([b - a for a, b in zip(c3, c4)]), abs=1e-3)
    interval = [float(line[end]) for end in ("low", "high")]
    assert interval == pytest.approx(list(paired.confidence_interval(0.95)), abs=1e-2)
    assert (line["paper"], line["paper_spread"]) == ("4.8", "0.42") and lines["average", "C3"]["paper"] == "72.24"
    assert cell(text, "C3 RSA", "OCRBench v2") == f"{statistics.mean(c3):.1f} ± {statistics.stdev(c3):.1f}"
    assert "*+2.44 ± 0.37*" in text and "Missing" not in text and ("ocrbench_v2", "C1") not in lines


def test_table_9_of_one_seed_has_no_interval(tmp_path):
    text, lines, _ = page(tmp_path, "table_09", {"C3": {0: 50}, "C4": {0: 53, 1: 54}}, seeds=[0, 1])
    assert cell(text, "C4 – C3", "OCRBench v2") == "+3.0 (n=1)" and lines["ocrbench_v2", "C4-C3"]["low"] == ""
    assert cell(text, "its 95 % interval", "OCRBench v2") == ""
    assert "**Missing**: C0, C3-seed1-budget2000." in text


# The curves of App. A.8


def test_curves(tmp_path):
    ocr = {"C0": {0: 90}, "C1": {0: 40, 1: 42, 2: 44}, "C3": {0: 50, 1: 51, 2: 52}, "C4": {0: 60, 1: 61, 2: 62}}
    ocr |= {"mask-10": {0: 53}, "mask-25": {0: 58, 1: 60}, "mask-50": {0: 55}}
    ocr |= {"random-10": {0: 50, 1: 54, 2: 52}, "random-25": {0: 50, 1: 51, 2: 55}}
    text, lines, left = page(tmp_path, "figure_a8", ocr)
    assert (tmp_path / "figures/figure_a8.png").read_bytes().startswith(b"\x89PNG")
    of_10 = [cell(text, "10", column) for column in ("5x by density", "5x at random", "difference")]
    assert of_10 == ["53.0", "52.0 ± 2.0", "+3.0 (n=1)"]  # of seed 0
    assert cell(text, "25", "difference") == "**+8.5 ± 0.5** (n=2)" and cell(text, "50", "difference") == ""
    row_25 = next(line for line in text.splitlines() if line.startswith("| 25"))
    assert all(paper in row_25 for paper in ("*58.0*", "*52.8*", "*+5.2*"))
    assert cell(text, "0: C1 KD", "5x by density") == "42.0 ± 2.0"
    assert cell(text, "0: C3 RSA", "5x at random") == "51.0 ± 1.0" and "of at most 0.6." in text
    assert lines["ocrbench_v2", "mask-50-random-50"]["verdict"] == "not run"
    assert "random-50-seed0-budget2000" in text.partition("**Missing**")[2]
    measured, _, of_paper = left["figure"].axes
    drawn = {line.get_label(): line for line in of_paper.lines}
    arms = [list(container.lines[0].get_ydata()) for container in measured.containers]
    assert [arm for arm in arms if len(arm) > 1] == [[51, 53, 59, 55], [51, 52, 52]]
    assert drawn["C4 HEED, continuous"].get_ydata()[0] == 59.2


# What the batch runs for them


def test_other_settings_and_other_recipes_have_side_seeds():
    scale = replace(load_scale("toy"), seeds=(0, 1, 2), side_seeds=(0,))

    def seeds(name, batch):
        runs = PAGES[name].reads(batch)
        of = lambda c: sorted(run.seed for run in runs if run.condition == c)
        return {c: of(c) for c in PAGES[name].shows(batch) if c != "C0"}

    batch, given = RunPlan(scale), RunPlan(scale, seeds=[4, 5])
    ladder, masks = ("C1", "C2", "C3", "C4"), PAGES["figure_a8"].conditions[1:]
    assert seeds("table_08", batch) == dict.fromkeys(("C4", *ABLATIONS), [0, 1, 2]) | dict.fromkeys(SWEEP, [0])
    assert seeds("table_08", given) == dict.fromkeys(("C4", *ABLATIONS, *SWEEP), [4, 5])
    assert seeds("figure_a8", batch) == dict.fromkeys(masks, [0, 1, 2])
    recipes = {c: [0, 1, 2] if c in ladder else [0] for c in RECIPES if c != "Mamba-in-Llama"}
    assert seeds("table_03_runs", batch) == recipes
    budgets = lambda name: {run.token_budget for run in PAGES[name].reads(batch)}
    for name in ("table_03_runs", "table_08", "table_09", "figure_a8"):
        assert budgets(name) == {None, scale.token_budget}


def test_side_budgets_are_those_of_tables_5_and_6():
    scale = replace(load_scale("toy"), side_seeds=(0,))
    batch, curves = RunPlan(scale), RunPlan(replace(scale, side_budgets=(1000, 3000)))
    more = {name: set(of.reads(curves)) - set(of.reads(batch)) for name, of in PAGES.items() if not of.parts}
    assert {name for name in more if more[name]} == {"table_05", "table_06"}
    variants = {(c, 0, budget) for c in ("C4", "C5", "C6") for budget in (1000, 3000)}
    assert {(run.condition, run.seed, run.token_budget) for run in more["table_05"]} == variants
    assert {run.of for run in more["table_06"]} == set(curves.teachers)
    assert {run.seed for run in more["table_06"]} == {0}


def test_a_page_of_smoke_shows_one_of_a_kind():
    smoke = RunPlan(load_scale("smoke"))
    assert PAGES["figure_a8"].shows(smoke) == ["C0", "C1", "C4", "mask-25", "random-25"]
    assert PAGES["table_03_runs"].shows(smoke) == ["C0", "mmMamba", "C1", "C4"]


# The pipeline


def drawn(out):
    figure = notebook(ROOT, "figure_04", scale="smoke", out=out)["figure"]
    renderer = FigureCanvasAgg(figure).get_renderer()
    of = lambda test: [text.get_window_extent(renderer) for text in figure.axes[-1].texts if test(text)]
    names, formulas = of(lambda text: text.get_weight() == "bold"), of(lambda text: "sum" in text.get_text())
    assert not any(name.padded(8).overlaps(formula) for name in names for formula in formulas)
    texts = [text.get_text() for axes in figure.axes for text in [*axes.texts, *axes.get_yticklabels()]]
    return texts, (out / "tables/figure_04.md").read_text()


def test_the_pipeline_names_every_condition_that_is_distilled(tmp_path):
    texts, table = drawn(tmp_path)
    shown = {name for text in texts for name in text.split(", ")}
    assert shown >= {name for name, c in CONDITIONS.items() if c.mixer and not c.posttrained}
    assert (tmp_path / "figures/figure_04.png").read_bytes().startswith(b"\x89PNG")
    assert any(r"W_Q" in text and "rightarrow" in text for text in texts)
    assert any("read from a cache" in text for text in texts)
    assert re.search(r"\| C2, C3, .* \| +0.0% \| +10.0% \| +30.0% \| +60.0% \|", table)


def test_another_registry_and_other_settings_draw_another_pipeline(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.CONDITIONS, "C9", Condition("C9", "New", alignment="head_output", weights="density"))
    changed = dict(stages=(0.2, 0.3, 0.5), tau=0.7, ce_weight=0.3)
    scale, start = load_scale("smoke"), dict(init="identity", density_cache=False)
    monkeypatch.setattr(pages, "load_scale", lambda name: replace(scale, **start, train=scale.train | changed))
    texts, table = drawn(tmp_path)
    assert "C9" in texts and {"Stage 1\n20%", "Stage 3\n50%"} <= set(texts)
    assert any("computed with the frozen tower" in text for text in texts) and any(
        r"\tau=0.7" in text for text in texts
    )
    assert any(r"0.3\;$CE" in text for text in texts)
    assert "q_norm" in table and re.search(r"\| C9 .*\\hat h", table)
