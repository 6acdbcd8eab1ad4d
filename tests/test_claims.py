"The paper's claims: the list, the rules, and verdicts from run files written by hand."

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from heed_nb.claims import (
    MEASURES,
    VERDICTS,
    Evidence,
    Measured,
    Rule,
    claim_verdict,
    claims,
    claims_markdown,
    paper_claims,
)
from heed_nb.conditions import BENCHMARKS, CONDITIONS
from heed_nb.files import write_file
from heed_nb.paper_numbers import paper_score
from heed_nb.regression import CORRELATIONS
from heed_nb.runs import publish, run_name
from heed_nb.scales import Scale, load_scale
from heed_nb.statistics import AVERAGES
from test_results import ROOT, notebook

REPRODUCED, NOT, UNDECIDED, CEILING, UNTESTED = VERDICTS
SCALE = Scale("made", teacher="t", token_budget=4000, budgets=(1000, 4000), teachers={"t": {}, "other": {}})


def write(folder, kind, condition, seed, numbers, budget=4000, teacher=None, device="cpu", **parameters):
    name = run_name(condition, *((None, None) if condition == "C0" else (seed, budget)), teacher)
    provenance = dict(git=dict(commit="0" * 40, dirty=False), device=device, threads=1)
    run = dict(kind=kind, parameters=parameters, numbers=numbers, provenance=provenance)
    write_file(folder / name / f"{kind}.json", json.dumps(run))


def evaluated(folder, n=100, of={}, **by_condition):
    "evaluate.json by condition and seed: one score on all benchmarks, or {benchmark or average: score}."
    for condition, by_seed in by_condition.items():
        for seed, score in enumerate(by_seed):
            given = score if isinstance(score, dict) else dict(average=score)
            scores = {key: s for row, s in given.items() for key in AVERAGES.get(row, (row,))}
            write(folder, "evaluate", condition, seed, dict(scores=scores, n=dict.fromkeys(scores, n)), **of)


def diagnosed(folder, seed, drift, *, density=0.30, others=(0.10, 0.08, 0.05), largest=1.0, ranked=True):
    around = lambda v: dict(value=v, low=v - 0.02, high=v + 0.02, p5=v - 0.1, p95=v + 0.3, least=v - 0.2, most=v + 0.2)
    importance = dict(ratio=dict.fromkeys(("value", "low", "high")), difference=dict(value=0.1, low=0.05, high=0.2))
    shares = zip(("density", "visual", "depth", "attention"), (density, *others))
    predictors = {name: dict(semi_partial=around(share), largest=largest) for name, share in shares}
    ranks = {"density": 0.6, "density, top quarter": 0.5, "top quarter minus all": -0.1, "layers": 0.7}
    numbers = dict(
        images=100,
        deciles=dict(drift=dict(ratio=drift), importance=importance),
        regressions=dict(drift=dict(r2=around(0.5), predictors=predictors)),
    )
    numbers |= dict(correlations={name: around(value) for name, value in ranks.items()}) if ranked else {}
    write(folder, "diagnose", "C1", seed, numbers)


def judged(folder, scale=SCALE):
    return claims(folder, scale).set_index("id")


def verdict(folder, claim, scale=SCALE):
    "A claim's verdict and why."
    return tuple(judged(folder, scale).loc[claim, ["verdict", "why"]])


# The list


def test_every_claim_is_measured_or_says_why_never():
    frame = paper_claims()
    assert frame.id.is_unique and len(frame) >= 60
    assert (frame[["id", "place", "claim"]] != "").all(axis=None)
    for claim in frame.itertuples():
        if claim.never:
            assert not (claim.measure or claim.arguments or claim.decides), claim.id
            continue
        assert claim.measure in MEASURES and claim.decides in ("interval", "value"), claim.id
        assert math.isfinite(claim.low) or math.isfinite(claim.high), claim.id
        if claim.arguments[0] == "correlations":
            assert claim.arguments[1] in CORRELATIONS
        elif claim.measure not in ("diagnosis", "lead"):
            known = {*CONDITIONS, *BENCHMARKS, *AVERAGES, "internvl", "minicpmv", "glm4v", "below", "above"}
            assert set(claim.arguments) <= known, claim.id


