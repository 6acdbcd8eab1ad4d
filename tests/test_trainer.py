"Runs that are killed, resumed, refused or out of disk, on a tiny random teacher."

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText

import tiny
from heed_nb import checkpoints as checkpointing
from heed_nb import files, objective, schedule, trainer
from heed_nb.conditions import CONDITIONS, TrainSettings
from heed_nb.data import BadSample
from heed_nb.hybrid import mixer_parameters, to_hybrid, transferred_parameters
from heed_nb.schedule import OutOfTime
from heed_nb.timing import Phases
from heed_nb.toy_teachers import train_teacher
from heed_nb.trainer import check_launch, checkpoints, distill

IMAGE = tiny.config("qwen3_vl").image_token_id
SETTINGS = TrainSettings(token_budget=1800, lr=1e-3, batch_size=4, checkpoint_every=4, threads=1)


tiny_teacher = partial(tiny.teacher, "qwen3_vl")


class Noise:
    "Samples of one 4x4-patch image of noise and a few tokens, made from their number."

    def __init__(self, bad=None):
        self.bad = bad  # the sample whose pixels are not numbers

    def __getitem__(self, index):
        g = torch.Generator().manual_seed(index)
        text = torch.randint(20, 48, (int(torch.randint(4, 12, (), generator=g)),), generator=g)
        pixels = torch.randn(16, 3 * 8 * 8, generator=g)
        if index == self.bad:
            pixels[0, 0] = torch.nan
        return dict(key=f"noise-{index}", ids=torch.cat([torch.tensor([12] + [IMAGE] * 4 + [13]), text]), pixels=pixels)


class FiniteNoise(Noise):
    def __init__(self, length):
        super().__init__()
        self.length = length

    def __len__(self):
        return self.length


def collate(samples):
    ids = [s["ids"] for s in samples]
    pad = lambda rows, value=0: pad_sequence(rows, batch_first=True, padding_value=value)
    labels = [torch.cat([torch.full((len(i) - 3,), -100), i[-3:]]) for i in ids]
    return dict(
        input_ids=pad(ids),
        attention_mask=pad([torch.ones_like(i) for i in ids]),
        labels=pad(labels, -100),
        mm_token_type_ids=pad([(i == IMAGE).long() for i in ids]),
        pixel_values=torch.cat([s["pixels"] for s in samples]),
        image_grid_thw=torch.tensor([[1, 4, 4]] * len(samples)),
        keys=[s["key"] for s in samples],
    )


def run(out, condition="C4", settings=SETTINGS, data=Noise(), teacher_seed=0, before=None, deadline=None):
    if before:
        before()
    teacher = tiny_teacher(seed=teacher_seed)
    recipe = CONDITIONS[condition] if isinstance(condition, str) else condition
    model = to_hybrid(teacher, mixer=recipe.mixer, weight_transfer=recipe.weight_transfer, seed=settings.seed)
    return distill(model, teacher, data, collate, recipe, settings, out, progress=False, deadline=deadline)


def log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def student(out):
    return load_file(Path(out) / "student" / "model.safetensors")


def assert_same_run(a, b):
    one, other = student(a), student(b)
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    strip = lambda lines: [{k: v for k, v in line.items() if "second" not in k} for line in lines]
    assert strip(log(a)) == strip(log(b))


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["heed_nb.trainer"])
    return context


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nothing interrupted."
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, run(out)


def test_a_run_logs_each_step_and_returns_its_numbers(whole):
    out, numbers = whole
    lines = log(out)
    steps, stages, tokens = ([line[name] for line in lines] for name in ("step", "stage", "tokens"))
    assert steps == list(range(1, numbers["steps"] + 1)) and stages == sorted(stages)
    shares = [stages.count(stage) / len(stages) for stage in (1, 2)]
    assert shares == pytest.approx([0.1, 0.3], abs=0.05)
    assert tokens[-1] == numbers["tokens"] >= SETTINGS.token_budget > tokens[-2]
    assert {stage: set(terms) for stage, terms in numbers["losses"].items()} == {
        "stage_1": {"loss"},
        "stage_2": {"loss"},
        "stage_3": {"loss", "kl", "ce"},
    }
    last = [(line["loss"], line["kl"] + 0.1 * line["ce"]) for line in lines if line["stage"] == 3]
    assert all(loss == pytest.approx(eq_1, rel=1e-5) for loss, eq_1 in last)
    assert numbers["parameters"]["student"] > numbers["parameters"]["teacher"] > 0
    assert sum(numbers["phase_seconds"].values()) <= numbers["seconds"] * 1.001
    assert all(numbers["phase_seconds"][phase] > 0 for phase in Phases.names)
    assert len(checkpoints(out)) == 2 and list((out / "tensorboard").iterdir())


