"The smoke batch end to end, and its faults: wrong choices, a failing run, SIGKILL, two batches at once."

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import chdir, suppress
from pathlib import Path

import psutil
import pytest
import yaml

from heed_nb.batch import run_notebook

RUN = "outputs/smoke/runs/C4-seed0-budget3000"


PLACE = 'my  "wörk" 100% it\'s $HOME {x} & co;'  # of the repository: a name that shells and formats would read


def command(*targets, options=(), **config):
    choices = [f"{key}={value}" for key, value in ({"scale": "smoke"} | config).items()]
    return [".venv/bin/python", "-m", "snakemake", *options, "--config", *choices, "--", *targets]


def call(repository, *words):
    "Exit code and everything that was said."
    done = subprocess.run(words, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def batch(repository, *targets, **config):
    return call(repository, *command(*targets, **config))


def jobs(said):
    "The jobs that were begun."
    return re.findall(r"Job \d+: (.*)", said)


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder): path.read_bytes() for path in files}


# Put in front of PYTHONPATH: a process stops, as by SIGSTOP, before it puts its second checkpoint in place.
STOP = """
import os, signal, sys
checkpoints = []

def stop(event, args):
    if event == "os.rename" and "step-" in str(args[1]):
        checkpoints.append(args[1])
        if len(checkpoints) == 2: os.kill(os.getpid(), signal.SIGSTOP)

sys.addaudithook(stop)
"""


def stopped(engine):
    "Waits until a process below the engine has stopped; all that are below it."
    while True:
        assert engine.poll() is None, engine.communicate()[0]
        below = engine.children(recursive=True)
        with suppress(psutil.NoSuchProcess):
            if any(process.status() == psutil.STATUS_STOPPED for process in below):
                return below
        time.sleep(0.05)


@pytest.fixture(scope="module")
def repository(tmp_path_factory, copy_of_repository):
    "The repository as it is committed, beside an installation."
    copy = copy_of_repository(tmp_path_factory.mktemp("repository") / PLACE)
    (copy / ".venv").symlink_to(sys.prefix)
    return copy


@pytest.fixture(scope="module")
def finished(repository):
    "The repository after `make all SCALE=smoke`: each notebook as its shell command runs it, in this process."
    code, said = batch(repository, "all", options=["--dry-run", "--printshellcmds"])
    assert code == 0, said
    calls = [shlex.split(line) for line in re.findall(r"Shell command: (.*papermill.*)", said)]
    order = ("teacher", "distill", "posttrain", "evaluate", "diagnose")
    rank = {f"nbs/runs/{name}.ipynb": i for i, name in enumerate(order)}
    with chdir(repository):
        for words in sorted(calls, key=lambda words: rank.get(words[words.index("--no-progress-bar") + 1], len(order))):
            notebook, log, _, parameters = words[words.index("--no-progress-bar") + 1 :][:4]
            run_notebook(notebook, json.loads(parameters), log=log)
    return repository


def planned(repository, *targets, **config):
    "The jobs of a dry run, or what it said where it was refused."
    code, said = batch(repository, *targets, options=["--dry-run"], **config)
    return said if code else jobs(said)


@pytest.fixture(scope="module")
def four_teachers(tmp_path_factory, copy_of_repository):
    "The repository with the files of four toy teachers."
    repository = copy_of_repository(tmp_path_factory.mktemp("four"))
    (repository / ".venv").symlink_to(sys.prefix)
    for name in ("toy-internvl", "toy-glm4v", "toy-minicpmv"):
        folder = repository / "outputs/teachers" / name
        folder.mkdir(exist_ok=True)
        for file in ("config.json", "model.safetensors"):
            (folder / file).touch()
    return repository


@pytest.fixture(scope="module")
def budget(root):
    "Toy's token budget."
    return f"{yaml.safe_load((root / 'workflow/scales/toy.yaml').read_text())['token_budget']} tokens"