def test_contrasts_claimed_are_differences_of_the_tables():
    for claim in paper_claims().query("measure == 'contrast'").itertuples():
        a, b, row = claim.arguments
        assert claim.paper == pytest.approx(paper_score(a, row) - paper_score(b, row), abs=1e-6), claim.id


def test_numbers_said_in_the_text_are_those_of_the_tables():
    said = dict(
        internvl_c4_c3=3.2,
        minicpmv_c4_c3=2.7,
        glm4v_c4_c3=3.7,
        internvl_post=-0.6,
        minicpmv_post=0.3,
        glm4v_post=-0.9,
        quarter_c4_c3_ocr=4.8,
        quarter_gap_ocr=0.1,
        quarter_spread_c3_fine=0.5,
        quarter_spread_c4_average=0.29,
        cost_c5_c1=1.73,
        cost_c4_c3=165 / 160,
        cost_c5_c4=260 / 165,
        throughput_128k=4.12,
        memory_128k=0.32,
        ttft_32k=4.21 / 1.51,
        c4_post=0.38,
        c1_post=-5.05,
        fisher_density_p5=0.49,
        fisher_density_p95=0.74,
        fisher_layers_least=0.61,
        fisher_layers_most=0.88,
        density_most=4.1,
    )
    frame = paper_claims().set_index("id")
    assert frame.paper[list(said)].to_dict() == pytest.approx(said, abs=1e-5)
    assert frame.spread.quarter_c4_c3_ocr == "± 0.42 (SE of 3 seeds)"
    assert frame.spread.drift_r2_density.startswith("[0.27, 0.33] (95 %")
    most = frame[frame.unit.isin(["points (SD)", "%"]) & (frame.decides == "value") & (frame.high < math.inf)]
    assert len(most) == 11 and (most.paper == most.high).all()
    directions = frame[(frame.decides == "interval") & (frame.low.eq(0) ^ frame.high.eq(0))]
    assert len(directions) > 50 and ((directions.paper > 0) == directions.low.eq(0)).all()


def test_every_rule_holds_on_the_papers_own_value():
    for claim in paper_claims().itertuples():
        if not claim.never and claim.id != "ld_spread":  # of which the paper has no number
            own = Measured(claim.paper, claim.paper, claim.paper)
            assert claim_verdict(Rule(claim.decides, claim.low, claim.high), own) == (REPRODUCED, ""), claim.id


# Intervals and rules


ABOVE_0, WITHIN_10 = Rule("interval", low=0), Rule("interval", 0.9, 1.1)


@pytest.mark.parametrize(
    "rule, low, high, expected",
    [
        (ABOVE_0, 0.1, 2, REPRODUCED),
        (ABOVE_0, -0.1, 2, UNDECIDED),
        (ABOVE_0, -2, -0.1, NOT),
        (ABOVE_0, None, None, UNTESTED),
        (Rule("interval", low=-2), -1.9, 0, REPRODUCED),
        (Rule("interval", high=0), -2, -0.1, REPRODUCED),
        (Rule("interval", high=0), -2, 0.1, UNDECIDED),
        (WITHIN_10, 0.91, 1.09, REPRODUCED),
        (WITHIN_10, 0.91, 1.11, UNDECIDED),
        (WITHIN_10, 1.11, 1.2, NOT),
        (WITHIN_10, 0.8, 1.09, UNDECIDED),
        (Rule("interval", -1, 1), -0.9, 0.9, REPRODUCED),
        (Rule("interval", -1, 1), -0.9, 1.1, UNDECIDED),
    ],
)
def test_interval_rules(rule, low, high, expected):
    assert claim_verdict(rule, Measured(1.0, low, high))[0] == expected


@pytest.mark.parametrize(
    "rule, within, beyond",
    [(Rule("value", 2.88, 4.32), 4.31, 4.33), (Rule("value", high=3.6), 3.6, 3.7), (Rule("value", low=0.999), 1, 0.99)],
)
def test_value_rules(rule, within, beyond):
    verdicts = [claim_verdict(rule, Measured(value))[0] for value in (within, beyond)]
    assert verdicts == [REPRODUCED, NOT]


