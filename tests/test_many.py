"Many runs in one process: the same numbers as alone, stopped, resumed and skipped; what is refused before any work."

import json
import re
import shutil
import time
from dataclasses import asdict
from functools import partial

import pytest
from huggingface_hub import try_to_load_from_cache

from heed_nb import checkpoints, trainer
from heed_nb.batch import alone, remove_runs, run_notebook
from heed_nb.files import write_file
from heed_nb.pages import teacher_lacks
from heed_nb.runs import write_run
from heed_nb.scales import load_scale

C4 = "outputs/smoke/runs/C4-seed0-budget3000"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr("heed_nb.batch._gpu", lambda: False)


def many(**given):
    "What nbs/runs/many.ipynb leaves behind: the state of each run by name, and which it began."
    left = run_notebook("nbs/runs/many.ipynb", dict(scale="smoke", conditions=["C4"]) | given)
    return {run.name: state for run, state in left["state"].items()}, [run.name for run in left["seconds"]]


@pytest.fixture(scope="module")
def copy(tmp_path_factory, copy_of_repository):
    return copy_of_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture(autouse=True)
def inside(copy, monkeypatch):
    monkeypatch.chdir(copy)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(scale="smal"), "unknown scale 'smal'; one of paper, roomy, small, smoke, toy"),
        (dict(conditions=["C9"]), "unknown condition 'C9'; one of C0"),
        (dict(seeds=["0"]), "seeds is ['0']; it takes a list of whole numbers"),
        (dict(seeds=[]), "seeds is []; it takes a list of whole numbers"),
        (dict(budgets=[7]), "unknown budget 7 of scale smoke; one of 3000"),
        (
            dict(teachers=["toy"]),
            "unknown teacher 'toy' of scale smoke; one of outputs/teachers/toy-qwen3vl, outputs/sm",
        ),
        (dict(minutes=-1), "minutes is -1; it takes a number above 0, or nothing"),
        (dict(minutes=float("nan")), "minutes is nan; a parameter of a notebook is plain, finite data"),
        (dict(evaluate=1), "evaluate is 1; it takes True or False"),
        (
            dict(scale="paper"),
            "scale paper can't train here: its data 'paper' is not prepared; `make data SCALE=paper` prepares it; ",
        ),
        (dict(minute=1), "unknown parameter 'minute' of nbs/runs/many.ipynb; allowed: scale"),
    ],
)
def test_a_wrong_choice_is_refused_in_one_line_before_any_work(given, message, copy):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        many(**given)
    assert "\n" not in str(error.value) and not (copy / "outputs/smoke").exists()


CAN_NOT_TRAIN = (
    "scale paper can't train here: its data 'paper' is not prepared; `make data SCALE=paper` prepares it; teacher "
    "'Qwen/Qwen3-VL-8B-Instruct' is neither a folder nor in the hub's local cache: `hf download "
    "Qwen/Qwen3-VL-8B-Instruct` brings it there; it needs a GPU, and PyTorch finds none here"
)


def teacher_with(**given):
    return dict(overrides={"teachers": {"outputs/smoke/teacher": given}}, out="x")