def test_tables_needs_the_first_teacher_alone_and_all_needs_every(four_teachers, budget):
    runs = lambda names: {f"{kind} {c}, seed 0, {budget}" for kind in ("distill", "evaluate") for c in names.split()}
    ladder = runs("C1 C2 C3 C4") | {"evaluate C0, the teacher"}
    not_of_tables = {"table_03_runs", "table_05", "table_06", "figure_03", "claims", "diagnose C1, seed 0"}
    first = set(planned(four_teachers, "tables", scale="toy"))
    assert {job for job in first if " C" in job} == ladder and not not_of_tables & first
    everything = planned(four_teachers, "all", scale="toy", seeds="0")
    others = {re.sub(" C", f" {of}/C", job) for of in ("toy-internvl", "toy-glm4v", "toy-minicpmv") for job in ladder}
    beside = "C5 C6 -Residual -Density +LD +SL tau-0.25 tau-1 beta-1 beta-4 LoLCATs MOHAWK MaTVLM mmMamba"
    beside += " mask-10 mask-25 mask-50 random-10 random-25 random-50"
    tried = "C4-init=mamba C4-normalize_over=visual C4-reduce=mean C4-reduce=max C5-temper=0.5 C3-forced"
    at_budget = {job for job in everything if budget in job or "C0" in job}
    assert at_budget == ladder | others | runs(beside) | runs(tried)
    assert not_of_tables <= set(everything) and len(everything) == len(set(everything))
    assert not any("train" in job for job in everything)


def test_seeds_and_conditions_narrow_every_table(four_teachers, budget):
    at_budget = [
        job
        for job in planned(four_teachers, "all", scale="toy", seeds="0 7", conditions="C1 C4")
        if "distill" in job and budget in job
    ]
    teachers = ("", "toy-internvl/", "toy-glm4v/", "toy-minicpmv/")
    assert sorted(at_budget) == sorted(
        f"distill {of}{c}, seed {s}, {budget}" for of in teachers for c in ("C1", "C4") for s in (0, 7)
    )


def test_a_teacher_that_is_not_trained_is_left_out(four_teachers):
    folder = four_teachers / "outputs/teachers/toy-glm4v"
    (folder / "config.json").rename(folder / "elsewhere")
    left = planned(four_teachers, "all", scale="toy")
    (folder / "elsewhere").rename(folder / "config.json")
    named = [any(f" {name}/" in job for job in left) for name in ("toy-internvl", "toy-glm4v", "toy-minicpmv")]
    assert named == [True, False, True]


def test_teachers_are_trained_again_a_start_first(four_teachers):
    names = ["toy-qwen3vl", "toy-internvl", "toy-glm4v", "toy-minicpmv"]
    _, graph = batch(four_teachers, "teachers", options=["--dag"], scale="toy")
    number = {name: re.search(rf"(\d+)\[.*train_{name.replace('-', '_')}", graph)[1] for name in names}
    assert all(re.search(rf"\b{number['toy-qwen3vl']} -> {number[name]}\b", graph) for name in names[1:])
    assert sorted(planned(four_teachers, "teachers", scale="toy"))[:4] == sorted(
        f"train the teacher outputs/teachers/{name}" for name in names
    )


def test_a_start_that_is_not_there_is_refused(four_teachers):
    given = dict(overrides={"teachers": {"outputs/smoke/teacher": {"start": "outputs/teachers/nobody"}}}, out="x")
    message = (
        "^teacher 'outputs/smoke/teacher' starts from 'outputs/teachers/nobody', which is not there; train that first"
    )
    with chdir(four_teachers), pytest.raises(ValueError, match=message):
        run_notebook("nbs/runs/teacher.ipynb", given)
    assert not (four_teachers / "x").exists()


@pytest.mark.parametrize(
    "choice, message",
    [
        (dict(scale="toi"), "unknown scale 'toi'; one of nobody, paper, roomy, small, smoke, toy"),
        (dict(conditions="C1 C9"), "unknown condition 'C9'; one of C0, C1"),
        (dict(seeds="0 -1"), "unknown seed '-1'; a seed is a whole number"),
        (dict(seeds=""), "seeds is empty; leave it out, or name one"),
        (
            dict(scale="nobody"),
            "scale nobody can't train here: unknown teacher 'outputs/teachers/nobody'; there are outp",
        ),
        (dict(condition="C1"), "unknown setting 'condition'; allowed: scale, conditions, seeds"),
    ],
)
def test_a_wrong_choice_is_refused_in_one_line_before_any_job(repository, choice, message):
    scale = repository / "workflow/scales/nobody.yaml"
    scale.write_text("teacher: outputs/teachers/nobody\ntoken_budget: 1000\n")
    code, said = batch(repository, "tables", **choice)
    scale.unlink()
    *loading, line = said.strip().splitlines()
    assert code != 0 and line.startswith(message) and len(loading) <= 3
    assert not (repository / "outputs/nobody").exists()


