"The smoke batch end to end, and its faults: wrong choices, a failing run, SIGKILL, two batches at once."

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

RUN = "outputs/smoke/runs/C4-seed0-budget3000"
pytestmark = pytest.mark.slow


PLACE = 'my  "wörk" 100% it\'s $HOME {x} & co;'  # of the repository: a name that shells and formats would read


def command(target, *options, **config):
    choices = [f"{key}={value}" for key, value in ({"scale": "smoke"} | config).items()]
    return [".venv/bin/python", "-m", "snakemake", *options, "--config", *choices, "--", target]


def batch(repository, target, **config):
    "A call of snakemake: exit code and everything it said."
    done = subprocess.run(
        command(target, **config), cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def jobs(said):
    "The jobs that were begun."
    return re.findall(r"Job \d+: (.*)", said)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


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
    "The repository after `make all SCALE=smoke`, and what was said."
    code, said = batch(repository, "all")
    assert code == 0, said
    return repository, said


def planned(repository, target, **config):
    "The jobs of a dry run, or what it said where it was refused."
    done = subprocess.run(
        command(target, "--dry-run", **config),
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return jobs(done.stdout) if done.returncode == 0 else done.stdout


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
    ladder = {f"{kind} C{i}, seed 0, {budget}" for kind in ("distill", "evaluate") for i in range(1, 5)} | {
        "evaluate C0, the teacher"
    }
    first = set(planned(four_teachers, "tables", scale="toy"))
    assert {job for job in first if " C" in job} == ladder and not {"table_03_runs", "table_05", "table_06"} & first
    everything = planned(four_teachers, "all", scale="toy", seeds="0")
    others = {
        re.sub(" C", f" {name}/C", job) for name in ("toy-internvl", "toy-glm4v", "toy-minicpmv") for job in ladder
    }
    at_budget = {job for job in everything if budget in job or "C0" in job}
    beside = (
        "C5",
        "C6",
        "-Residual",
        "-Density",
        "+LD",
        "+SL",
        "tau-0.25",
        "tau-1",
        "beta-1",
        "beta-4",
        "LoLCATs",
        "MOHAWK",
        "MaTVLM",
        "mmMamba",
        *(f"{arm}-{k}" for arm in ("mask", "random") for k in (10, 25, 50)),
    )
    tried = (
        "C4-init=mamba",
        "C4-normalize_over=visual",
        "C4-reduce=max",
        "C5-temper=0.5",
        "C3-forced",
    )  # of the open points
    assert at_budget == ladder | others | {
        f"{kind} {c}, seed 0, {budget}" for kind in ("distill", "evaluate") for c in (*beside, *tried)
    }
    assert (
        {"table_03_runs", "table_05", "table_06"} <= set(everything)
        and not any("train" in job for job in everything)
        and len(everything) == len(set(everything))
    )


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
    graph = subprocess.run(
        command("teachers", "--dag", scale="toy"), cwd=four_teachers, capture_output=True, text=True
    ).stdout
    number = {name: re.search(rf"(\d+)\[.*train_{name.replace('-', '_')}", graph)[1] for name in names}
    assert all(re.search(rf"\b{number['toy-qwen3vl']} -> {number[name]}\b", graph) for name in names[1:])
    assert sorted(planned(four_teachers, "teachers", scale="toy"))[:4] == sorted(
        f"train the teacher outputs/teachers/{name}" for name in names
    )


def test_a_start_that_is_not_there_is_refused(four_teachers):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            "-k",
            "python3",
            "nbs/runs/teacher.ipynb",
            "out.ipynb",
            "-y",
            "{overrides: {teachers: {outputs/smoke/teacher: {start: outputs/teachers/nobody}}}, out: outputs/smoke/x}",
        ],
        cwd=four_teachers,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode
        and "ValueError: teacher 'outputs/smoke/teacher' starts from 'outputs/teachers/nobody', which is not there; train that first"
        in done.stderr
    )
    assert not (four_teachers / "outputs/smoke").exists()