@pytest.mark.parametrize(
    "run, given, message",
    [
        ("distill", dict(scale="paper"), CAN_NOT_TRAIN),
        (
            "distill",
            dict(teacher="outputs/smoke/teacher"),
            "scale smoke can't train here: unknown teacher 'outputs/smoke",
        ),
        (
            "distill",
            dict(overrides={"train.lr": 1.0}),
            "overrides {'train.lr': 1.0} make another run than scale smoke's: g",
        ),
        ("distill", dict(out=""), "out is ''; it takes a text that is not empty, or nothing"),
        ("distill", dict(seed=-1), "seed is -1; it takes a whole number from 0 to 4294967295"),
        ("distill", dict(deadline=float("inf")), "deadline is inf; a parameter of a notebook is plain, finite data"),
        ("distill", dict(token_budget=0), "token_budget is 0; it takes a whole number above 0, or nothing"),
        (
            "distill",
            dict(overrides={"train.stages": [0.5, 0.5, "x"]}, out="x"),
            "scale smoke: train.stages is [0.5, 0.5, 'x']; it takes 3 numbers from 0 to 1",
        ),
        (
            "evaluate",
            dict(scale="paper"),
            "teacher 'Qwen/Qwen3-VL-8B-Instruct' is neither a folder nor in the hub's loca",
        ),
        (
            "evaluate",
            dict(condition="C1"),
            "no student in outputs/smoke/runs/C1-seed0-budget3000; run nbs/runs/distill",
        ),
        (
            "evaluate",
            dict(condition="C4+"),
            "no student in outputs/smoke/runs/C4+-seed0-budget3000; run nbs/runs/posttrain",
        ),
        (
            "posttrain",
            dict(condition="C4+"),
            "no student in outputs/smoke/runs/C4-seed0-budget3000; run nbs/runs/distill",
        ),
        ("posttrain", dict(condition="C0"), "condition 'C0' has no SFT and DPO; these have: C0+, C1+"),
        (
            "posttrain",
            dict(condition="C4+", student="outputs/teachers/toy-qwen3vl", out="x"),
            "condition 'C4+' starts from a hybrid with mamba2; the checkpoint is no hybrid",
        ),
        ("posttrain", dict(student="outputs/teachers/toy-qwen3vl"), "overrides and another student make another run"),
        ("posttrain", dict(scale="toy"), "scale toy has no sft and dpo; give their samples in its file or as overri"),
        ("diagnose", dict(layers=[]), "layers is []; it takes a list of whole numbers of 0 or more, or nothing"),
        ("teacher", dict(teacher=["a"]), "teacher is ['a']; it takes a text that is not empty, or nothing"),
        ("teacher", teacher_with(read_steps=-1), "read_steps is -1; it must be 0 or more"),
        ("teacher", teacher_with(kinds=["form", "poem"]), "unknown kinds 'poem'; of "),
        ("teacher", teacher_with(steps=1), "unknown key 'steps' in teachers of scale smoke"),
    ],
)
def test_a_run_that_can_not_be_is_refused_in_one_line_before_any_work(run, given, message, copy):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        run_notebook(f"nbs/runs/{run}.ipynb", given)
    assert "\n" not in str(error.value) and not (copy / "outputs/smoke").exists()


@pytest.mark.parametrize(
    "lacking, message",
    [
        ((), ""),
        (("config.json",), "teacher 'org/model' is neither a folder nor in the hub's local cache"),
        (("b.safetensors",), "teacher 'org/model' lacks b.safetensors"),
        (("model.safetensors.index.json",), "teacher 'org/model' lacks model.safetensors"),
    ],
)
def test_a_teacher_in_the_hubs_cache_is_one_that_is_whole(lacking, message, tmp_path, monkeypatch):
    folder = tmp_path / "models--org--model"
    weights = '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}'
    write_file(folder / "refs/main", "c0")
    for name in {"config.json", "model.safetensors.index.json", "a.safetensors", "b.safetensors"} - {*lacking}:
        write_file(folder / "snapshots/c0" / name, weights)
    monkeypatch.setattr("heed_nb.pages.try_to_load_from_cache", partial(try_to_load_from_cache, cache_dir=tmp_path))
    assert teacher_lacks("org/model").startswith(message) and bool(teacher_lacks("org/model")) == bool(message)


@pytest.mark.parametrize(
    "kind, key, was",
    [("distill", "lr", 1), ("distill", "init", "mamba"), ("evaluate", "questions", 3), ("posttrain", "dpo.beta", 0.3)],
)
def test_what_was_made_with_other_settings_is_refused(kind, key, was, copy):
    scale, condition = load_scale("smoke"), "C4+" if kind == "posttrain" else "C4"
    folder = copy / f"outputs/smoke/runs/{condition}-seed7-budget3000"
    made = dict(teacher=scale.teacher, data=scale.data, init=scale.init, settings=asdict(scale.settings("C4", seed=7)))
    if kind == "evaluate":
        write_run(folder / "distill.json", "distill", made, {})
    changed = {key: was} if key in ("init", "questions") else dict(settings=made["settings"] | {key: was})
    write_run(folder / f"{kind}.json", kind, made | changed, {})
    with pytest.raises(
        ValueError, match=rf"{kind}.json was made with {key} = {was!r}, scale smoke has .*; remove its folder$"
    ):
        many(seeds=[7], conditions=[condition])
    made_by = {"evaluate": ["distill.json"]}.get(kind, [])
    assert sorted(path.name for path in folder.iterdir()) == sorted({*made_by, f"{kind}.json"})
    shutil.rmtree(copy / "outputs/smoke")


