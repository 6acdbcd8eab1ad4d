"Runs as files under faults, the paper's numbers, and the tables made of both."

import csv
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from pathlib import Path

import nbformat
import pytest

import heed_nb
from heed_nb.conditions import BENCHMARKS
from heed_nb.figures import budget_figure, ladder_figure
from heed_nb.files import locked, write_file
from heed_nb.pages import PAGES, OpenPage, RunPlan
from heed_nb.paper_numbers import LADDER, made_up_runs, paper_checks, paper_table
from heed_nb.runs import code_version, publish, read_run, read_runs, run_name, write_run
from heed_nb.scales import Scale

ROOT = Path(__file__).resolve().parents[1]

# Files

FORK = multiprocessing.get_context("fork")


def write_far_too_much(path, limit, answer):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        write_run(path, "distill", {}, {"losses": [0.123456789] * 200000})
    except OSError as error:
        answer.send(str(error))


def refused(path, limit=None):
    "The one line with which a write that can't fit fails, leaving the earlier file, alone, in the folder."
    earlier = write_run(path, "distill", {"seed": 0}, {"loss": 1.0}).read_bytes()
    answer, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=write_far_too_much, args=(path, limit, there))
    process.start()
    there.close()
    error = answer.recv()
    process.join()
    assert re.fullmatch(r"\[Errno \d+\] could not write .*distill.json \(.+\); an earlier file is untouched", error)
    assert path.read_bytes() == earlier
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return error


def test_file_too_large(tmp_path):
    assert "File too large" in refused(tmp_path / "distill.json", 20000)


def test_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        assert "No space left on device" in refused(disk / "distill.json")
    finally:
        subprocess.run(["umount", disk], check=True)


def write_for_ever(path):
    for i in itertools.count():
        write_run(path, "distill", {}, {"i": [i] * 20000})


def test_killed_while_writing(tmp_path):
    path = tmp_path / run_name("C4", 0, 1000) / "distill.json"
    rng = random.Random(0)
    for _ in range(3):
        process = FORK.Process(target=write_for_ever, args=(path,))
        process.start()
        while not path.exists():
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.join()
        (run,) = read_runs(tmp_path, "distill")
        assert len(set(run["numbers"]["i"])) == 1 and len(run["numbers"]["i"]) == 20000
        assert (run["condition"], run["seed"], run["token_budget"]) == ("C4", 0, 1000)
    write_run(path, "distill", {}, {})
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # also what the killed writes left


def write_slowly(path, begun):
    begun.send(None)
    os.fsync = lambda descriptor: [begun.send(None), signal.pause()]
    write_file(path, "third")


def test_a_writer_removes_what_a_killed_one_left_and_nothing_of_a_live_one(tmp_path):
    begun, there = FORK.Pipe(duplex=False)
    writers = [FORK.Process(target=write_slowly, args=(tmp_path / name, there)) for name in ("a", "b")]
    for writer in writers:
        writer.start()
        begun.recv(), begun.recv()  # it holds its temporary file
    names = lambda: sorted(p.name.split(".")[1] for p in tmp_path.glob(".*"))
    write_file(tmp_path / "c", "first")
    assert names() == ["a", "b"]
    writers[0].kill()
    writers[0].join()
    (tmp_path / ".theirs.tmp").touch()  # of another program
    write_file(tmp_path / "c", "second")
    assert names() == ["b", "theirs"]
    writers[1].kill()
    writers[1].join()
    with locked(tmp_path):
        assert names() == ["lock", "theirs"]


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_a_file_has_the_permissions_of_the_umask(tmp_path, umask):
    earlier = os.umask(umask)
    try:
        assert write_file(tmp_path / "a", "").stat().st_mode & 0o777 == 0o666 & ~umask
    finally:
        os.umask(earlier)


def test_many_threads_write_one_file(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: write_file(tmp_path / "note", f"{n}" * 100), range(200)))
    content = (tmp_path / "note").read_text()
    assert content in {f"{n}" * 100 for n in range(200)} and [p.name for p in tmp_path.iterdir()] == ["note"]


def test_interrupt_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = write_file(tmp_path / "note.txt", "first")

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_file(path, "second")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"note.txt": "first"}