# Verdicts from files


def test_nothing_is_tested_without_runs(tmp_path):
    assert set(judged(tmp_path / "nowhere").verdict) == {UNTESTED}


def test_a_contrast_over_seeds(tmp_path):
    evaluated(tmp_path, C3=[50, 52, 51], C4=[53, 56, 53])
    line = judged(tmp_path).loc["c4_c3_average"]
    interval = stats.ttest_rel([53, 56, 53], [50, 52, 51]).confidence_interval(0.95)
    assert (line.verdict, line.n) == (REPRODUCED, "3 seeds")
    assert [line.value, line.low, line.high] == pytest.approx([3, *interval])
    assert line.runs == "C4-seed{0,1,2}-budget4000/evaluate.json C3-seed{0,1,2}-budget4000/evaluate.json"


EQUAL = "the seeds agree exactly: no spread to judge by"


@pytest.mark.parametrize(
    "c3, c4, expected",
    [
        ([50, 52, 51], [53, 50, 51], (UNDECIDED, "the interval holds 0")),
        ([50, 52, 51], [45, 46, 46], (NOT, "the interval lies outside")),
        ([50, 51], [60, 61], (UNDECIDED, EQUAL)),
        ([100, 100], [99, 99], (UNDECIDED, EQUAL)),
        ([100, 100], [100, 100], (CEILING, "every score is 100")),
        ([100], [100], (CEILING, "every score is 100")),
        ([50, 51], [60], (UNTESTED, "one seed")),
    ],
)
def test_a_contrast_that_is_not_there(tmp_path, c3, c4, expected):
    evaluated(tmp_path, C3=c3, C4=c4)
    assert verdict(tmp_path, "c4_c3_average") == expected


def test_one_seed_has_a_value_without_an_interval(tmp_path):
    evaluated(tmp_path, C3=[50, 51], C4=[60])
    line = judged(tmp_path).loc["c4_c3_average"]
    assert line.value == 10 and np.isnan(line.low)
    assert line.runs == "C4-seed0-budget4000/evaluate.json C3-seed0-budget4000/evaluate.json"


def test_runs_that_can_not_be_paired_decide_nothing(tmp_path):
    evaluated(tmp_path, C3=[50, 52, 51])
    for given, why in (
        (dict(C4=[53, 56, 53], of=dict(budget=1000)), "no evaluate.json of C4 at 4,000 tokens"),
        (dict(C4=[53, 56, 53], n=200), "the runs answered different numbers of questions"),
        (dict(C4=[dict(reasoning=50)] * 3), "C4-seed0-budget4000 has no scores of ai2d"),
    ):
        evaluated(tmp_path, **given)
        assert verdict(tmp_path, "c4_c3_average") == (UNTESTED, why)


def test_a_contrast_of_another_quantity(tmp_path):
    for condition, values in (("C3", (-0.5, -0.6)), ("C4", (-0.2, -0.4))):
        for seed, loglik in enumerate(values):
            numbers = {
                name: dict.fromkeys(BENCHMARKS, x) for name, x in (("scores", 100), ("n", 9), ("loglik", loglik))
            }
            write(tmp_path, "evaluate", condition, seed, numbers)
    contrast = lambda quantity: MEASURES["contrast"](Evidence(tmp_path, SCALE), "C4", "C3", "average", quantity)
    assert contrast("scores").verdict == CEILING and contrast("kl").why == "C4-seed0-budget4000 has no kl of ai2d"
    found = contrast("loglik")
    assert found.value == pytest.approx(0.25) and found.low < 0.25 < found.high and not found.why


