"The registry says what the paper's tables 3 and 10 say; scales and parameters are refused with one line."

from dataclasses import fields
from pathlib import Path

import pytest

from heed_nb.conditions import (
    BENCHMARKS,
    CONDITIONS,
    PARAMETERS,
    SCALE_KEYS,
    SECTION_KEYS,
    Condition,
    TrainSettings,
    alignment_table,
    check_parameters,
    get_condition,
    load_scale,
    recipe_table,
)

TABLE_3 = """
LoLCATs        | x |   | x |   |
MOHAWK / Llama |   | x | x |   | x
Mamba-in-Llama | x |   |   |   | x
MaTVLM         | x |   | x |   | x
mmMamba        | x |   | x |   | x
C1: KD         | x |   |   |   | x
C2: HSA        | x |   | x |   | x
C3: RSA        | x |   |   | x | x
C4: HEED       | x |   |   | W | x
"""


def test_table_3_is_the_papers():
    paper = [tuple(cell.strip() for cell in line.split("|")) for line in TABLE_3.strip().splitlines()]
    marks = {"": "", "✓": "x", "✓ᵂ": "W"}
    ours = [(row["Method"], *(marks[row[k]] for k in ("WT", "MO", "HSA", "RSA", "KD"))) for row in recipe_table()]
    assert ours == paper


def test_table_10_is_the_papers():
    assert [(row["Condition"], row["L_align"]) for row in alignment_table()] == [
        ("C1 (KD)", "— (Stages 1/2 skipped)"),
        ("C2 (HSA)", "per-layer attn-output MSE"),
        ("C3 (RSA)", "uniform residual-stream MSE"),
        ("C4 (HEED)", "density-weighted RSA"),
    ]


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(weights="mask"), "mask_share is 0.0 with the weights 'mask'"),
        (dict(weights="random_mask", mask_share=1.5), "mask_share is 1.5"),
        (dict(weights="density", mask_share=0.1), "mask_share is 0.1 with the weights 'density'"),
        (dict(tau=1.0), "tau is 1.0 with the weights 'uniform'; only density, text_boost, shuffled take one"),
        (dict(weights="mask", mask_share=0.1, text_boost=4.0), "text_boost is 4.0 with the weights 'mask'"),
        (dict(weights="density", tau=0.0), "tau is 0.0; it must be above 0"),
        (dict(weights="density", tau=float("nan")), "tau is nan; it must be above 0"),
        (dict(weights="shuffled", text_boost=-1.0), "text_boost is -1.0; it must be 0 or more"),
        (
            dict(alignment="head_output", weights="layer_gradient"),
            "are gradients of the residuals; the alignment is 'head_output'",
        ),
        (dict(alignment="logits"), "unknown alignment 'logits'; one of None, head_output"),
    ],
)
def test_a_condition_that_means_nothing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Condition("x", "x", **{"alignment": "residual"} | fields)


def test_ladder_and_benchmarks_are_complete():
    assert {"C0", "C1", "C2", "C3", "C4", "C5", "C6", "C4-shuffled", "-Residual", "-Density"} <= set(CONDITIONS)
    assert list(BENCHMARKS)[:2] == ["ocrbench_v2", "docvqa"] and len(BENCHMARKS) == 10


NAN, INF, HUGE = float("nan"), float("inf"), 10**400
WRONG = (NAN, INF, -1, HUGE, True, None, "", "some words", b"x", [], [NAN], ["a", []], {}, {"some": "words"}, {1: NAN})


def taken(call):
    "Which of WRONG a call takes, as they print. It refuses the others with a ValueError of one line."
    found = []
    for value in WRONG:
        try:
            call(value)
        except ValueError as error:
            assert str(error) and len(str(error).splitlines()) == 1
        else:
            found.append(repr(value))
    return found