def test_the_saved_student_loads_and_differs_from_its_teacher_in_the_mixers_alone(whole):
    model = AutoModelForImageTextToText.from_pretrained(whole[0] / "student", dtype=torch.float32)
    teacher = tiny_teacher().state_dict()
    mixers = mixer_parameters(model)
    assert mixers and not any("teacher_attn" in name for name in model.state_dict())
    for name, value in model.state_dict().items():
        if name not in mixers:
            assert value.equal(teacher[name]), name
    start = mixer_parameters(to_hybrid(tiny_teacher(), seed=0))
    assert all(not value.equal(start[name]) for name, value in mixers.items() if value.ndim > 1)


@pytest.mark.parametrize("stage, tokens", [(1, 100), (2, 700)])
def test_what_trains_in_each_stage(tmp_path, monkeypatch, stage, tokens):
    stages = (1.0, 0.0, 0.0) if stage == 1 else (0.0, 1.0, 0.0)
    teacher = tiny_teacher()
    model = to_hybrid(teacher)
    before = {name: p.detach().clone() for name, p in mixer_parameters(model).items()}
    settings = replace(SETTINGS, token_budget=tokens, stages=stages, weight_decay=0.0)
    distill(model, teacher, Noise(), collate, CONDITIONS["C3"], settings, tmp_path, progress=False)
    moved = {name for name, p in mixer_parameters(model).items() if not p.equal(before[name])}
    transferred = set(transferred_parameters(model))
    assert moved == set(before) - transferred if stage == 1 else moved >= transferred


@pytest.mark.parametrize(
    "condition", ["C1", "C2", "C5", "C6", "C4-shuffled", "random-25", "LoLCATs", "MOHAWK", "MaTVLM", "C3-forced"]
)
def test_a_condition_runs_and_its_loss_falls(tmp_path, condition):
    settings = replace(SETTINGS, token_budget=1000, lr=3e-3, stages=(0.0, 0.5, 0.5), orient_share=0.3)
    run(tmp_path, condition, settings, data=FiniteNoise(4))  # the same four samples in each step
    losses, row = {}, CONDITIONS[condition]
    for line in log(tmp_path):
        losses.setdefault(line["stage"], []).append(line["loss"])
    assert [*losses] == [0] * row.orient + [2] * bool(row.alignment) + [3]
    assert all(of[-1] < of[0] for of in losses.values())


def test_a_student_of_gated_deltanet_is_loaded_and_generates(tmp_path):
    run(tmp_path, "C6", replace(SETTINGS, token_budget=1))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    mixers = mixer_parameters(model)
    assert any("b_proj" in name for name in mixers) and all(
        value.equal(student(tmp_path)[name]) for name, value in mixers.items()
    )
    batch = {k: v for k, v in collate([Noise()[0]]).items() if k not in ("labels", "keys")}
    how = dict(max_new_tokens=5, do_sample=False, suppress_tokens=[IMAGE])
    assert torch.equal(model.generate(**batch, **how), model.generate(**batch, **how, use_cache=False))