def test_selectivity_steps_and_the_teacher(tmp_path):
    evaluated(tmp_path, C0=[90])
    for name, fine, reasoning in (
        ("C1", (40, 42, 43), (89, 90, 88.5)),
        ("C2", (50, 51, 54), (89, 90, 89)),
        ("C3", (52, 54, 55), (89, 89.5, 90)),
        ("C4", (70, 73, 75), (89, 90, 90)),
    ):
        evaluated(tmp_path, **{name: [dict(fine_grained=f, reasoning=r) for f, r in zip(fine, reasoning)]})
    at = judged(tmp_path)
    assert at.value.c1_selective == pytest.approx(np.mean([40 - 89, 42 - 90, 43 - 88.5]))
    average = lambda f, r: 0.6 * np.array(f) + 0.4 * np.array(r)
    step = average((18, 19, 20), (0, 0.5, 0)) - average((2, 3, 1), (0, -0.5, 1))
    assert at.value.largest_step_c3_c2 == pytest.approx(step.mean())
    assert set(at.verdict[["c1_selective", "c4_c3_selective", "c1_c0_fine", "c4_c0_average"]]) == {REPRODUCED}
    assert at.n.c1_c0_fine == "3 seeds"
    assert at.runs.c1_c0_fine == "C1-seed{0,1,2}-budget4000/evaluate.json C0/evaluate.json"


def test_other_teachers_and_a_quarter_of_the_budget(tmp_path):
    evaluated(tmp_path, C3=[50, 52], C4=[55, 57.1], of=dict(teacher="other", model_type="glm4v"))
    evaluated(tmp_path, C3=[49, 51], C4=[54, 56.1], of=dict(budget=1000))
    at = judged(tmp_path)
    assert set(at.verdict[["glm4v_c4_c3", "quarter_c4_c3_ocr"]]) == {REPRODUCED}
    assert at.why.internvl_c4_c3 == "no evaluate.json with a teacher of the family internvl"
    runs = "other/C4-seed{0,1}-budget4000/evaluate.json other/C3-seed{0,1}-budget4000/evaluate.json"
    assert at.runs.glm4v_c4_c3 == runs and "budget1000" in at.runs.quarter_c4_c3_ocr
    assert at.value.quarter_spread_c3 == pytest.approx(np.std([50, 52], ddof=1)) and at.verdict.quarter_spread_c3 == NOT
    assert verdict(tmp_path, "quarter_gap_ocr") == (UNTESTED, "no evaluate.json of C4, C3 at 4,000 tokens")
    far = Scale("made", teacher="t", token_budget=2500, budgets=(1000,))
    assert verdict(tmp_path, "quarter_c4_c3_ocr", far)[1] == "the scale has no budget near a quarter of Table 1's"


def test_a_spread_of_one_seed_is_none_and_of_equal_seeds_is_zero(tmp_path):
    evaluated(tmp_path, C3=[50], C4=[50, 50], of=dict(budget=1000))
    at = judged(tmp_path)
    assert verdict(tmp_path, "quarter_spread_c3") == (UNTESTED, "one seed") and np.isnan(at.value.quarter_spread_c3)
    assert list(at.loc["quarter_spread_c4_fine", ["verdict", "value", "n"]]) == [REPRODUCED, 0, "2 seeds"]
    spreads = at[at.unit == "points (SD)"].assign(value=0.5, n="", why="", runs="")
    assert len(spreads) and "+" not in claims_markdown(spreads)


def test_the_gap_at_a_quarter_of_the_budget_is_paired_with_that_at_all_of_it(tmp_path):
    evaluated(tmp_path, C3=[50, 52, 51], C4=[54, 57, 55])
    evaluated(tmp_path, C3=[40, 41, 42], C4=[44.5, 45.5, 46.2], of=dict(budget=1000))
    line = judged(tmp_path).loc["quarter_gap_ocr"]
    interval = stats.ttest_rel([4.5, 4.5, 4.2], [4, 5, 4]).confidence_interval(0.95)
    assert [line.value, line.low, line.high] == pytest.approx([0.2 / 3, *interval])
    assert "C4-seed{0,1,2}-budget{1000,4000}" in line.runs


def test_density_is_the_larger_gain_only_where_it_gains(tmp_path):
    "C5 collapses: what it adds is far below what density does, which is no gain."
    evaluated(tmp_path, C3=[50, 52, 51], C5=[5, 6, 9], C4=[49, 52, 52])
    assert judged(tmp_path).value.density_most == 0
    assert verdict(tmp_path, "density_most") == (UNDECIDED, "the interval holds 0")
    evaluated(tmp_path, C4=[54, 57, 55])
    assert verdict(tmp_path, "density_most") == (REPRODUCED, "")
    evaluated(tmp_path, C5=[64, 62, 66])
    assert judged(tmp_path).value.density_most == pytest.approx(np.mean([4 - 10, 5 - 5, 4 - 11]))


