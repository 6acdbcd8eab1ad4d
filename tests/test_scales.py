"Scales and the parameters of notebooks: what is read, and one line for each wrong value or broken file."

from pathlib import Path

import pytest

from heed_nb.conditions import TrainSettings
from heed_nb.parameters import NotebookParameters, annotations, check_parameters
from heed_nb.scales import Diagnosis, Evaluation, Finetuning, Preference, Preparation, Scale, Training, load_scale
from test_conditions import taken


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
    assert load_scale("tiny").settings().lr == 1e-3 and load_scale("tiny").train == {"lr": 1e-3, "threads": 2}


def test_nothing_means_all_questions(scale_file, root, monkeypatch):
    scale_file.write_text("teacher: t\ntoken_budget: 1000\nevaluate:\n  questions:  # all\n")
    assert load_scale("tiny").evaluate == {"questions": None}
    monkeypatch.chdir(root)
    assert load_scale("paper").evaluate["questions"] is None


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"condition": "C4"}, "unknown key 'condition' in the scale or its overrides; allowed: teacher, token_budget"),
        ({"name": "toy"}, "unknown key 'name'"),
        ({"train.learning_rate": 1}, "unknown key 'learning_rate' in train; allowed: batch_size"),
        ({"train.seed": 1}, "unknown key 'seed' in train"),
        ({"conditions": ["C1", "C9"]}, "unknown condition 'C9'; one of C0, C1"),
        ({"more_seeds": {"C9": [3]}}, "unknown condition 'C9'"),
        ({"conditions": "C1"}, "conditions is 'C1'; it takes a list of names"),
        ({"seeds": ["zero"]}, "seeds is ['zero']; it takes a list of whole numbers from 0 to 4294967295"),
        ({"seeds": []}, "seeds is []"),
        ({"more_seeds": {"C3": 3}}, "more_seeds is {'C3': 3}; it takes a mapping of names to lists of whole numbers"),
        ({1: 2}, "overrides is {1: 2}; it takes a mapping"),
        ("train.lr", "overrides is 'train.lr'; it takes a mapping"),
        ({"train": 3}, "train is 3; it takes a mapping"),
        ({"evaluate.dtype": "fp8"}, "evaluate.dtype is 'fp8'; it takes one of float32, bfloat16"),
        ({"evaluate.questions": 0}, "evaluate.questions is 0; it takes a whole number above 0, or nothing"),
        ({"train.lr": "fast"}, "train.lr is 'fast'; it takes a number above 0"),
        ({"train.stages": [0.5, 0.4, 0.3]}, "stages is (0.5, 0.4, 0.3); three shares"),
        ({"dpo.rank": 0}, "dpo.rank is 0; it takes a whole number above 0"),
        ({"sft.batch_size": 3, "sft.micro_batch": 2}, "batch_size is 3; it takes a multiple of micro_batch, 2"),
        ({"init": "warm"}, "init is 'warm'; it takes one of paper, mamba, identity"),
        ({"teachers": {"t": 600}}, "teachers is {'t': 600}; it takes a mapping of names to mappings, or nothing"),
        ({"teachers": {"b": {"start": [1]}}}, "start of teacher 'b' is [1]; it takes a name, or nothing"),
        ({"teachers": {"a/toy": None, "b/toy": None}}, "teachers 'a/toy' and 'b/toy' have the same name"),
        ({"teachers": {"b": {"start": "c"}, "c": {}}}, "teacher 'b' starts from 'c', which must come before it"),
        ({"teachers": {"b": {"start": "b"}}}, "teacher 'b' starts from 'b', which must come before it"),
    ],
)
def test_a_wrong_scale_is_refused(scale_file, overrides, message):
    with pytest.raises(ValueError) as error:
        load_scale("tiny", overrides)
    assert f"scale tiny: {message}" in str(error.value) and "\n" not in str(error.value)


def test_a_scale_takes_values_of_a_key_s_kind_alone(scale_file):
    sections = dict(
        prepare=Preparation, train=Training, sft=Finetuning, dpo=Preference, evaluate=Evaluation, diagnose=Diagnosis
    )
    keys = [
        *annotations(Scale),
        *(f"{name}.{key}" for name, section in sections.items() for key in annotations(section)),
    ]
    given = {key: taken(lambda value: load_scale("tiny", {key: value})) for key in keys}
    texts = dict.fromkeys(("teacher", "data", "evaluate.mirror"), ["'some words'"])
    texts["prepare.copies"] = ["None", "'some words'"]
    switches = dict.fromkeys(("gpu", "density_cache", "gradient_cache"), ["True"])
    lists = dict.fromkeys(
        ("side_seeds", "budgets", "side_budgets", "page_conditions", "open_points", "dpo.targets", "prepare.also"),
        ["[]"],
    )
    mappings = dict.fromkeys(("teachers", "more_seeds", "prepare.limits", *sections), ["{}"])
    numbers = dict.fromkeys(("train.threads", "evaluate.questions", "prepare.samples"), ["None"]) | {
        f"{section}.{key}": ["None"] for section in ("sft", "dpo") for key in ("samples", "micro_batch", "threads")
    }
    assert {key: values for key, values in given.items() if values} == texts | lists | mappings | numbers | switches


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"b{i}: &b{i} {{<<: [*{a}, *{a}]}}\n" for i, a in enumerate(["a", *(f"b{i}" for i in range(40))])
)


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "scale tiny: it lacks teacher, token_budget"),
        (b"teacher: t\n", "scale tiny: it lacks token_budget"),
        (b"- teacher\n", "tiny.yaml holds ['teacher']; it takes keys with values"),
        (b"teacher: t\n\ttoken_budget: 5\n", "tiny.yaml can't be read: while scanning"),
        (b"teacher: \xff\xfe\n", "tiny.yaml can't be read: 'utf-8' codec"),
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
        (b"teacher: t\ntoken_budget: 5\n? [1]\n: 2\n", "tiny.yaml"),
        (b"teacher: t\ntoken_budget: " + b"9" * 5000, "tiny.yaml can't be read: "),
        (b"teacher: *t\n", "tiny.yaml can't be read: "),
        (b"a: 1\n---\nb: 2\n", "tiny.yaml can't be read: "),
    ],
    ids=range(16),
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


def test_an_unknown_scale_names_what_there_is(scale_file, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown scale 'toi'; one of tiny"):
        load_scale("toi")
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
    names = list(annotations(NotebookParameters))
    given = {name: taken(lambda value: check_parameters({name: value}, (name,))) for name in names}
    texts = dict.fromkeys(
        ("teacher", "student", "samples", "dtype", "runs", "out"), ["None", "'some words'"]
    ) | dict.fromkeys(("scale", "condition"), ["'some words'"])
    needed = dict(
        batch_size=[], table_images=[], pair=[], overrides=["{}", "{'some': 'words'}", "{1: nan}"], evaluate=["True"]
    )
    assert given == dict.fromkeys(names, ["None"]) | texts | needed | dict(
        side_budgets=["None", "[]"], ablate=["-1", "None"]
    )