def test_a_student_with_another_mixer_is_refused_before_any_work(tmp_path):
    teacher = tiny_teacher()
    with pytest.raises(ValueError, match="condition 'C6' has the mixer 'gdn', the student 'mamba2'"):
        distill(to_hybrid(teacher), teacher, Noise(), collate, CONDITIONS["C6"], SETTINGS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Matrix orientation

ORIENTED = {
    "MOHAWK": CONDITIONS["MOHAWK"],
    "C4": replace(CONDITIONS["C4"], orient=True),
    "C6": replace(CONDITIONS["C6"], orient=True),
}
MATRIX = {"mamba2": {"dt_proj.weight", "D"}, "gdn": {"a_proj.weight", "b_proj.weight"}}


@pytest.mark.parametrize("condition", ORIENTED)
def test_what_trains_in_matrix_orientation(tmp_path, condition):
    "What makes the matrix, inherited or not, and nothing else; then Stage 1 freezes what was inherited, and only that."
    condition, teacher = ORIENTED[condition], tiny_teacher()
    model = to_hybrid(teacher, mixer=condition.mixer, weight_transfer=condition.weight_transfer)
    mixers = mixer_parameters(model)
    settings = replace(
        SETTINGS, token_budget=700, stages=(1.0, 0.0, 0.0), orient_share=0.5, weight_decay=0.0, checkpoint_every=1
    )
    seen = []

    def moved(out, tensors, state):
        seen.append({name: p.detach().clone() for name, p in mixers.items()})

    start = {name: p.detach().clone() for name, p in mixers.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "save_checkpoint", moved)
        distill(model, teacher, Noise(), collate, condition, settings, tmp_path, progress=False)
    stages = [line["stage"] for line in log(tmp_path)]
    turn = stages.index(1)
    assert stages == [0] * turn + [1] * (len(stages) - turn) and 3 < turn < len(stages) - 3
    changed = lambda a, b: {name.split("self_attn.")[1] for name in mixers if not a[name].equal(b[name])}
    assert (
        changed(start, seen[turn - 1])
        == {"q_proj.weight", "k_proj.weight", "conv_weight", "A_log", "dt_bias"} | MATRIX[condition.mixer]
    )
    everything = {name.split("self_attn.")[1] for name in mixers}
    held = {f"{p}_proj.weight" for p in "qkvo"} if condition.weight_transfer else set()
    assert changed(seen[turn - 1], seen[-1]) == everything - held


class Interrupted(Noise):
    def __init__(self, after):
        super().__init__()
        self.left = after

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_an_interrupted_orientation_ends_with_the_same_bits(tmp_path):
    condition, settings = ORIENTED["C6"], replace(SETTINGS, token_budget=700, orient_share=0.5, checkpoint_every=2)
    run(tmp_path / "whole", condition, settings)
    for after in (12, 10, 14):  # samples, four a step
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "interrupted", condition, settings, data=Interrupted(after))
        assert log(tmp_path / "interrupted")[-1]["stage"] == 0 or after == 14
    run(tmp_path / "interrupted", condition, settings)
    assert_same_run(tmp_path / "interrupted", tmp_path / "whole")


def test_stopped_by_its_deadline_it_ends_with_the_same_bits(tmp_path, whole):
    for step in (1, 2, 3):
        with pytest.raises(OutOfTime, match=f"of {SETTINGS.token_budget} tokens; called again, .* goes on from there"):
            run(tmp_path, deadline=time.time())
        assert checkpointing.load_checkpoint(tmp_path)[1]["step"] == step == len(log(tmp_path))
        assert not (tmp_path / "student").exists()
    run(tmp_path, deadline=float("inf"))
    assert_same_run(tmp_path, whole[0])


def die_after(calls):
    "Kills this process after so many calls: at a random moment, the same on a slow machine."

    def count(*_):
        nonlocal calls
        calls -= 1
        if calls < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path, whole, processes):
    random.seed(0)
    for _ in range(3):  # a whole run makes 650,000 calls
        process = processes.Process(
            target=run, args=(tmp_path,), kwargs=dict(before=partial(die_after, random.randrange(100_000, 350_000)))
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL or (tmp_path / "student").exists()
    run(tmp_path)
    assert_same_run(tmp_path, whole[0])
    assert not list(tmp_path.rglob("*.tmp"))


def die_in_the_second_checkpoint():
    save = checkpointing.save_file

    def torn(tensors, path, metadata):
        save(tensors, path, metadata)
        if "00000008" in path.name:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpointing.save_file = torn


def die_before_the_student_is_in_place():
    save = files.sync

    def torn(path):
        save(path)
        if path.parent.name == f".student{files.TEMPORARY}":
            os.kill(os.getpid(), signal.SIGKILL)

    files.sync = torn


@pytest.mark.parametrize(
    "before, resumes_at", [(die_in_the_second_checkpoint, 4), (die_before_the_student_is_in_place, None)]
)
def test_killed_while_it_writes_it_ends_with_the_same_bits(tmp_path, whole, processes, before, resumes_at):
    process = processes.Process(target=run, args=(tmp_path,), kwargs=dict(before=before))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "student").exists()
    found = checkpointing.load_checkpoint(tmp_path)[1]["step"]
    assert found == (resumes_at or whole[1]["steps"])
    run(tmp_path)
    assert_same_run(tmp_path, whole[0])
    assert not list(tmp_path.rglob("*.tmp"))