def test_run_says_where_it_ran(tmp_path, root):
    started = time.time() - 5.01  # it is rounded
    run = read_run(write_run(tmp_path / "run.json", "teacher", {"out": tmp_path / "x"}, {"loss": 0.5}, started=started))
    where = run["provenance"]
    assert 5 <= where["seconds"] <= time.time() - started + 0.001
    assert {"python", "heed_nb", "torch", "transformers"} <= where["versions"].keys()
    assert run["parameters"] == {"out": str(tmp_path / "x")}
    head = subprocess.run(["git", "rev-list", "-50", "HEAD"], cwd=root, capture_output=True, text=True).stdout.split()
    assert where["git"]["commit"] in (head or [None])


def test_code_outside_git_has_no_commit(tmp_path, monkeypatch):
    package = write_file(tmp_path / "heed_nb" / "__init__.py", "")
    write_file(tmp_path / "README.md", "one")
    monkeypatch.setattr(heed_nb, "__file__", str(package))
    git = lambda *words: subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words], cwd=tmp_path, check=True, capture_output=True
    )
    assert code_version() == {"commit": None, "dirty": None}
    git("init")
    assert code_version() == {"commit": None, "dirty": None}
    git("add", ".")
    git("commit", "-m", "one")
    assert code_version()["dirty"] is False and len(code_version()["commit"]) == 40
    write_file(tmp_path / "outputs" / "toy" / "note.txt", "not tracked")
    assert code_version()["dirty"] is False
    write_file(tmp_path / "README.md", "two")
    assert code_version()["dirty"] is True


# The paper


def test_where_the_paper_differs_from_itself():
    checks = paper_checks()
    differ = {(line.place, line.says, line.recomputed) for line in checks[~checks.agrees].itertuples()}
    assert differ == {
        ("Abstract", "13", 8.5),
        ("Abstract", "13", 11.35),
        ("A.4", "-0.9", -1.1),
        ("A.4", "at most 1", -1.1),
        ("A.5", "0.25", 0.15),
        ("A.8", "50.5", 54.5),
        ("A.9", "2.44", 3.5),
        ("A.9", "1.58", 2.24),
        ("Sect. 3.2", "0.05", 0.1),
        ("Tab. 12", "44", 44.7761),
        ("B.2", "500", 249.12),
    }


@pytest.mark.parametrize(
    "number, row, column, value",
    [
        (2, "reasoning", "C2+", "69.48"),
        (5, "chartqa", "C5", "85.6"),
        (6, "GLM-4.6V-Flash (9B)", "C4+", "61.2"),
        (7, "C5", "gpu_hours_2b_tokens", "260"),
        (9, "C4-C3", "fine_grained_spread", "0.37"),
        (11, "peak learning rate", "dpo", "1e-6"),
        ("A.8", "25", "density", "58.0"),
    ],
)
def test_transcription(number, row, column, value):
    assert paper_table(number, printed=True).loc[row, column] == value


# Tables from runs


def evaluated(folder, ocr, budget=2000, teacher=None, family="qwen3_vl", questions=100, **beside):
    "evaluate.json of one teacher by condition and seed: OCRBench v2, or all scores; 50 on what is not given."
    for condition, by_seed in ocr.items():
        for seed, score in by_seed.items():
            scores = dict.fromkeys(BENCHMARKS, 50) | (score if isinstance(score, dict) else dict(ocrbench_v2=score))
            name = run_name(condition, *((None, None) if condition == "C0" else (seed, budget)), teacher)
            numbers = dict(scores=scores, n=dict.fromkeys(scores, questions)) | beside
            write_run(folder / name / "evaluate.json", "evaluate", dict(model_type=family), numbers)
    return folder


def notebook(root, name, **parameters):
    "The namespace that a notebook of nbs/paper leaves behind, run here with these parameters."
    namespace = {}
    with chdir(root):
        for cell in nbformat.read(root / "nbs" / "paper" / f"{name}.ipynb", 4).cells:
            if cell.cell_type == "code":
                exec(cell.source, namespace)
                if "parameters" in cell.metadata.get("tags", []):
                    namespace.update(parameters)
    return namespace


def page(folder, name, ocr={}, **parameters):
    "A page on `evaluated` runs in a folder: its Markdown, its CSV by (teacher,) row and column, its namespace."
    evaluated(folder / "runs", ocr)
    namespace = notebook(ROOT, name, **dict(runs=folder / "runs", out=folder, token_budget=2000) | parameters)
    with open(folder / "tables" / f"{name}.csv", newline="") as file:
        key = lambda line: tuple(line[part] for part in ("teacher", "row", "column") if part in line)
        lines = {key(line): line for line in csv.DictReader(file)}
    return (folder / "tables" / f"{name}.md").read_text(), lines, namespace