def test_beside_another_batch_it_is_refused(copy):
    import heed_nb.lmms_model  # noqa: F401  before lmms-eval, which else lets PIL read truncated images from then on

    # isort: split
    from lmms_eval import evaluator

    evaluator._enable_reentrant_filelocks()  # as an evaluation does: filelock's locks then let their own process in
    with (
        alone(load_scale("smoke")),
        pytest.raises(ValueError, match="^another batch is running at scale smoke; wait for it or stop it$"),
    ):
        many()
    with alone(load_scale("smoke")):  # and has let go of nothing that is not its own
        assert not (copy / "outputs/smoke/runs").exists()
    shutil.rmtree(copy / "outputs/smoke")


def test_runs_are_removed_once_they_are_named_and_confirmed(copy, capsys):
    kept, folder = write_file(copy / "outputs/published/smoke/claims.md", "kept"), copy / "outputs/smoke"
    remove_runs("smoke")
    assert "nothing in" in capsys.readouterr().out and not folder.exists()
    files = [
        write_file(folder / name, "hours")
        for name in (
            "runs/C4/distill.json",
            "runs/C4/checkpoint/step-5.safetensors",
            "teacher/checkpoint.safetensors",
            "tables/table_01.md",
        )
    ]
    for confirmed in ("", "toy"):
        with pytest.raises(
            ValueError, match="^nothing is removed; `make clean-runs SCALE=smoke CONFIRM=smoke` removes all of "
        ):
            remove_runs("smoke", confirmed)
        assert all(file.exists() for file in files)
    with alone(load_scale("smoke")), pytest.raises(ValueError, match="another batch is running"):
        remove_runs("smoke", "smoke")
    remove_runs("smoke", "smoke")
    named = capsys.readouterr().out
    assert "runs/C4: checkpoint, distill.json" in named and "teacher: checkpoint.safetensors" in named
    assert kept.exists() and not any(folder.iterdir())
    folder.rmdir()


def test_stopped_resumed_and_skipped_it_has_the_numbers_of_runs_alone(copy, tmp_path, monkeypatch):
    assert many(minutes=1e-9)[1] == [] and not (copy / C4).exists()

    rate, clock = trainer.learning_rate, [time.time()]
    with monkeypatch.context() as slow:  # a clock that only the first step moves
        slow.setattr(time, "time", lambda: clock[0])
        slow.setattr(trainer, "learning_rate", lambda *given: clock.append(clock.pop() + 120) or rate(*given))
        states, began = many(minutes=1, teachers=["outputs/teachers/toy-qwen3vl"], evaluate=False)
    assert (states, began) == ({"C0": "to evaluate", "C4-seed0-budget3000": "begun"}, ["C4-seed0-budget3000"])
    assert checkpoints.load_checkpoint(copy / C4)[1]["step"] == 1 and not (copy / C4 / "student").exists()
    assert "OutOfTime" in (copy / C4 / "distill.ipynb").read_text()

    states, began = many()
    assert began == ["C0", "C4-seed0-budget3000"]
    assert states == dict.fromkeys(began, "done") | {
        "teacher/C0": "no teacher",
        "teacher/C4-seed0-budget3000": "no teacher",
    }
    before = contents(copy / "outputs/smoke")
    assert many()[1] == [] and contents(copy / "outputs/smoke") == before

    given = dict(scale="smoke", condition="C4", out=str(tmp_path / "run"))
    for kind in ("distill", "evaluate"):
        run_notebook(f"nbs/runs/{kind}.ipynb", given)
        ours, alone = (json.loads((folder / f"{kind}.json").read_text()) for folder in (copy / C4, tmp_path / "run"))
        assert ours["parameters"] == alone["parameters"]
        timeless = lambda numbers: {key: value for key, value in numbers.items() if "second" not in key}
        assert timeless(ours["numbers"]) == timeless(alone["numbers"])
    weights = "student/model.safetensors"
    assert (copy / C4 / weights).read_bytes() == (tmp_path / "run" / weights).read_bytes()


def test_a_run_that_fails_leaves_the_others_and_is_named(copy, monkeypatch):
    def broken(*_):
        raise FloatingPointError("loss is nan")

    monkeypatch.setattr(trainer, "learning_rate", broken)
    with pytest.raises(
        RuntimeError, match="^1 of 1 runs failed; .* C4-seed1-budget3000: FloatingPointError: loss is nan$"
    ):
        many(seeds=[1], teachers=["outputs/teachers/toy-qwen3vl"], evaluate=False)
    assert "loss is nan" in (copy / "outputs/smoke/runs/C4-seed1-budget3000/distill.ipynb").read_text()