def test_settings_take_their_own_kind_of_value_alone():
    given = {
        f.name: taken(lambda value: TrainSettings(**{"token_budget": 1000, f.name: value}))
        for f in fields(TrainSettings)
    }
    paths = {name: ["None", "'some words'"] for name in ("density_cache", "gradient_cache")}
    assert {name: values for name, values in given.items() if values} == {"threads": ["None"]} | paths


@pytest.fixture
def scale_file(tmp_path, monkeypatch):
    path = tmp_path / "workflow" / "scales" / "tiny.yaml"
    path.parent.mkdir(parents=True)
    (tmp_path / "nbs" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "nbs" / "runs")  # a notebook's working directory
    path.write_text("teacher: t\ntoken_budget: 1000\nbudgets: [500, 1000]\ntrain: {lr: 1e-3, threads: 2}\n")
    return path


def test_a_scale_is_read_from_below_the_repository(scale_file):
    scale = load_scale("tiny", {"train.lr": 0.5, "evaluate": {"questions": 7}})
    assert (scale.name, scale.budgets, scale.evaluate) == ("tiny", (500, 1000), {"questions": 7})
    assert scale.settings(token_budget=300, seed=4) == TrainSettings(300, 4, lr=0.5, threads=2)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            {"condition": "C4"},
            "unknown key 'condition' in workflow/scales/tiny.yaml or its overrides; allowed: teacher",
        ),
        ({"train.learning_rate": 1}, "unknown key 'learning_rate' in train of"),
        ({"train.seed": 1}, "unknown key 'seed' in train of"),
        ({"conditions": ["C1", "C9"]}, "unknown condition 'C9'; one of C0, C1"),
        ({"conditions": "C1"}, "conditions is 'C1'"),
        ({"conditions": [["C1"]]}, "conditions is (['C1'],); it takes names"),
        ({"seeds": ["zero"]}, "seeds holds 'zero'; it takes whole numbers from 0 to 4294967295"),
        ({"seeds": [-1]}, "seeds holds -1"),
        ({"seeds": []}, "seeds is ()"),
        ({"teachers": {1: None}}, "teachers holds 1; a teacher is a folder"),
        ({"teachers": {"b": {"start": [1]}}}, "teacher 'b' starts from [1]"),
        ({"train.stages": [0.5, 0.5, float("nan")]}, "stages is (0.5, 0.5, nan); three shares"),
        ({"train.betas": [0.9, "x"]}, "betas is 'x'"),
        ({1: 2}, "overrides is {1: 2}; it takes a mapping"),
        ("train.lr", "overrides is 'train.lr'; it takes a mapping"),
        ({"token_budget": 0}, "token_budget is 0; it must be above 0"),
        ({"evaluate.dtype": "fp8"}, "unknown evaluate.dtype 'fp8'; one of float32, bfloat16"),
        ({"diagnose.images": 0}, "diagnose.images is 0; it takes a whole number above 0"),
        ({"diagnose.pages": 3}, "unknown key 'pages' in diagnose of"),
        ({"budgets": [-5]}, "budgets holds -5"),
        ({"side_budgets": [0.5]}, "side_budgets holds 0.5"),
        ({"train.lr": "fast"}, "lr is 'fast'"),
        ({"train.lr": float("nan")}, "lr is nan; it must be above 0"),
        ({"train.batch_size": 2.5}, "batch_size is 2.5"),
        ({"train.threads": 0}, "threads is 0"),
        ({"train.warmup": 2}, "warmup is 2.0; it must lie in 0..1"),
        ({"train.orient_share": 1.5}, "orient_share is 1.5; it must lie in 0..1"),
        ({"train.stages": [0.5, 0.5]}, "stages is (0.5, 0.5); three shares"),
        ({"init": "warm"}, "unknown init 'warm'; one of paper, mamba, identity"),
        ({"data": "laion"}, "unknown data 'laion'; one of toyworld, paper"),
        ({"evaluate.questions": 0}, "evaluate.questions is 0"),
        ({"evaluate.mirror": 3}, "evaluate.mirror is 3"),
        ({"side_seeds": ["all"]}, "side_seeds holds 'all'"),
        ({"more_seeds": {"C9": [3]}}, "unknown condition 'C9'"),
        ({"more_seeds": {"C3": 3}}, "more_seeds of C3 is 3"),
        ({"more_seeds": {"C3": ["x"]}}, "more_seeds of C3 holds 'x'"),
        ({"teachers": ["t"]}, "teachers is ['t']"),
        ({"teachers": {"t": 600}}, "teachers: 't' is 600; it takes arguments of train_teacher"),
        ({"teachers": {"a/toy": None, "b/toy": None}}, "teachers 'a/toy' and 'b/toy' have one name"),
        (
            {"teachers": {"b": {"start": "c"}, "c": {"seed": 1}}},
            "teacher 'b' starts from 'c', which must stand before it",
        ),
        ({"teachers": {"b": {"start": "b"}}}, "teacher 'b' starts from 'b', which must stand before it"),
    ],
)
def test_a_wrong_scale_is_refused(scale_file, overrides, message):
    with pytest.raises(ValueError) as error:
        load_scale("tiny", overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_scale_takes_values_of_a_key_s_kind_alone(scale_file):
    keys = [*SCALE_KEYS, *(f"{section}.{key}" for section, known in SECTION_KEYS.items() for key in known)]
    given = {key: taken(lambda value: load_scale("tiny", {key: value})) for key in keys}
    texts = {name: ["'some words'"] for name in ("teacher", "evaluate.mirror")} | {
        f"train.{name}": ["None", "'some words'"] for name in ("density_cache", "gradient_cache")
    }
    lists = dict.fromkeys(("side_seeds", "budgets", "side_budgets", "open_points"), ["[]"])
    mappings = dict.fromkeys(("teachers", "more_seeds", "train", "evaluate", "diagnose"), ["{}"])
    assert {key: values for key, values in given.items() if values} == texts | lists | mappings | {
        "gpu": ["True"],
        "train.threads": ["None"],
    }


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"b{i}: &b{i} {{<<: [*{a}, *{a}]}}\n" for i, a in enumerate(["a", *(f"b{i}" for i in range(40))])
)


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "lacks 'teacher'"),
        (b"# nothing\n", "lacks 'teacher'"),
        (b"- teacher\n", "tiny.yaml holds ['teacher']; it takes keys with values"),
        (b"toy", "tiny.yaml holds 'toy'"),
        (b"teacher: t\n\ttoken_budget: 5\n", "tiny.yaml can't be read: while scanning"),
        (b"train: {lr: 1\n", "tiny.yaml can't be read: "),
        (b"teacher: \xff\xfe\n", "tiny.yaml can't be read: 'utf-8' codec"),
        (b"teacher: t\0\n", "tiny.yaml can't be read: "),
        (
            b"teacher: t\ntoken_budget: 5\nteacher: u\n",
            "tiny.yaml can't be read: line 1 begins a mapping that has 'teacher' twice",
        ),
        (b"teacher: t\ntrain:\n  lr: 1\n  lr: 2\n", "line 3 begins a mapping that has 'lr' twice"),
        (b"teacher: &a [*a]\n", "more than 10,000 values"),
        (BOMB.encode(), "more than 10,000 values"),
        (MERGED.encode(), "more than 10,000 values"),
        (b"[" * 5000, "tiny.yaml can't be read: "),
        (b"teacher: !!python/object/apply:os.getcwd []\n", "tiny.yaml can't be read: "),
        (b"teacher: !!timestamp x\n", "tiny.yaml can't be read: "),
        (b"teacher: t\ntoken_budget: 5\n? [1]\n: 2\n", "tiny.yaml"),
        (b"teacher: t\ntoken_budget: " + b"9" * 5000, "tiny.yaml can't be read: "),
        (b"teacher: *t\n", "tiny.yaml can't be read: "),
        (b"a: 1\n---\nb: 2\n", "tiny.yaml can't be read: "),
    ],
    ids=range(20),
)
def test_a_file_that_is_no_scale_is_refused(scale_file, text, message):
    scale_file.write_bytes(text)
    with pytest.raises(ValueError) as error:
        load_scale("tiny")
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 600