def cell(markdown, row, column):
    "A cell of the first Markdown table that has the row."
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    header = [word.strip() for word in lines[0].split("|")]
    line = next(line for line in lines if line.split("|")[1].strip().strip("*") == row)
    return line.split("|")[header.index(column)].strip()


def test_table_1_from_runs(tmp_path):
    runs = read_runs(made_up_runs(tmp_path / "runs", budgets=(1000, 2000)))
    text, lines, _ = page(tmp_path, "table_01")
    of = lambda c: [r["numbers"]["scores"]["docvqa"] for r in runs if (r["condition"], r["token_budget"]) == (c, 2000)]
    assert cell(text, "DocVQA", "C4 HEED") == f"{statistics.mean(of('C4')):.1f} ± {statistics.stdev(of('C4')):.1f}"
    contrasts = text[text.index("| C4 – C3") :]
    assert re.match(r"\| C4 – C3 \| \*\*\+4\.\d ± 0\.\d\*\* \(n=3\) \| +\*\+4\.7\* \|", contrasts)
    assert "C1-seed{0,1,2}-budget2000" in text and "Missing" not in text
    line = lines["docvqa", "C4"]
    assert (line["paper"], line["n"], line["runs"].split()[0]) == ("92.9", "3", "C4-seed0-budget2000")
    assert lines["average", "C4-C3"]["verdict"] == "beats" and "loglik" not in line


def test_table_1_says_what_is_missing(tmp_path):
    made_up_runs(tmp_path / "runs", conditions=("C0", "C3", "C4"), seeds=(0,), budgets=(2000,))
    text, lines, _ = page(tmp_path, "table_01", seeds=[0])
    assert "**Missing**: C1-seed0-budget2000, C2-seed0-budget2000." in text
    assert cell(text, "DocVQA", "C1 KD") == "" and "| C4 – C1" not in text
    assert lines["average", "C4-C1"]["verdict"] == "not run"
    assert re.fullmatch(r"\+\d\.\d \(n=1\)", re.search(r"C4 – C3 \| +(.*?) \|", text)[1])


@pytest.mark.parametrize("conditions", [("C0",), ("C3", "C4")])
def test_table_1_of_a_part(tmp_path, conditions):
    made_up_runs(tmp_path / "runs", conditions=conditions, budgets=(2000,))
    path = next((tmp_path / "runs").glob(f"{conditions[0]}*/evaluate.json"))
    run = json.loads(path.read_text())
    del run["numbers"]["scores"]["docvqa"]
    write_file(path, json.dumps(run))
    text, _, _ = page(tmp_path, "table_01")
    assert ("| C4 – C3 |" in text) == (conditions != ("C0",)) and cell(text, "Δ vs. teacher", "C4 HEED") == ""
    assert ("None: no seed has both of a pair." in text) == (conditions == ("C0",))
    if conditions == ("C0",):
        assert cell(text, "Fine-grained Avg. (6)", "C0 Teacher") == ""


def test_measures_beside_the_scores_are_columns(tmp_path):
    for condition, loglik in (("C3", -0.5), ("C4", -0.25)):
        evaluated(tmp_path / "runs", {condition: {0: 60, 1: 61}}, loglik=dict.fromkeys(BENCHMARKS, loglik))
    evaluated(tmp_path / "runs", {"C1": {0: 50}})
    _, lines, _ = page(tmp_path, "table_01", seeds=[0, 1])
    of = lambda row, column: lines[row, column]["loglik"]
    assert (of("docvqa", "C3"), of("average", "C4"), of("average", "C4-C3")) == ("-0.5", "-0.25", "0.25")
    assert of("average", "C1") == "" and "kl" not in lines["average", "C4"]


