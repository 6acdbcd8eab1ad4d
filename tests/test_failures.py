"The regimes in which density misleads, answers paired, failures sorted."

import json
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from heed_nb.conditions import BENCHMARKS, FINE_GRAINED, REASONING, REGIMES, TASKS
from heed_nb.evaluate import evaluate, task_files
from heed_nb.hybrid import to_hybrid
from heed_nb.runs import joint_failures, pair_answers, read_answers, run_name, write_run
from heed_nb.statistics import AVERAGES, ROWS, scores
from heed_nb.tables import score_table
from heed_nb.teachers import load_teacher
from heed_nb.toy_pages import BAND, CELL, COLOURS, PAPERS, PATCH, WORLDS, glyph, render
from heed_nb.toyworld import FAILURES, Documents, asked_text, benchmark, failure, failure_kinds, world_of
from test_results import notebook

# The two tasks


def test_regimes_are_beside_the_ten_and_in_no_average():
    assert not set(REGIMES) & set(BENCHMARKS) and list(TASKS) == [*BENCHMARKS, *REGIMES]
    assert {b.group for b in REGIMES.values()} == {"regime"} and len(FINE_GRAINED + REASONING) == 10
    assert not set(REGIMES) & {*ROWS, *(key for keys in AVERAGES.values() for key in keys)}
    assert [path.stem for path in task_files("toy", list(REGIMES))] == list(REGIMES)
    assert not task_files("paper", list(REGIMES))


def run_of(condition, seed, measured):
    return dict(
        condition=condition,
        seed=seed,
        token_budget=None if seed is None else 100,
        name=f"{condition}-{seed}",
        path="here",
        numbers=dict(scores=measured, n=dict.fromkeys(measured, 100)),
        provenance=dict(git=dict(commit="a" * 40, dirty=False)),
    )


def test_a_regimes_score_moves_no_average_and_no_table():
    ten = {key: 50.0 + i for i, key in enumerate(BENCHMARKS)}
    rows = lambda measured: scores([run_of("C0", None, measured), run_of("C4", 0, measured)])
    alone, beside = rows(ten), rows(ten | {"texture": 0.0, "smooth": 100.0})
    assert beside[~beside.row.isin(REGIMES)].reset_index(drop=True).equals(alone)
    assert beside[beside.row == "smooth"].score.tolist() == [100, 100]
    assert score_table(beside, 100).equals(score_table(alone, 100))