def test_all_of_smoke(finished, root):
    out = finished / "outputs/smoke"
    tables = {path.stem: path.read_text() for path in (out / "tables").glob("*.md")}
    assert tables.keys() == {path.stem for path in (finished / "nbs/paper").glob("*.ipynb")}
    for name in ("C0", "C1-seed0-budget3000", "C6-seed0-budget3000", "teacher/C0", "teacher/C4-seed0-budget3000"):
        run = json.loads((out / "runs" / name / "evaluate.json").read_text())
        assert run["parameters"]["model_type"] == ("internvl" if name.startswith("teacher/") else "qwen3_vl")
        scores = run["numbers"]["scores"].values()
        assert len(scores) == 12 and all(0 <= score <= 100 for score in scores)
    whole = ("table_01", "table_03_runs", "table_05", "table_06", "table_08", "table_09", "figure_a8")
    assert not any("Missing" in tables[name] for name in whole) and "| C4" in tables["table_01"]
    caches = [json.loads(path.read_text())["content"][0] for path in (out / "caches").glob("*/identity.json")]
    assert sorted(caches) == ["density", "density", "gradient"]  # of two teachers; C5's
    for file in (root / "outputs/teachers").rglob("*"):  # smoke's own teacher is elsewhere
        assert file.is_dir() or (finished / file.relative_to(root)).read_bytes() == file.read_bytes()


def test_a_second_call_makes_what_is_missing_alone(finished):
    before = contents(finished / "outputs")
    (finished / "outputs/smoke/tables/table_01.md").unlink()
    code, said = batch(finished, "all")
    assert code == 0 and jobs(said)[0] == "table_01" and len(jobs(said)) <= 2 and "Table 1" in said, said
    after = contents(finished / "outputs")
    assert {path.stem for path in after if after[path] != before.get(path)} == {"table_01"}
    assert after.keys() - before.keys() <= {Path("smoke/notebooks/table_01.log")} and not before.keys() - after.keys()
    code, said = batch(finished, "all")
    assert code == 0 and "Nothing to be done" in said and contents(finished / "outputs") == after


def test_a_part_of_a_scale_has_tables_of_its_own(finished):
    before, part = contents(finished / "outputs"), Path("smoke/parts/C4-seeds-0")
    code, said = batch(finished, f"outputs/{part}/tables/table_01.md", conditions="C4", seeds="0")
    assert code == 0 and jobs(said) == ["table_01"], said
    after = contents(finished / "outputs")
    assert {path: after[path] for path in before} == before
    assert {path.parents[1] for path in after.keys() - before.keys()} == {part}
    table = after[part / "tables/table_01.md"].decode()
    assert "C4-seed0-budget3000" in table and "C1-seed0" not in table


def test_a_seed_that_is_measured_in_part_stays_in_the_table(four_teachers, budget):
    "Beside the first seed, which is to be measured."
    made = [
        four_teachers / f"outputs/toy/runs/C4-seed2-budget{budget.split()[0]}/{kind}.json"
        for kind in ("distill", "evaluate")
    ]
    for path in made:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    _, shown = batch(four_teachers, "tables", options=["--dry-run", "--printshellcmds"], scale="toy")
    shutil.rmtree(four_teachers / "outputs/toy")
    assert re.search(r"nbs/paper/table_01.ipynb .*\"seeds\": \[0, 2\]", shown) and not re.search(
        "distill C., seed 2", shown
    )


@pytest.mark.parametrize(
    "given, message",
    [
        *(
            (["clean", f"SCALE={scale}"], f"unknown scale '{scale}'; one of paper roomy small smoke toy")
            for scale in ("teachers", "smoke teachers", "toy/../teachers", "%", "toy;touch hostile", "'", "-rf")
        ),
        (["clean", "SCALE="], "SCALE is empty"),
        (["clean-runs", "SCALE=  "], "SCALE is empty"),
        (["publish", "SCALE=nobody"], "unknown scale 'nobody'"),
        *(
            (["many", f"{name}=$(shell touch hostile)"], f"{name} holds a dollar sign")
            for name in ("SCALE", "CONDITIONS", "SEEDS", "MINUTES", "EVALUATE", "CONFIRM")
        ),
    ],
)
def test_make_refuses_what_is_no_scale_and_what_a_shell_would_run(repository, given, message):
    done = subprocess.run(["make", "-n", "-o", ".venv/ok", *given], cwd=repository, capture_output=True, text=True)
    assert done.returncode and not done.stdout and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (repository / "hostile").exists()