@pytest.mark.parametrize(
    "name, given",
    [
        ("table_01", dict(conditions=["C4"])),
        ("figure_01", dict(token_budget=5)),
        ("claims", dict(runs="elsewhere")),
        ("table_01_budgets", dict(seeds=[0])),
        ("table_06", dict(teachers=["outputs/teachers/toy-glm4v"])),
        ("figure_06", dict(pair=["C1", "C4"])),
        ("open_points", dict(choices=["init=mamba"])),
        ("figure_03", dict(conditions=["C4"])),
    ],
)
def test_a_part_of_a_page_has_a_folder_of_its_own(name, given):
    ((key, value),) = given.items()
    another = f"{key} {value!r} makes another {name} than scale smoke's: give its folder as `out`"
    with pytest.raises(ValueError, match=f"^{re.escape(another)}$"):
        notebook(ROOT, name, scale="smoke", **given)
    assert not (ROOT / "outputs/smoke/tables").exists()


@pytest.mark.parametrize(
    "name, earlier",
    [
        *((name, False) for name in ("table_03_runs", "table_05", "table_06", "table_08", "table_09", "figure_a8")),
        ("table_01", True),
        ("figure_01", False),
    ],
)
def test_a_page_of_nothing_fails_in_one_line_and_leaves_the_earlier(tmp_path, name, earlier):
    path = tmp_path / "tables" / f"{name}.md"
    if earlier:
        write_file(path, "earlier")
    with pytest.raises(
        ValueError, match=r"^no run of C0, \w.* at 200000 tokens in .*; run `make all SCALE=toy` first$"
    ):
        notebook(ROOT, name, out=tmp_path, runs=tmp_path / "runs")
    assert [p.read_text() for p in tmp_path.rglob("*.*")] == ["earlier"] * earlier


@pytest.mark.parametrize(
    "parameters, message",
    [
        (dict(scael="toy"), "unknown parameter 'scael'; allowed: scale"),
        (dict(scale="toi"), "unknown scale 'toi'; one of "),
        (dict(conditions=["C9"]), "unknown condition 'C9'; one of C0"),
        (dict(conditions=[]), "conditions is []; it takes a list of names, or nothing"),
        (dict(seeds=[float("nan")]), "seeds is [nan]; it takes a list of whole numbers"),
        (dict(token_budget="200k"), "token_budget is '200k'; it takes a whole number above 0"),
        (dict(runs=""), "runs is ''; it takes a text that is not empty"),
    ],
)
def test_table_1_refuses(tmp_path, parameters, message):
    made_up_runs(tmp_path / "runs", conditions=("C0",))
    with pytest.raises(ValueError, match=re.escape(message)):
        page(tmp_path, "table_01", **parameters)
    assert not (tmp_path / "tables").exists()


def test_table_5_by_hand(tmp_path):
    ocr = {"C0": {None: 90}, "C3": {0: 1}}
    evaluated(tmp_path / "runs", ocr | {"C4": {0: 60, 1: 70}, "C6": {0: 66, 1: 71}})
    for c, gain in (("C4", 0), ("C6", 5)):
        evaluated(tmp_path / "runs", {c: {s: 40 + gain + s * s for s in (0, 1)}}, budget=1000)
    given = dict(side_budgets=[1000], conditions=["C0", "C4", "C6"])
    text, lines, _ = page(tmp_path, "table_05", seeds=[0, 1], **given)
    assert cell(text, "OCRBench v2", "C6 HEED-GDN") == "68.5 ± 3.5"
    assert cell(text, "OCRBench v2", "C5 HEED-G") == "" and "*59.8*" in text
    assert re.search(r"C6 – C4 \| +\+3\.5 ± 2\.5 \(n=2\) \| +\*\+0\.7\*", text)
    assert lines["ocrbench_v2", "C6-C4"]["verdict"] == "no clear difference"
    assert "Missing" not in text and "C3" not in text
    curve = text.partition("## Over token budgets")[2]
    assert [cell(curve, "C6", budget) for budget in ("1,000", "2,000")] == ["45.5 ± 0.7", "68.5 ± 3.5"]
    assert cell(curve, "C6 – C4", "1,000") == "**+5.0 ± 0.0** (n=2)"
    assert (tmp_path / "figures/table_05.png").read_bytes().startswith(b"\x89PNG")
    assert "C6-seed2-budget2000" in page(tmp_path, "table_05", seeds=[0, 2], **given)[0].partition("**Missing**")[2]