def test_a_ratio_of_spreads_has_pitmans_interval(tmp_path):
    "At its bound the sum and the difference of the standardised scores are as far from uncorrelated as 95 % allow."
    a, b = np.array([50, 57, 49, 61.0]), np.array([50, 53, 51, 54.0])
    evaluated(tmp_path, **{"+LD": a, "C4": b})
    line = judged(tmp_path).loc["ld_spread"]
    assert line.value == pytest.approx(a.std() / b.std())
    for bound in (line.low, line.high):
        assert stats.pearsonr(a + bound * b, a - bound * b).pvalue == pytest.approx(0.05)
    evaluated(tmp_path, C4=[50] * 4)
    assert verdict(tmp_path, "ld_spread") == (UNDECIDED, EQUAL)


def test_parameters_are_counted_by_distill(tmp_path):
    timed = dict(seconds=1, tokens=1)
    for condition in ("C1", "C4"):
        write(tmp_path, "distill", condition, 0, timed | dict(parameters=dict(teacher=1000, student=1047)))
    at = judged(tmp_path)
    assert list(at.loc["no_parameters", ["value", "verdict"]]) == [pytest.approx(4.7), NOT]
    assert list(at.loc["no_parameters_c1", ["value", "verdict"]]) == [0, REPRODUCED]
    write(tmp_path, "distill", "C4", 0, timed)
    for claim in ("no_parameters", "no_parameters_c1"):
        assert verdict(tmp_path, claim) == (UNTESTED, "a run file has no count of parameters")


def test_training_costs(tmp_path):
    for seed in range(2):
        write(tmp_path, "distill", "C3", seed, dict(seconds=100, tokens=1000))
        write(tmp_path, "distill", "C4", seed, dict(seconds=204 + 0.4 * seed, tokens=2000))
        write(tmp_path, "distill", "C1", seed, dict(seconds=80, tokens=1000), device="another")
    at = judged(tmp_path)
    assert at.value.cost_c4_c3 == pytest.approx(1.021) and at.verdict.cost_c4_c3 == REPRODUCED
    assert "distill.json" in at.runs.cost_c4_c3
    assert verdict(tmp_path, "cost_c4_c1") == (UNTESTED, "timed on different machines or threads")
    write(tmp_path, "distill", "C4", 1, dict(seconds=244, tokens=2000))
    assert verdict(tmp_path, "cost_c4_c3") == (UNDECIDED, "the interval holds 0.98 and 1.08")


FISHER = {  # a value of `diagnosed`, and whether it is the paper's
    "density": (0.6, REPRODUCED),
    "density_direction": (0.6, REPRODUCED),
    "density_top": (0.5, NOT),
    "density_top_rise": (-0.1, NOT),
    "layers": (0.7, REPRODUCED),
    "density_p5": (0.5, REPRODUCED),
    "density_p95": (0.9, NOT),
    "layers_least": (0.5, REPRODUCED),
    "layers_most": (0.9, REPRODUCED),
}


def test_a_diagnosis(tmp_path):
    drift = dict(value=3.4, low=3.2, high=3.7)
    diagnosed(tmp_path, 0, drift)
    at, absent = judged(tmp_path), "the diagnosis has no such number"
    held = "drift_ratio drift_direction drift_r2 drift_r2_density density_largest density_lead importance_direction"
    assert set(at.verdict[held.split()]) == {REPRODUCED}
    line = at.loc["drift_direction"]
    assert [line.value, line.low, line.high, line.n] == [3.4, 3.2, 3.7, "100 images, 1 seed"]
    assert line.runs == "C1-seed0-budget4000/diagnose.json"
    assert at.why.importance_ratio.startswith("no ratio") and at.verdict.importance_ratio == UNTESTED
    assert verdict(tmp_path, "ablation_ratio") == (UNTESTED, absent)
    for name, (value, expected) in FISHER.items():
        assert list(at.loc[f"fisher_{name}", ["value", "verdict"]]) == [pytest.approx(value), expected], name
    assert list(at.loc["fisher_density", ["low", "high"]]) == [0.58, 0.62]

    diagnosed(tmp_path, 0, drift, ranked=False)
    without = judged(tmp_path).loc[[f"fisher_{name}" for name in FISHER]]
    assert set(without.verdict) == {UNTESTED} and set(without.why) == {absent}

    diagnosed(tmp_path, 1, dict(value=1.4, low=0.9, high=1.7), density=0.05, largest=0.2)
    at = judged(tmp_path)
    line = at.loc["drift_direction"]
    assert [line.value, line.low, line.high, line.verdict] == [pytest.approx(2.4), 0.9, 3.7, UNDECIDED]
    assert set(at.verdict[["drift_ratio", "drift_r2_density", "density_largest"]]) == {NOT}
    assert at.why.drift_ratio == "beyond the bound" and at.rule.drift_ratio == "value at least 2.88 and at most 4.32"