@pytest.mark.parametrize(
    "choice, message",
    [
        (dict(scale="toi"), "unknown scale 'toi'; one of nobody, paper, small, smoke, toy"),
        (dict(conditions="C1 C9"), "unknown condition 'C9'; one of C0, C1"),
        (dict(seeds="0 one"), "unknown seed 'one'; a seed is a whole number"),
        (dict(seeds="-1"), "unknown seed '-1'"),
        (dict(seeds=2**32), f"unknown seed {2**32}; a seed is a whole number from 0 to"),
        (dict(scale=""), "scale is empty; leave it out, or name one"),
        (dict(conditions=""), "conditions is empty"),
        (dict(seeds=""), "seeds is empty"),
        (
            dict(scale="nobody"),
            "scale nobody can't train here: unknown teacher 'outputs/teachers/nobody'; there are outputs/teachers/toy-",
        ),
        (
            dict(scale="paper"),
            "scale paper can't train here: its data 'paper' is not built yet, only toyworld is; teacher 'Qwen/Qwen3-VL-8B-Instruct' is neither",
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
    assert not any((repository / "outputs" / name).exists() for name in ("smoke", "toy", "nobody"))


def test_all_of_smoke(finished):
    repository, said = finished
    out = repository / "outputs/smoke"
    assert sorted(path.stem for path in (repository / "nbs/paper").glob("*.ipynb")) == sorted(
        path.stem for path in (out / "tables").glob("*.md")
    )
    for name in (
        "C0",
        "C1-seed0-budget3000",
        "C4-seed0-budget3000",
        "C6-seed0-budget3000",
        "teacher/C0",
        "teacher/C4-seed0-budget3000",
    ):
        run = json.loads((out / "runs" / name / "evaluate.json").read_text())
        assert run["parameters"]["model_type"] == ("internvl" if name.startswith("teacher/") else "qwen3_vl")
        assert len(run["numbers"]["scores"]) == 12 and all(
            0 <= score <= 100 for score in run["numbers"]["scores"].values()
        )
    assert not any(
        "Missing" in (out / f"tables/{name}.md").read_text()
        for name in ("table_01", "table_03_runs", "table_05", "table_06", "table_08", "table_09", "figure_a8")
    )
    assert "Table 1" in said and "| C4" in (out / "tables/table_01.md").read_text()


def test_a_second_call_does_nothing(finished):
    repository, _ = finished
    before = contents(repository / "outputs")
    code, said = batch(repository, "all")
    assert code == 0 and "Nothing to be done" in said and not jobs(said)
    assert contents(repository / "outputs") == before


def test_the_teacher_of_smoke_leaves_those_of_the_repository(finished):
    repository, said = finished
    assert (
        "train the teacher outputs/smoke/teacher" in jobs(said)
        and (repository / "outputs/smoke/teacher/teacher.json").exists()
    )
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "outputs/teachers"], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    ).stdout
    assert all(
        (repository / name).read_bytes() == (Path(__file__).parent.parent / name).read_bytes()
        for name in tracked.split("\0")
        if name
    )


def test_a_part_of_a_scale_has_tables_of_its_own(finished):
    repository, _ = finished
    before = contents(repository / "outputs")
    table = Path("outputs/smoke/parts/C4-seeds-0/tables/table_01.md")
    code, said = batch(repository, str(table), conditions="C4", seeds="0")
    assert code == 0 and jobs(said) == ["table_01"], said
    after = contents(repository / "outputs")
    assert {path: after[path] for path in before} == before and {
        path.parts[:4] for path in after.keys() - before.keys()
    } == {("smoke", "parts", "C4-seeds-0", name) for name in ("tables", "notebooks")}
    assert (
        "C4-seed0-budget3000" in (repository / table).read_text() and "C1-seed0" not in (repository / table).read_text()
    )


def test_a_seed_that_is_measured_in_part_stays_in_the_table(four_teachers, budget):
    "Beside the first seed, which is to be measured."
    made = [
        four_teachers / f"outputs/toy/runs/C4-seed2-budget{budget.split()[0]}/{kind}.json"
        for kind in ("distill", "evaluate")
    ]
    for path in made:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    shown = subprocess.run(
        command("tables", "--dry-run", "--printshellcmds", scale="toy"),
        cwd=four_teachers,
        capture_output=True,
        text=True,
    ).stdout
    shutil.rmtree(four_teachers / "outputs/toy")
    assert re.search(r"nbs/paper/table_01.ipynb .*\"seeds\": \[0, 2\]", shown) and not re.search(
        "distill C., seed 2", shown
    )


@pytest.mark.parametrize(
    "given, message",
    [
        *(
            (["clean", f"SCALE={scale}"], f"unknown scale '{scale}'; one of paper small smoke toy")
            for scale in (
                "teachers",
                "published",
                "smoke teachers",
                "toy/../teachers",
                "../scales/toy",
                ".",
                "%",
                "toy;touch hostile",
                "`touch hostile`",
                "'",
                "-rf",
            )
        ),
        (["clean", "SCALE="], "SCALE is empty"),
        (["clean-runs", "SCALE=  "], "SCALE is empty"),
        (["publish", "SCALE=nobody"], "unknown scale 'nobody'"),
        (["tables", "SEEDS="], "SEEDS is empty"),
        *(
            ([target, f"{name}=$(shell touch hostile)"], f"{name} holds a dollar sign")
            for target, name in (
                ("clean", "SCALE"),
                ("tables", "CONDITIONS"),
                ("all", "SEEDS"),
                ("many", "MINUTES"),
                ("many", "EVALUATE"),
                ("clean-runs", "CONFIRM"),
            )
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
        ("many", dict(CONDITIONS="C1'; touch hostile; '", MINUTES="1"), 'unknown condition "C1\';"'),
        ("many", dict(SEEDS='0" `touch hostile` "'), "unknown seed '0\"'"),
        ("many", dict(MINUTES=".nan"), "MINUTES is '.nan'; it takes a number above 0"),
        ("many", dict(EVALUATE="[yes"), "EVALUATE is '[yes'; it takes true or false"),
        ("many", dict(SCALE="paper", EVALUATE="false"), "scale paper can't train here: its data"),
        ("tables", dict(CONDITIONS='C1"; touch hostile; "'), "unknown condition 'C1\";'"),
        ("publish", dict(SCALE="toy"), "nothing to publish in"),
        ("clean-runs", dict(SCALE="toy", CONFIRM='"); open("hostile", "w'), "nothing in"),
    ],
)
def test_make_hands_over_what_it_is_given_as_it_is(repository, target, given, message):
    done = subprocess.run(
        ["make", "-o", ".venv/ok", target, *(f"{name}={value}" for name, value in given.items())],
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert [line for line in done.stdout.splitlines() if message in line] and "Traceback" not in done.stdout
    assert not (repository / "hostile").exists()


def test_a_failed_notebook_is_named_and_the_rest_is_done(finished):
    repository, _ = finished
    weights = repository / RUN / "student/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    (repository / RUN / "evaluate.json").unlink()
    (repository / "outputs/smoke/tables/table_10.md").unlink()
    before = contents(repository / "outputs/smoke/runs/C1-seed0-budget3000")

    code, said = batch(repository, "all")
    assert code != 0 and (repository / "outputs/smoke/tables/table_10.md").exists()
    failed = re.search(r"failed: (\S+)\n\s+(.*)", said)
    assert failed[1] == f"{RUN}/evaluate.ipynb" and "truncated" in failed[2]
    assert "truncated" in (repository / failed[1]).read_text()

    weights.write_bytes(whole)
    code, said = batch(repository, "all")
    assert code == 0 and jobs(said)[0] == "evaluate C4, seed 0, 3000 tokens"
    assert not any("distill" in job or "C1" in job or "C0" in job for job in jobs(said))
    assert contents(repository / "outputs/smoke/runs/C1-seed0-budget3000") == before


@pytest.mark.parametrize("victims", ["everything", "snakemake", "papermill"])
def test_a_killed_run_goes_on_to_the_same_bits(finished, tmp_path, victims):
    repository, _ = finished
    (tmp_path / "sitecustomize.py").write_text(STOP)
    folder, target = repository / RUN, f"{RUN}/distill.json"
    weights = (folder / "student/model.safetensors").read_bytes()
    for part in ("checkpoint", "student", "tensorboard"):
        shutil.rmtree(folder / part)
    (folder / "distill.json").unlink()
    before = contents(repository / "outputs")

    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    engine = psutil.Popen(
        command(target),
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | dict(PYTHONPATH=path),
    )
    below = stopped(engine)
    assert len(list(folder.glob("checkpoint/step-*.safetensors"))) == 1
    if victims == "everything":
        code, said = batch(repository, target)
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

    code, said = batch(repository, target)
    assert code == 0 and jobs(said) == ["distill C4, seed 0, 3000 tokens"], said
    assert (folder / "student/model.safetensors").read_bytes() == weights
    after = contents(repository / "outputs")
    assert {
        path
        for path in before
        if before[path] != after[path] and path.parts[:3] != folder.relative_to(repository / "outputs").parts
    } == set()