def test_table_6_by_hand(tmp_path):
    "Three teachers, the third without a run; of the paper's, one has no teacher here."
    runs, squares = tmp_path / "runs", statistics.stdev([0, 1, 4])
    evaluated(runs, {"C0": {None: 90}} | {c: {s: 40 + 10 * int(c[1]) + s * s for s in (0, 1, 2)} for c in LADDER[1:]})
    glm = {"C0": {None: 80}, "C1": {0: 30}, "C3": {0: 41, 1: 99}, "C4": {0: 39}}
    evaluated(runs, glm, teacher="toy-glm4v", family="glm4v")
    evaluated(runs, {"C3": {0: 30}, "C4": {0: 45}}, 1000, "toy-glm4v", "glm4v")
    text, lines, _ = page(tmp_path, "table_06", side_budgets=[1000])
    given = lambda *key: [float(lines[key][name] or "nan") for name in ("mean", "sd", "se", "n", "paper")]
    nan = float("nan")
    for teacher, column, expected in (
        ("toy-qwen3vl", "C4", [80 + 5 / 3, squares, nan, 3, 59.2]),
        ("toy-qwen3vl", "C4-C3", [10, nan, 0, 3, 4.7]),
        ("toy-glm4v", "C3", [41, nan, nan, 1, 55.0]),
        ("toy-glm4v", "C4-C3", [-2, nan, nan, 1, 3.7]),
        ("toy-glm4v", "C2", [nan, nan, nan, 0, 54.3]),
    ):
        assert given(teacher, "ocrbench_v2", column) == pytest.approx(expected, abs=1e-4, nan_ok=True), column
    assert cell(text, "toy-qwen3vl", "C4 HEED") == f"{80 + 5 / 3:.1f} ± {squares:.1f}"
    assert [cell(text, of, "C4 – C3") for of in ("toy-qwen3vl", "toy-glm4v")] == ["**+10.0 ± 0.0** (n=3)", "-2.0 (n=1)"]
    not_run = next(line for line in text.splitlines() if "MiniCPM-V 4.5" in line)
    assert not_run.split("|")[1].strip() == "not run" and "*58.8*" in not_run
    assert cell(text.partition("toy-glm4v:")[2], "C4 – C3", "1,000") == "**+15.0** (n=1)"
    missing = text.partition("**Missing**")[2]
    assert "toy-glm4v/C2-seed0-budget2000" in missing and "toy-internvl/C0" in missing
    assert "toy-glm4v/C3-seed0-budget1000" not in missing
    assert (tmp_path / "figures/table_06.png").read_bytes().startswith(b"\x89PNG")


def test_table_6_of_an_unknown_teacher(tmp_path):
    message = "^unknown teacher 'toy-glm' of scale toy; one of outputs/teachers/toy-qwen3vl, "
    with pytest.raises(ValueError, match=message):
        page(tmp_path, "table_06", teachers=["toy-glm"])
    assert not list(tmp_path.iterdir())


def test_the_scales_seeds_are_those_of_a_condition(tmp_path):
    evaluated(tmp_path, {"C0": {None: 90}, "C1": {0: 50, 1: 50}, "C4": {0: 50, 1: 50}})
    scale = Scale("made", "t", 2000, teachers={"t": {}}, seeds=(0,), more_seeds={"C4": (1, 2)})
    found, missing = OpenPage(PAGES["table_01"], RunPlan(scale), ["C0", "C1", "C4"], tmp_path, tmp_path).read()
    names = ["C0", "C1-seed0-budget2000", "C4-seed0-budget2000", "C4-seed1-budget2000"]
    assert [run["name"] for run in found] == names and missing == ["C4-seed2-budget2000"]


@pytest.mark.parametrize("budgets", [(1000, 2000), (1000,)])
def test_curve_and_figure(tmp_path, budgets):
    made_up_runs(tmp_path / "runs", budgets=budgets)
    given = dict(runs=tmp_path / "runs", out=tmp_path)
    curve = notebook(ROOT, "table_01_budgets", **given, budgets=list(budgets), seeds=[0, 1, 2])
    bars = notebook(ROOT, "figure_01", **given, token_budget=1000)
    for name in ("table_01_budgets", "figure_01"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "tables" / "table_01_budgets.md").read_text()
    assert all(cell(text, "C4 – C3", f"{budget:,}").startswith("**+") for budget in budgets)
    measured = curve["measured"]
    for figure in (ladder_figure(bars["cells"]), budget_figure({"a": measured[measured.row == "average"]})):
        assert figure.axes[0].get_ylim()[1] > 102  # a spread at 100 is not cut


def test_no_page_needs_tabulate():
    assert not [path.name for path in (ROOT / "nbs/paper").glob("*.ipynb") if "to_markdown" in path.read_text()]