def two_checkpoints(folder):
    "Writes every kind of tensor and of JSON; a function that says whether content is that of a saved step."
    saved = {}
    for step in (1, 2):
        g = torch.Generator().manual_seed(step)
        tensors = {
            "float": torch.randn(3, 2, generator=g),
            "half": torch.randn(5, generator=g).bfloat16(),
            "rng": torch.randint(256, (9,), generator=g, dtype=torch.uint8),
            "step": torch.tensor(float(step)),
            "none": torch.zeros(0, 4),
            "seen": torch.tensor([True, False]),
        }
        saved[step] = tensors, {"step": step, "run": {"name": "Zoë", "list": [1.5, None, True]}}
        checkpointing.save_checkpoint(folder, *saved[step])

    def known(tensors, state):
        expected, same = saved[state["step"]][0], lambda a, b: a.dtype == b.dtype and a.equal(b)
        names = tensors.keys() == expected.keys()
        return names and state == saved[state["step"]][1] and all(same(tensors[k], t) for k, t in expected.items())

    return known


def changed(good, how):
    "Bytes that are damaged in a way."
    r, places = random.Random(0), range(len(good))
    patched = lambda at, new: good[:at] + bytes(new) + good[at + len(new) :]
    return {
        "flip a bit": [patched(at // 8, [good[at // 8] ^ 1 << at % 8]) for at in range(0, 8 * len(good), 7)],
        "fill": [patched(r.choice(places[:-8]), r.randbytes(r.choice((2, 8)))) for _ in range(300)],
        "swap": [
            patched(at, good[at + 4 : at + 5] + good[at + 1 : at + 4] + good[at : at + 1]) for at in places[:-4:3]
        ],
        "cut": [good[:at] for at in places[::7]],
        "append": [good + bytes(more) for more in range(1, 100, 9)],
    }[how]


@pytest.mark.parametrize("how", ["flip a bit", "fill", "swap", "cut", "append"])
def test_a_checkpoint_that_changed_is_noticed_or_has_its_content(tmp_path, capsys, how):
    known, noticed = two_checkpoints(tmp_path), []
    newest = checkpoints(tmp_path)[0]
    for data in changed(newest.read_bytes(), how):
        newest.write_bytes(data)
        tensors, state = checkpointing.load_checkpoint(tmp_path)
        assert known(tensors, state)
        noticed.append(state["step"] == 1)
        line = rf"{newest} is damaged \(.+\); going back to step-00000001.safetensors\n"
        assert re.fullmatch(line if noticed[-1] else "", capsys.readouterr().err)
    assert sum(noticed) > 0.9 * len(noticed)


def without_checksum(path):
    with safe_open(path, "pt") as file:
        save_file({name: file.get_tensor(name) for name in file.keys()}, path, {"state": file.metadata()["state"]})


def folder_in_its_place(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [without_checksum, folder_in_its_place])
def test_what_is_no_checkpoint_is_passed_over_and_removed(tmp_path, damage):
    two_checkpoints(tmp_path)
    damage(checkpoints(tmp_path)[0])
    assert checkpointing.load_checkpoint(tmp_path)[1]["step"] == 1
    checkpointing.drop_newer(tmp_path, 1)
    assert [path.stem for path in checkpoints(tmp_path)] == ["step-00000001"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1000] ^= 64
    path.write_bytes(data)


def test_a_run_goes_back_to_the_checkpoint_that_is_whole(tmp_path, whole, capfd):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out, ignore=shutil.ignore_patterns("student"))
    newest, older = checkpoints(out)
    flip(newest)
    run(out)
    assert f"{newest} is damaged (" in capfd.readouterr().err
    assert_same_run(out, whole[0])
    events = max((out / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    steps = [event.step for event in EventFileLoader(str(events)).Load() if event.summary.value]
    assert min(steps) == int(older.stem[5:]) + 1
    for path in checkpoints(out):
        flip(path)
    remedy = rf"and no other is intact; remove {out}/checkpoint to begin again$"
    with pytest.raises(
        ValueError, match=rf"^{checkpoints(out)[1]} is damaged \(its checksum does not match\), {remedy}"
    ):
        run(out)


def test_a_damaged_log_is_named_before_any_step(tmp_path, whole):
    shutil.copytree(whole[0], tmp_path / "run")
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines(keepends=True)
    for damaged in (lines[:2] + ["{}\n"] + lines[3:], lines[:2], lines[:2] + lines[3:]):
        (tmp_path / "run/log.jsonl").write_text("".join(damaged))
        with pytest.raises(
            ValueError, match=r"^line 3 of .*log.jsonl is not that of step 3; mend it, or remove .* to begin again$"
        ):
            run(tmp_path / "run")


def test_a_finished_run_is_not_trained_again(tmp_path, whole, monkeypatch):
    first = run(tmp_path)
    monkeypatch.setattr(trainer, "step_loss", None)
    assert run(tmp_path) == first


def test_a_run_may_go_on_with_other_workers_and_checkpoints(tmp_path, whole):
    with pytest.raises(OutOfTime):
        run(tmp_path, deadline=0)
    run(tmp_path, settings=replace(SETTINGS, workers=1, checkpoint_every=5))
    assert_same_run(tmp_path, whole[0])


def test_a_half_precision_pair_is_trained_saved_and_used_in_its_own_precision(tmp_path):
    teacher = tiny_teacher().to(torch.bfloat16)
    model = to_hybrid(teacher)
    before = {name: (p.dtype, p.detach().clone()) for name, p in mixer_parameters(model).items()}
    message = "^the student is in torch.bfloat16, precision is fp32: load the teacher in float32, or set precision to "
    with pytest.raises(ValueError, match=message):
        distill(model, teacher, Noise(), collate, CONDITIONS["C4"], SETTINGS, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
    settings = replace(SETTINGS, precision="bf16")
    distill(model, teacher, Noise(), collate, CONDITIONS["C4"], settings, tmp_path, progress=False)
    after = mixer_parameters(model)
    assert all(p.dtype == before[name][0] for name, p in after.items())
    assert not all(p.equal(before[name][1]) for name, p in after.items())
    saved = {name: value.dtype for name, value in student(tmp_path).items() if name in after}
    assert saved == {name: dtype for name, (dtype, _) in before.items()}
    batch = {k: v for k, v in collate([Noise()[0]]).items() if k not in ("labels", "keys")}
    assert model.eval().generate(**batch, max_new_tokens=3, do_sample=False).shape[1] > batch["input_ids"].shape[1]


@pytest.mark.parametrize("late", [False, True])
def test_times_on_a_gpu_are_read_once_it_has_caught_up(monkeypatch, late):
    "Events that refuse to be read before the device has reached them, as CUDA's do."

    class Event:
        made = []

        def __init__(self, enable_timing):
            self.at, self.reached = len(self.made), False
            self.made.append(self)

        def record(self):
            pass

        def query(self):
            return self.reached

        def elapsed_time(self, end):
            assert self.reached and end.reached
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    phases = Phases(torch.device("cuda"))
    for step in range(3):
        for name in ("data", "student", "optimizer", "checkpoint"):
            phases.mark(name)
        for event in Event.made[: len(Event.made) - 2 * late]:
            event.reached = True
        phases.collect()
    assert {name: phases.seconds[name] for name in ("data", "student", "optimizer", "checkpoint")} == dict(
        data=3, student=3 - late, optimizer=3 - late, checkpoint=2
    )


class EvenNoise(Noise):
    "Samples of one length, so that means over processes' shares are means over the batch."

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample | dict(ids=sample["ids"][:10])


def share_a_run(out, rank, port):
    os.environ |= dict(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    teacher = tiny_teacher()
    model = to_hybrid(teacher, seed=SETTINGS.seed)
    distill(model, teacher, EvenNoise(), collate, CONDITIONS["C4"], SETTINGS, out, progress=False)
    save_file({name: p.detach() for name, p in mixer_parameters(model).items()}, out / f"rank{rank}.safetensors")


def test_two_processes_share_a_run(tmp_path, processes):
    tiny.run_two_ranks(processes, share_a_run, tmp_path)
    one, other = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    assert all(one[name].equal(other[name]) for name in one)
    run(tmp_path / "alone", data=EvenNoise())
    assert [line["tokens"] for line in log(tmp_path)] == [line["tokens"] for line in log(tmp_path / "alone")]
    alone = student(tmp_path / "alone")
    for name, value in one.items():
        torch.testing.assert_close(value, alone[name], atol=1e-3, rtol=0)


def test_two_runs_in_one_folder_exclude_each_other(tmp_path, processes):
    settings = replace(SETTINGS, token_budget=10**9, workers=1)
    process = processes.Process(target=run, args=(tmp_path, "C4", settings))
    process.start()
    while not (tmp_path / "log.jsonl").exists():
        assert process.is_alive()
        time.sleep(0.01)
    try:
        with pytest.raises(ValueError, match="^another run holds .*; wait for it or choose another folder$"):
            run(tmp_path)
        with pytest.raises(ValueError, match="^another run holds "):
            train_teacher(tmp_path, read_steps=1, answer_steps=1, settle_steps=1)
    finally:
        process.kill()  # and the lock is free at once, though its worker may live on for a moment
        process.join()
    with files.locked(tmp_path):
        pass


def test_a_run_waits_for_another_where_it_is_told_to(tmp_path, capsys):
    events, held = [], threading.Event()

    def wait():
        held.wait()
        with files.locked(tmp_path, wait=True):
            events.append("second")

    class Telling:
        "A stderr that says when the line is written."

        def write(self, text):
            events.append(text)
            if "waiting" in text:
                waiting.set()

        def flush(self):
            pass

    waiting, thread = threading.Event(), threading.Thread(target=wait)
    thread.start()
    with pytest.MonkeyPatch.context() as patch, files.locked(tmp_path):
        patch.setattr(sys, "stderr", Telling())
        held.set()
        waiting.wait()
        events.append("first")
    thread.join()
    assert [event for event in events if event.strip()] == [
        f"another run holds {tmp_path}; waiting for it",
        "first",
        "second",
    ]


def test_what_a_run_writes_has_the_permissions_of_the_umask(tmp_path):
    earlier = os.umask(umask := 0o027)
    try:
        run(tmp_path / "run", settings=replace(SETTINGS, token_budget=1))
        written = list((tmp_path / "run").rglob("*"))
        assert {path.stat().st_mode & 0o777 for path in written if path.is_file()} == {0o666 & ~umask}
        assert {path.stat().st_mode & 0o777 for path in written if path.is_dir()} == {0o777 & ~umask}
        assert {"model.safetensors", "log.jsonl"} < {path.name for path in written}
    finally:
        os.umask(earlier)


LAUNCHED = "^the launcher started {n} processes \\({name}\\), accelerate counts 1, so the ranks would overwrite"


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0"), LAUNCHED.format(n=2, name="WORLD_SIZE")),
        (dict(OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="3"), LAUNCHED.format(n=4, name="OMPI_COMM_WORLD_SIZE")),
        (dict(SLURM_STEP_NUM_TASKS="8", SLURM_PROCID="0"), LAUNCHED.format(n=8, name="SLURM_STEP_NUM_TASKS")),
        (dict(RANK="0"), "^RANK is 0, but no WORLD_SIZE says how many processes the launcher started; use `accel"),
    ],
)
def test_ranks_that_know_nothing_of_each_other_are_refused_before_any_work(tmp_path, monkeypatch, given, message):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distill(None, None, Noise(), collate, CONDITIONS["C4"], SETTINGS, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        train_teacher(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given", [dict(WORLD_SIZE="1", RANK="0"), dict(SLURM_NTASKS="4", SLURM_STEP_NUM_TASKS="1"), dict(WORLD_SIZE="")]
)
def test_one_process_of_a_launcher_trains(monkeypatch, given):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    check_launch(1)


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(settings=replace(SETTINGS, lr=2e-3)), "holds a run with the setting lr = 0.001, this one has 0.002"),
        (dict(settings=replace(SETTINGS, seed=1)), "holds a run with the setting seed = 0, this one has 1"),
        (dict(condition="C3"), "holds a run with the condition name = 'C4', this one has 'C3'"),
        (dict(teacher_seed=1), "holds a run with another teacher"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(tmp_path, whole, changed, message):
    out = whole[0]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(ValueError) as error:
        run(out, **changed)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("condition, kind", [("C4", ValueError), ("C3", FloatingPointError)])
def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path, condition, kind):
    settings = replace(SETTINGS, stages=(0.0, 1.0, 0.0))
    bad = schedule.batch_indices(None, settings.batch_size, settings.seed, 5)[2]  # the third sample of step 6
    with pytest.raises(kind) as error:
        run(tmp_path, condition, settings, data=Noise(bad))
    message = str(error.value)
    assert "\n" not in message and "step 6 (stage 2)" in message and f"noise-{bad}" in message
    assert f"last good checkpoint: {tmp_path / 'checkpoint' / 'step-00000004.safetensors'}" in message
    assert len(log(tmp_path)) == 5 and not (tmp_path / "student").exists()
    run(tmp_path, condition, settings)  # goes on once the sample is mended


class Unportable(Exception):
    def __init__(self, one, two):
        super().__init__(one)


ERRORS = {
    "ValueError": lambda: ValueError("no pages"),
    "KeyError": lambda: KeyError("image"),
    "TypeError": lambda: TypeError("a\nb\nc"),
    "Unportable": lambda: Unportable("x", "y"),
    "BadSample": lambda: BadSample("mine", "too thin"),
    "IndexError": lambda: IndexError(),
}


class Failing(FiniteNoise):
    "Noise whose samples at these indices fail: when they are read, or when they are collated."

    def __init__(self, length, bad, error, when="read"):
        super().__init__(length)
        self.bad_ones, self.error, self.when = bad, error, when

    def __getitem__(self, index):
        if index in self.bad_ones and self.when == "read":
            raise ERRORS[self.error]()
        return super().__getitem__(index) | dict(error=self.error if index in self.bad_ones else None)


def collate_or_fail(samples):
    for sample in samples:
        if sample["error"]:
            raise ERRORS[sample["error"]]()
    return collate(samples)


def distil(out, data, settings, collate=collate_or_fail, **options):
    teacher = tiny_teacher()
    return distill(
        to_hybrid(teacher), teacher, data, collate, CONDITIONS["C4"], settings, out, progress=False, **options
    )


STEP_3 = schedule.batch_indices(40, 4, 0, 2)
SHORT = replace(SETTINGS, checkpoint_every=2)


@pytest.mark.parametrize(
    "error, when, workers",
    [(error, "read", 0) for error in ERRORS]
    + [("BadSample", "collate", 0), ("Unportable", "read", 1), ("KeyError", "collate", 1)],
)
def test_an_error_of_a_sample_names_it_its_step_and_the_last_checkpoint(tmp_path, two_steps, error, when, workers):
    shutil.copytree(two_steps, tmp_path / "run")
    bad = STEP_3[1]
    with pytest.raises(ValueError) as raised:
        distil(tmp_path / "run", Failing(40, {bad}, error, when), replace(SHORT, workers=workers))
    read = f"mine (index {bad})" if error == "BadSample" else f"{bad}"
    name = f"noise-{bad} (index {bad})" if when == "collate" else read
    message, checkpoint = str(raised.value), tmp_path / "run/checkpoint/step-00000002.safetensors"
    assert message.endswith(f", in sample {name}, at step 3 (stage 1); last good checkpoint: {checkpoint}")
    assert "\n" not in message and (error in ("ValueError", "BadSample") or message.startswith(error))
    cause = raised.value.__cause__
    assert type(cause).__name__ == ("RuntimeError" if workers and error == "Unportable" else error)
    assert not workers or any("Traceback" in note for note in getattr(cause, "__notes__", [str(cause)]))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    "A run of two steps that its third one ended."
    out = tmp_path_factory.mktemp("runs") / "two"
    with pytest.raises(ValueError):
        distil(out, Failing(40, set(STEP_3), "ValueError"), SHORT)
    return out


def test_what_no_single_sample_is_to_blame_for_names_them_all(tmp_path, two_steps):
    def together(samples):
        if len(samples) > 1:
            raise RuntimeError("sizes differ")

    shutil.copytree(two_steps, tmp_path / "run")
    named = ", ".join(rf"sample noise-{i} .index {i}." for i in STEP_3)
    with pytest.raises(ValueError, match=f"^RuntimeError: sizes differ, in {named} together, at step 3 "):
        distil(tmp_path / "run", FiniteNoise(40), replace(SHORT, skip_bad=0.5), together)
    with pytest.raises(ValueError, match="^KeyError: 'keys', in sample .* together, at step 3 "):
        distil(
            tmp_path / "run",
            FiniteNoise(40),
            SHORT,
            lambda samples: {k: v for k, v in collate(samples).items() if k != "keys"},
        )


def end(samples):
    os._exit(9)


@pytest.mark.parametrize("hide", ["all", "all but the first token's", "the key"])
def test_labels_that_teach_no_token_name_their_sample_and_step(tmp_path, hide):
    def unlabelled(samples):
        batch = collate(samples)
        if hide == "the key":
            del batch["labels"]
        else:
            batch["labels"][-1, len(hide) > 3 :] = -100
            batch["labels"][-1, 0] = 7 if len(hide) > 3 else -100
        return batch

    message = (
        r"^KeyError: 'labels'" if hide == "the key" else r"^sample 'noise-\d+': it has no label, in sample noise-\d+ "
    )
    with pytest.raises(ValueError, match=message + r".*, at step 1 \(stage 1\); no checkpoint was written yet$"):
        distil(tmp_path / "run", FiniteNoise(40), SHORT, unlabelled)


def test_a_worker_that_dies_is_named_with_the_step(tmp_path):
    message = r"^RuntimeError: DataLoader worker .* exited unexpectedly.*, at step 1 \(stage 1\); no checkpoint was "
    with pytest.raises(ValueError, match=message):
        distil(tmp_path, FiniteNoise(40), replace(SHORT, workers=1), end)


def test_a_bug_is_not_dressed_as_a_bad_sample(tmp_path, monkeypatch):
    bug = ValueError("not enough values to unpack")

    def broken(*_, **__):
        raise bug

    monkeypatch.setattr(objective, "residual_alignment", broken)
    with pytest.raises(ValueError) as raised:
        run(tmp_path)
    assert raised.value is bug and str(bug) == "not enough values to unpack"
    assert bug.__notes__[0].startswith("at step 1 (stage 1) on samples noise-")


def test_skipped_samples_are_counted_and_the_same_after_a_resume_and_with_workers(tmp_path):
    data = Failing(40, set(STEP_3[:2]) | {1, 2, 3}, "KeyError")
    settings = replace(SHORT, token_budget=700, skip_bad=0.4)
    numbers = distil(tmp_path / "whole", data, settings)
    named = [pair for line in log(tmp_path / "whole") for pair in line.get("skipped", [])]
    assert (
        numbers["skipped"] == {"KeyError": len(named)} and {int(name.split()[1]) for name, _ in named} == data.bad_ones
    )
    with pytest.raises(ValueError, match="^KeyError: 'image', in sample "):
        distil(tmp_path / "resumed", data, replace(settings, skip_bad=0.0))
    with pytest.raises(OutOfTime):
        distil(tmp_path / "resumed", data, settings, deadline=0)
    assert distil(tmp_path / "resumed", data, replace(settings, workers=1))["skipped"] == numbers["skipped"]
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


@pytest.mark.parametrize(
    "bad, share, message",
    [
        (
            {7},
            0.01,
            r"^\d+ samples are bad, of about \d+ .*, skip_bad is 0.01 \(too thin \d+\); the last is sample noise-7 ",
        ),
        (
            set(range(40)),
            0.9,
            r"^100 samples in a row are bad, the last by sample 'mine': too thin, in sample noise-\d+ ",
        ),
    ],
)
def test_more_bad_samples_than_the_share_end_the_run(tmp_path, bad, share, message):
    with pytest.raises(ValueError, match=message):
        distil(tmp_path, Failing(40, bad, "BadSample", "collate"), replace(SHORT, skip_bad=share))


def out_of_disk(out, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run(out)
    except OSError as error:
        (out / "error").write_text(str(error))
        raise SystemExit(3)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, whole, processes):
    run(tmp_path, settings=replace(SETTINGS, token_budget=1))  # how large is a checkpoint?
    limit = checkpoints(tmp_path)[0].stat().st_size  # of one step in stage 1: fewer moments than a later one has
    out = tmp_path / "full"
    process = processes.Process(target=out_of_disk, args=(out, limit))
    process.start()
    process.join()
    assert process.exitcode == 3
    message = (out / "error").read_text()
    assert "File too large" in message and "\n" not in message and not list(out.rglob("*.tmp"))
    good = checkpoints(out)
    assert (f"last good checkpoint: {good[0]}" if good else "no checkpoint was written yet") in message
    (out / "error").unlink()
    run(out)
    assert_same_run(out, whole[0])