@pytest.mark.parametrize("world", WORLDS)
def test_a_hatched_page_is_that_form_with_a_band_of_stripes(world):
    side = WORLDS[world].side
    for q in benchmark("texture", 20, 7, world):
        top, *how = q.page.hatched
        plain = np.asarray(render(replace(q.page, hatched=()))).astype(int)
        hatched = np.asarray(q.image).astype(int)
        band = np.zeros(side, bool)
        band[top : top + BAND] = True
        assert (plain == hatched)[~band].all()
        dark = (hatched[band] < plain[band]).all(-1)
        if world == "crowded":
            y, x = np.mgrid[:BAND, :side]
            slope, period = how
            assert (dark == ((x + slope * y) % period * 3 < period)).all()
        else:
            cells = dark.reshape(2, CELL, side // CELL, CELL).transpose(0, 2, 1, 3).reshape(-1, CELL * CELL)
            assert 0 < cells.mean(1).min() and cells.mean(1).max() < 0.6 and len(np.unique(cells, axis=0)) > 8
        assert not any(t.y < top + BAND and t.y + t.size > top for t in q.page.texts)
        (field,) = [t for t in q.page.texts if t.field == q.question[-2]]
        assert q.question == f"value of {field.field}?" and field.string == q.answer


@pytest.mark.parametrize("world", WORLDS)
def test_the_plain_shape_has_its_colour_and_no_print_on_it(world):
    for q in benchmark("smooth", 30, 7, world):
        (shape,), rgb = q.page.shapes, WORLDS[world].colours[COLOURS.index(q.answer)]
        pixels = np.asarray(q.image)[shape.y : shape.y + shape.size + 1, shape.x : shape.x + shape.size + 1]
        centre = pixels[shape.size * 2 // 3, shape.size // 2]
        assert rgb == tuple(centre) and shape.colour == q.answer
        apart = lambda colour: np.abs(pixels.astype(int) - colour).sum(-1)
        paper = WORLDS[world].papers[PAPERS.index(q.page.paper)]
        near = apart(rgb) < apart(paper) if WORLDS[world].softness else apart(rgb) == 0
        assert near.mean() > 0.45  # a triangle covers half of its box
        assert sorted(q.choices) == sorted(COLOURS) and q.question.split("? ")[0] == f"colour of {shape.name}"
        beside = lambda t: t.x <= shape.x + shape.size and t.x + 8 * len(t.string) > shape.x
        level = lambda t: t.y <= shape.y + shape.size and t.y + 16 > shape.y
        assert len(q.page.texts) >= 10 and not any(beside(text) and level(text) for text in q.page.texts)


@pytest.mark.parametrize("world", WORLDS)
def test_regimes_are_a_function_of_their_seed(world):
    for key in REGIMES:
        first, again, other = (benchmark(key, 5, seed, world) for seed in (0, 0, 1))
        assert [(q.key, q.page, q.question) for q in first] == [(q.key, q.page, q.question) for q in again]
        assert not {q.page for q in first} & {q.page for q in other} and first == [
            *benchmark(key, 3, 0, world),
            *first[3:],
        ]


@pytest.mark.parametrize("world, checksum", [("crowded", 2845936255), ("roomy", 3159081936)])
def test_training_pages_are_those_the_committed_teacher_saw(world, checksum):
    import zlib

    pages = [Documents(seed, world=world).page(i)[0] for seed in (0, 1) for i in range(200)]
    assert not any(page.hatched for page in pages) and not {"hatched", "world"} & {*re.findall(r"\w+", repr(pages[0]))}
    assert zlib.crc32("".join(map(repr, pages)).encode()) == checksum


def test_the_committed_teacher_answers_both(root):
    how = dict(benchmarks=list(REGIMES), questions=100, batch_size=100)
    assert min(evaluate(root / "outputs/teachers/toy-qwen3vl", **how)["scores"].values()) >= 95


def test_a_student_is_asked_about_its_teachers_world(root, tmp_path):
    teacher, processor = load_teacher(root / "outputs/teachers/roomy-qwen3vl")
    to_hybrid(teacher).save_pretrained(tmp_path / "student")
    processor.save_pretrained(tmp_path / "student")
    assert world_of(load_teacher(tmp_path / "student")[0].config) == "roomy"
    evaluate(tmp_path / "student", benchmarks=["docvqa"], questions=2, out=tmp_path)
    answers = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert [(a["key"], a["question"]) for a in answers] == [
        (q.key, q.question) for q in benchmark("docvqa", 2, world="roomy")
    ]


# Answers of two runs


def write_answers(folder, name, lines):
    (folder / name).mkdir(parents=True)
    (folder / name / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return dict(name=name, path=folder / name / "evaluate.json")


def line(q, response):
    about = dict(key=q.key, benchmark=q.benchmark, question=q.question, answers=[q.answer])
    return about | dict(response=response, score=float(response == q.answer))


def test_pairs_and_joint_failures(tmp_path):
    asked = [*benchmark("infovqa", 6), *benchmark("docvqa", 6), *benchmark("mathvista", 3)]
    r = random.Random(0)
    answers = [[q.answer if r.random() < 0.4 else "no" for q in asked] for _ in range(2)]
    first, second = (write_answers(tmp_path, name, map(line, asked, said)) for name, said in zip(("C1", "C4"), answers))
    pairs = pair_answers(first, second)
    assert pairs.index.to_list() == [q.key for q in asked] and pairs.response_a.to_list() == answers[0]
    assert pairs.response_b.to_list() == answers[1]
    both = [q for q, x, y in zip(asked, *answers) if x == y == "no"]
    kinds = joint_failures(pairs, failure_kinds).kind
    assert 0 < len(both) < len(asked) and kinds.to_dict() == {
        q.key: {"infovqa": "F3", "docvqa": "other", "mathvista": "F1"}[q.benchmark] for q in both
    }
    failed = [q.key for q, x in zip(asked, answers[0]) if x == "no"]
    assert joint_failures(pair_answers(first, first), failure_kinds).index.to_list() == failed


def test_answers_that_are_missing_or_to_other_questions(tmp_path):
    two, three = benchmark("docvqa", 2), benchmark("docvqa", 3)
    first, second = (
        write_answers(tmp_path, name, [line(q, "1") for q in asked]) for name, asked in (("C3", two), ("C4", three))
    )
    with pytest.raises(ValueError, match="C3 and C4 answered different questions"):
        pair_answers(first, second)
    with pytest.raises(ValueError, match="no answers.jsonl in C1; run nbs/runs/evaluate.ipynb there again"):
        read_answers(dict(name="C1", path=tmp_path / "C1" / "evaluate.json"))


@pytest.fixture
def page(root, tmp_path, monkeypatch):
    "A function that runs figure 6 or figure 2 and returns what is written below it."
    monkeypatch.chdir(root)

    def run(name, **given):
        notebook(root, name, out=tmp_path, **given)
        assert (tmp_path / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        return (tmp_path / f"tables/{name}.md").read_text()

    return run


def put_runs(folder, said, measured):
    "Runs by condition, with these answers to three questions; `measured` gives a condition's scores."
    for condition, answers in said.items():
        run, scores = run_name(condition, 0, 2000), measured(condition)
        write_answers(folder, run, map(line, benchmark("docvqa", 3), answers))
        numbers = dict(scores=scores, n=dict.fromkeys(scores, 3))
        write_run(folder / run / "evaluate.json", "evaluate", {}, numbers)
    return dict(runs=folder, token_budget=2000)


WRONG, RIGHT = ["no"] * 3, [q.answer for q in benchmark("docvqa", 3)]


@pytest.mark.parametrize("name", ["toy-internvl", "toy-minicpmv"])
def test_figure_6_draws_the_density_of_any_familys_tower(name, page, tmp_path):
    given = put_runs(tmp_path / "runs", dict(C3=WRONG, C4=RIGHT), lambda c: dict(docvqa=100 * (c == "C4")))
    text = page("figure_06", conditions=["C3", "C4"], teacher=f"outputs/teachers/{name}", **given)
    assert "C3 fails and C4 answers 3 of 3" in text


@pytest.mark.parametrize("name", ["toy-glm4v", "toy-minicpmv"])
def test_figure_2_is_of_any_familys_tower(name, page):
    assert f"outputs/teachers/{name}" in page("figure_02", teacher=f"outputs/teachers/{name}")


def test_figure_6_of_another_pair_and_a_regime_at_its_ceiling(page, tmp_path):
    measured = lambda condition: dict(docvqa=50, texture=10 * int(condition[1]), smooth=100)
    given = put_runs(tmp_path / "runs", dict(C2=WRONG, C4=WRONG, C5=RIGHT), measured)
    text = " ".join(page("figure_06", pair=["C2", "C5"], **given).split())
    for found in (
        "C2 fails and C5 answers 3 of 3",
        "An answer is right here where it scores 1",
        "| C5 – C4 | +10.0 (n=1)",
        "At the ceiling of 100 with every condition: Smooth evidence.",
    ):
        assert found in text
    missing = "**Missing**: no run of C3 at 2,000 tokens, so no pair is shown."
    assert missing in page("figure_06", conditions=["C4"], **given)


# Kinds of failure


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("key", TASKS)
def test_a_failure_is_of_the_kind_its_page_says(key, world):
    rules = ("mathvista", "mmmu_pro") if world == "crowded" else ("mathvista",)
    for q in benchmark(key, 25, 3, world):
        text, wrong = asked_text(q), "zz"
        if key in (*FINE_GRAINED, "texture"):
            assert text.string == q.answer and dict(q.page.fields)[text.field] == q.answer
            small = all(max(glyph(c, text.font, text.size)[0].size) <= PATCH for c in q.answer)
            assert small == (text.size == 11) and failure(q, wrong) == ("F3" if small else "other")
            for value in {value for _, value in q.page.fields} - {q.answer}:
                assert failure(q, f" {value}\n") == "F1"
        else:
            assert text is None and failure(q, wrong) == ("F1" if key in rules else "other")
        assert failure(q, wrong) in FAILURES


def test_a_key_that_is_printed_is_no_other_fields_answer():
    q = benchmark("docvqa", 1)[0]
    assert failure(q, q.question[-2]) == "other"


# The claim


def test_the_claim_counts_ocrbench_alone(tmp_path):
    from heed_nb.claims import MEASURES, Evidence

    asked = [*benchmark("ocrbench_v2", 40), *benchmark("mathvista", 5)]
    for name in ("C1-seed0-budget100", "C4-seed0-budget100"):
        write_answers(tmp_path, name, [line(q, "zz") for q in asked])
        run = dict(kind="evaluate", parameters={}, numbers=dict(scores={}, n={}), provenance={})
        (tmp_path / name / "evaluate.json").write_text(json.dumps(run))
    failures = lambda *kinds: MEASURES["failures"](
        Evidence(tmp_path, SimpleNamespace(token_budget=100), *kinds), "C1", "C4"
    )
    small = sum(asked_text(q).size == 11 for q in asked[:40])
    found = failures(failure_kinds)
    assert 0 < small < 40 and found.value == pytest.approx(100 * small / 40) and found.why == "one seed"
    assert "told from toy pages" in failures().why
    (tmp_path / "C1-seed0-budget100" / "answers.jsonl").unlink()
    assert "no answers.jsonl in C1-seed0-budget100" in failures(failure_kinds).why