@pytest.mark.parametrize(
    "name, holds",
    [
        ("table_03", "| C4: HEED"),
        ("table_10", "density-weighted RSA"),
        ("table_11", "LoRA r = 32"),
        ("table_12", "1,340,000"),
        ("consistency", "GLM-4.6V-Flash"),
    ],
)
def test_tables_that_need_no_run(tmp_path, name, holds):
    notebook(ROOT, name, scale="smoke", out=tmp_path)
    assert holds in (tmp_path / "tables" / f"{name}.md").read_text()
    assert {p.name for p in (tmp_path / "tables").iterdir()} == {f"{name}.md", f"{name}.csv"}


# Publishing


def test_publish_copies_records_and_no_weights(tmp_path):
    made_up_runs(tmp_path / "toy/runs", seeds=(0,), budgets=(1000,))
    write_file(tmp_path / "toy/tables/table_01.md", "table")
    evaluated(tmp_path / "toy/runs", {"C0": {None: 80}}, teacher="toy-glm4v", family="glm4v")
    of = lambda condition: tmp_path / "toy/runs" / run_name(condition, 0, 1000)
    for condition in ("C2", "C3", "C4"):
        for name in ("student/model.safetensors", "answers.jsonl", "evaluate.ipynb"):
            write_file(of(condition) / name, "large")
    write_run(of("mask-10") / "distill.json", "distill", {}, {})  # not evaluated: no table reads it
    write_run(of("C4") / "distill.json", "distill", {}, {})
    write_run(of("C3-forced") / "diagnose.json", "diagnose", {}, {})
    target = publish("toy", tmp_path)
    names = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert (
        names
        == {
            "manifest.json",
            "tables/table_01.md",
            "runs/C4-seed0-budget1000/distill.json",
            "runs/C3-forced-seed0-budget1000/diagnose.json",
            *(
                f"runs/{c}-seed0-budget1000/answers.jsonl" for c in ("C3", "C4")
            ),  # of Figure 6 and the claim on failures
            *(f"runs/{name}/evaluate.json" for name in ("C0", "toy-glm4v/C0")),
            *(f"runs/{c}-seed0-budget1000/evaluate.json" for c in LADDER[1:]),
        }
    )
    manifest = json.loads((target / "manifest.json").read_text())
    assert sum(map(len, manifest["commits"].values())) == 8 and manifest["files"].keys() == names - {"manifest.json"}


def test_publish_is_all_or_nothing(tmp_path, monkeypatch):
    write_file(tmp_path / "toy/tables/table_01.md", "first")
    target = publish("toy", tmp_path)
    write_file(tmp_path / "toy/tables/table_01.md", "second")
    rename = type(target).rename

    def interrupted(path, to):
        if ".fresh" in path.name:
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(type(target), "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish("toy", tmp_path)
    assert (target / "tables/table_01.md").read_text() == "first"
    assert [p.name for p in target.parent.iterdir()] == ["toy"]
    monkeypatch.undo()
    assert (publish("toy", tmp_path) / "tables/table_01.md").read_text() == "second"


@pytest.mark.parametrize("scale", ["", ".", "..", "published/toy", "toy/../teachers", "/toy"])
def test_what_is_no_scale_is_not_published(tmp_path, scale):
    write_file(tmp_path / "published/toy/tables/table_01.md", "earlier")
    with pytest.raises(ValueError, match="is not the name of a scale$|^nothing to publish in "):
        publish(scale, tmp_path)
    assert [p.name for p in tmp_path.glob("*")] == ["published"]
    assert [p.name for p in (tmp_path / "published").iterdir()] == ["toy"]


def test_publish_tells_of_mixed_code(tmp_path, capsys):
    made_up_runs(tmp_path / "toy/runs", ("C0", "C1"), seeds=(0,), budgets=(1000,))
    path = tmp_path / "toy/runs/C1-seed0-budget1000/evaluate.json"
    run = json.loads(path.read_text())
    run["provenance"]["git"] = {"commit": "f" * 40, "dirty": True}
    write_file(path, json.dumps(run))
    commits = json.loads((publish("toy", tmp_path) / "manifest.json").read_text())["commits"]
    assert "f" * 40 + "+" in commits
    assert "the runs are of 2 different states of the code" in capsys.readouterr().err