@pytest.mark.parametrize(
    "target, given, message",
    [
        ("many", dict(CONDITIONS="C1'; touch hostile; '", EVALUATE="[yes `touch hostile`"), "EVALUATE is '[yes `touch"),
        ("tables", dict(CONDITIONS='C1"; touch hostile; "'), "unknown condition 'C1\";'"),
        ("publish", dict(SCALE="toy"), "nothing to publish in"),
        ("clean-runs", dict(SCALE="toy", CONFIRM='"); open("hostile", "w'), "nothing in"),
    ],
)
def test_make_hands_over_what_it_is_given_as_it_is(repository, target, given, message):
    _, said = call(repository, "make", "-o", ".venv/ok", target, *(f"{name}={value}" for name, value in given.items()))
    assert [line for line in said.splitlines() if message in line] and "Traceback" not in said
    assert not (repository / "hostile").exists()


def test_a_failed_notebook_is_named_and_the_rest_is_done(finished):
    weights, results = finished / RUN / "student/model.safetensors", f"{RUN}/evaluate.json"
    table = "outputs/smoke/tables/table_10.md"
    whole, measured = weights.read_bytes(), json.loads((finished / results).read_text())["numbers"]
    weights.write_bytes(whole[:-1000])
    for name in (results, table):
        (finished / name).unlink()
    again = planned(finished, "all")
    assert "evaluate C4, seed 0, 3000 tokens" in again and "table_01" in again
    assert not any("distill" in job or "C1" in job or "C0" in job for job in again)

    code, said = batch(finished, results, table)
    assert code != 0 and (finished / table).exists()
    failed = re.search(r"failed: (\S+)\n\s+(.*)", said)
    assert failed[1] == f"{RUN}/evaluate.ipynb" and "model.safetensors is not the file that was saved" in failed[2]
    assert "model.safetensors is not the file that was saved" in (finished / failed[1]).read_text()

    weights.write_bytes(whole)
    code, said = batch(finished, results)
    assert code == 0 and jobs(said) == ["evaluate C4, seed 0, 3000 tokens"]
    again = json.loads((finished / results).read_text())["numbers"]  # by papermill
    assert again["scores"] == measured["scores"] and again["n"] == measured["n"]


@pytest.mark.parametrize("victims", ["everything", "snakemake", "papermill"])
def test_a_killed_run_goes_on_to_the_same_bits(finished, tmp_path, victims):
    (tmp_path / "sitecustomize.py").write_text(STOP)
    folder, target = finished / RUN, f"{RUN}/distill.json"
    weights = (folder / "student/model.safetensors").read_bytes()
    for part in ("checkpoint", "student", "tensorboard"):
        shutil.rmtree(folder / part)
    (folder / "distill.json").unlink()
    before = contents(finished / "outputs")

    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    engine = psutil.Popen(command(target), cwd=finished, env=os.environ | dict(PYTHONPATH=path), **pipes)
    below = stopped(engine)
    assert len(list(folder.glob("checkpoint/step-*.safetensors"))) == 1
    if victims == "everything":
        code, said = batch(finished, target)
        assert code != 0 and "another batch is running at scale smoke" in said and not jobs(said)
    killed = {
        "everything": [engine, *below],
        "snakemake": [engine],
        "papermill": [p for p in below if "papermill" in p.cmdline()[:3]],
    }[victims]
    assert killed
    for process in killed:
        process.kill()
    for process in below:
        with suppress(psutil.NoSuchProcess):
            process.resume()
    engine.communicate()

    code, said = batch(finished, target)
    assert code == 0 and jobs(said) == ["distill C4, seed 0, 3000 tokens"], said
    assert (folder / "student/model.safetensors").read_bytes() == weights
    after = contents(finished / "outputs")
    changed = [finished / "outputs" / path for path in before if before[path] != after[path]]
    assert all(folder in path.parents for path in changed)