# The page


@pytest.mark.parametrize("case", ["none", "some"])
def test_the_page(case, tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "outputs" / case
    if case == "some":
        evaluated(runs, C3=[50, 52], C4=[55, 57.1], of=dict(budget=load_scale("smoke").token_budget))
    notebook(ROOT, "claims", scale="smoke", runs=str(runs), out=str(out))
    text, counts = (out / "claims.md").read_text(), (out / "tables/claims.md").read_text()
    assert re.search(rf"\| all +\| +{len(paper_claims())} \|", text) and "](../claims.md)" in counts
    assert (re.search(r"\| reproduced +\| +0 \|", text) is not None) == (case == "none")
    assert ("`C4-seed{0,1}-budget3000/evaluate.json`" in text) == (case == "some")
    assert publish(case, tmp_path / "outputs").joinpath("claims.md").read_text() == text


def test_the_published_ledger_is_remade_from_the_published_runs(tmp_path):
    published = ROOT / "outputs/published/toy"
    notebook(ROOT, "claims", scale="toy", runs=str(published / "runs"), out=str(tmp_path))
    made, kept = (pd.read_csv(path / "tables/claims.csv", index_col="id") for path in (tmp_path, published))
    assert made.value.to_dict() == pytest.approx(kept.value.to_dict(), nan_ok=True)
    words = {"undecided": "at the ceiling"}
    changed = made.verdict[made.verdict != kept.verdict]
    assert (kept.verdict[changed.index].map(words) == changed).all()


def test_figure_3_has_all_curves_and_the_papers_numbers(tmp_path):
    between = dict(value=1.5, low=1.2, high=1.8)
    diagnosed(tmp_path / "runs", 0, dict(value=3.4, low=3.2, high=3.7))
    path = tmp_path / "runs/C1-seed0-budget4000/diagnose.json"
    run = json.loads(path.read_text())
    curve = dict(mean=[1.0] * 10, low=[0.9] * 10, high=[1.1] * 10, ratio=between, difference=between)
    run["numbers"]["deciles"] = dict.fromkeys(("drift", "relative drift", "importance", "ablation"), curve)
    run["numbers"]["regressions"]["relative drift"] = run["numbers"]["regressions"]["drift"]
    path.write_text(json.dumps(run))
    notebook(ROOT, "figure_03", runs=tmp_path / "runs", out=tmp_path, token_budget=4000)
    text = (tmp_path / "tables/figure_03.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:4]] for line in text.splitlines() if line.startswith("|")]
    row = lambda what: next(cells for first, *cells in lines if first.startswith(what))
    assert row("ablation, densest over") == ["3.5", "1.5 [1.2, 1.8]"]
    assert row("importance, one by one, densest minus") == ["", "not measured"]
    assert row("semi-partial R²: density") == ["0.3 [0.27, 0.33]", "0.3 [0.28, 0.32]"]
    assert row("between layers, visual")[0] == "0.73, from 0.61 to 0.88"
    assert row("density and sensitivity")[0] == "0.63, 5th to 95th percentile 0.49 to 0.74"
    assert "- Made from 1 `runs/NAME/diagnose.json` (commit 0000000, cpu): C1-seed0-budget4000." in text