def test_the_teachers_of_a_scale(scale_file):
    scale_file.write_text(
        scale_file.read_text() + "teachers: {t: &t {read_steps: 5, lr: 1.5e-3}, hub/b: , x/c: {<<: *t, start: t}}\n"
    )
    scale = load_scale("tiny", {"teachers": {"x/c": {"read_steps": 9}}})
    assert scale.teachers == {
        "t": {"read_steps": 5, "lr": 1.5e-3},
        "hub/b": {},
        "x/c": {"read_steps": 9, "lr": 1.5e-3, "start": "t"},
    }
    assert [scale.get_teacher(t) for t in (None, "t", "x/c")] == [("t", None), ("t", None), ("x/c", "c")]
    with pytest.raises(ValueError, match="^unknown teacher 'c' of scale tiny; one of t, hub/b, x/c$"):
        scale.get_teacher("c")


def test_more_seeds_are_of_their_conditions_alone(scale_file):
    scale = load_scale("tiny", {"seeds": [0, 1], "more_seeds": {"C3": [3], "C4": [3, 4]}})
    taken = {c: [s for s in range(6) if scale.takes(c, s)] for c in ("C1", "C3", "C4")}
    assert taken == {
        "C1": [0, 1, 2, 5],
        "C3": [0, 1, 2, 3, 5],
        "C4": [0, 1, 2, 3, 4, 5],
    }  # 2 and 5 are nobody's: a call may ask for them


def test_small_has_the_seeds_and_budgets_of_the_contrast(root, monkeypatch):
    monkeypatch.chdir(root)
    small = load_scale("small")
    seeds = {
        c: [s for s in (*small.seeds, *small.more_seeds.get(c, ())) if small.takes(c, s)] for c in small.conditions
    }
    assert {"C1", "C2", "C3", "C4", "C4-shuffled"} <= seeds.keys() and all(
        len(set(s)) >= (5 if c in ("C3", "C4") else 3) for c, s in seeds.items()
    )
    assert (
        len(set(small.budgets)) >= 4
        and small.token_budget in small.budgets
        and len({small.token_budget, *small.side_budgets}) >= 4
    )


def test_an_unknown_scale_and_an_unknown_condition_name_what_there_is(scale_file, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown scale 'toi'; one of tiny"):
        load_scale("toi")
    with pytest.raises(ValueError, match="unknown condition 'C9'; one of C0, C1"):
        get_condition("C9")
    monkeypatch.chdir(Path(tmp_path.anchor))
    with pytest.raises(ValueError, match="no workflow/scales at or above"):
        load_scale("tiny")


def test_a_misspelt_notebook_parameter_is_refused():
    check_parameters(
        {"scale": "toy", "In": [], "Out": {}, "_i": "", "print": print, "pytest": pytest}, ("scale", "seed")
    )
    with pytest.raises(ValueError, match="unknown parameter 'sed'; allowed: scale, seed"):
        check_parameters({"scale": "toy", "sed": 1}, ("scale", "seed"))


def test_a_parameter_of_a_notebook_takes_its_own_kind_of_value_alone():
    given = {name: taken(lambda value: check_parameters({name: value}, (name,))) for name in PARAMETERS}
    texts = dict.fromkeys(
        ("teacher", "student", "samples", "dtype", "runs", "out"), ["None", "'some words'"]
    ) | dict.fromkeys(("scale", "condition"), ["'some words'"])
    needed = dict(
        batch_size=[], table_images=[], pair=[], overrides=["{}", "{'some': 'words'}", "{1: nan}"], evaluate=["True"]
    )
    assert given == dict.fromkeys(PARAMETERS, ["None"]) | texts | needed | dict(
        side_budgets=["None", "[]"], ablate=["-1", "None"]
    )
