"Weight caches under damage, faults and two builders; training from them, alone and from a scale."

import copy
import json
import multiprocessing
import os
import random
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tiny
from heed_nb import objective, trainer
from heed_nb.batch import run_notebook
from heed_nb.cached_weights import cache_identity, complete_cache, record_values, with_cache_keys
from heed_nb.conditions import CONDITIONS, TrainSettings
from heed_nb.data import collate
from heed_nb.hybrid import mixer_parameters, to_hybrid
from heed_nb.losses import record_outputs
from heed_nb.samples import Batch, Sample
from heed_nb.schedule import Batches, OutOfTime
from heed_nb.streams import pair_with_teacher, unpair
from heed_nb.teachers import family_of, load_teacher
from heed_nb.toyworld import Documents
from heed_nb.weight_cache import cached_values, dequantize, quantize, read_cache, write_shard

processes = multiprocessing.get_context("fork")


def test_a_shard_holds_its_values_and_any_flipped_bit_or_cut_is_noticed(tmp_path):
    r = np.random.default_rng(0)
    content = {f"{n:024x}": r.random(n, np.float32) ** 3 for n in (36, 1, 0, 100, 2, 37, 250)}
    content["f" * 24] = np.array([-3e38, 3e38, 0, 1e-45], np.float32)
    shard = write_shard(tmp_path, {key: quantize(values) for key, values in content.items()})
    for key, record in read_cache(tmp_path).items():
        assert dequantize(record).tolist() == dequantize(quantize(content.pop(key))).tolist()
    assert not content
    whole = shard.read_bytes()
    damaged = [whole[:n] for n in (0, 7, 100, len(whole) - 1)] + [whole + b"\0"]
    for bit in {*range(0, 64), *random.Random(0).sample(range(8 * len(whole)), 400)}:
        damaged.append(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
    for bad in damaged:
        shard.write_bytes(bad)
        with pytest.raises(ValueError, match=f"^{shard} is damaged or cut: .*; remove {tmp_path} to build it again$"):
            read_cache(tmp_path)


# Completing


class Pages(list):
    "Sixty pages of noise, of five tokens each; the value of a page is its number."

    def __init__(self):
        super().__init__(Sample(f"page-{i}", [tiny.page(5, 4, i)]) for i in range(60))


def ones(samples):
    tokens = torch.ones(len(samples), 5, dtype=torch.long)
    return Batch(dict(input_ids=tokens, attention_mask=tokens), tokens, [sample.key for sample in samples])


def numbers(batch):
    return [torch.tensor([float(key[5:]), 100]) for key in batch.keys]


def complete(folder, values=numbers, **options):
    "The numbers of the pages in the cache of twelve batches of four."
    collated = partial(with_cache_keys, ones, CONDITIONS["C4"])
    batches = Batches(Pages(), collated, TrainSettings(token_budget=1, batch_size=4))
    cache = complete_cache(folder, {}, batches, values, 240, progress=False, **options)
    return {int(dequantize(record)[0]) for record in cache.values()}


def raising(error):
    def values(batch):
        raise error

    return values


FAULTS = {  # what happens at the sixth batch; the error, and how many records are stored
    "failure": (raising(ValueError("no density")), ValueError, "^no density, on samples page-", 20),
    "NaN": (lambda batch: [torch.tensor([torch.nan])] * 4, ValueError, "hold NaN or .*, on samples page-", 20),
    "interrupt": (raising(KeyboardInterrupt()), KeyboardInterrupt, "^$", 20),
    "kill": (lambda batch: os.kill(os.getpid(), signal.SIGKILL), None, None, 16),
    "deadline": (numbers, OutOfTime, "^stopped at 20 of 240 tokens; call again to complete .*$", 4),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_build_that_stops_is_completed(tmp_path, monkeypatch, fault):
    "With shards of eight records, all that was computed stays; after a kill all but the last shard."
    monkeypatch.setattr("heed_nb.cached_weights.SHARD", 8)
    (at_the_sixth, error, message, stored), computed = FAULTS[fault], []

    def counting(batch):
        computed.append(batch.keys)
        return at_the_sixth(batch) if len(computed) == 6 else numbers(batch)

    if fault == "kill":
        process = processes.Process(target=complete, args=(tmp_path, counting))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    else:
        with pytest.raises(error, match=message) as raised:
            complete(tmp_path, counting, deadline=0 if fault == "deadline" else None)
        assert "\n" not in str(raised.value)
    (folder,) = tmp_path.iterdir()
    assert len(read_cache(folder)) == stored
    computed[:] = [None] * 6
    assert complete(tmp_path, counting) == complete(tmp_path / "whole")
    assert len(computed) == 6 + (48 - stored) / 4


def test_two_builders_build_once(tmp_path):
    counted = processes.Value("i")

    def counting(batch):
        with counted.get_lock():
            counted.value += 1
        return numbers(batch)

    builders = [processes.Process(target=complete, args=(tmp_path, counting)) for _ in range(2)]
    for process in builders:
        process.start()
    for process in builders:
        process.join()
    assert [process.exitcode for process in builders] == [0, 0] and counted.value == 12


# Training from a cache


class FewPages(Documents):
    "Eight pages of the toy world, one of them text alone."

    left = 1000  # that can be read

    def __len__(self):
        return 8

    def __getitem__(self, i):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        sample = super().__getitem__(i)
        return replace(sample, images=[]) if i == 5 else sample


SETTINGS = TrainSettings(token_budget=1500, lr=3e-4, batch_size=4, stages=(0.2, 0.8, 0.0), threads=1, temper=0.5)


@pytest.fixture(scope="module")
def toy(root):
    "The toy teacher, its processor and its collate."
    torch.set_num_threads(1)
    teacher, processor = load_teacher(root / "outputs/teachers/toy-qwen3vl")
    return SimpleNamespace(teacher=teacher, processor=processor, collate=partial(collate, processor=processor))


def distilled(toy, out, condition, *, data=None, processor=True, **changes):
    "The losses of a run's steps."
    given = CONDITIONS[condition], replace(SETTINGS, **changes), out
    options = dict(processor=toy.processor if processor else None, progress=False)
    trainer.distill(to_hybrid(toy.teacher), toy.teacher, data or FewPages(), toy.collate, *given, **options)
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("condition, near", [("C4", 0.005), ("C4-shuffled", 0.005), ("C5", 0.05)])
def test_a_run_from_a_cache_is_nearly_the_same_and_resumes_with_the_same_bits(
    toy, tmp_path, monkeypatch, condition, near
):
    computed = distilled(toy, tmp_path / "computed", condition)
    uniform = distilled(toy, tmp_path / "uniform", "C3", token_budget=1)
    monkeypatch.setattr(objective, "residual_sensitivity", None)  # takes no backward pass of the teacher
    caches = dict.fromkeys(("density_cache", "gradient_cache"), str(tmp_path / "caches")) | dict(checkpoint_every=1)
    cached = distilled(toy, tmp_path / "cached", condition, **caches)
    differences = [abs(a / b - 1) for a, b in zip(cached, computed, strict=True)]
    assert len(differences) > 1 and 0 < max(differences) < near
    assert abs(uniform[0] / computed[0] - 1) > 3 * max(differences)

    interrupted = FewPages()
    interrupted.left = 11  # the cache reads one batch to know the run by, samples_of one sample
    with pytest.raises(KeyboardInterrupt):
        distilled(toy, tmp_path / "resumed", condition, data=interrupted, **caches)
    assert len(trainer.checkpoints(tmp_path / "resumed")) == 1
    distilled(toy, tmp_path / "resumed", condition, **caches)
    one, other = ((tmp_path / name / "student/model.safetensors").read_bytes() for name in ("resumed", "cached"))
    assert one == other


def test_a_cache_holds_what_stages_1_and_2_read_and_is_checked_by_a_processor(toy, tmp_path):
    caches = dict(density_cache=str(tmp_path / "caches"))
    with pytest.raises(ValueError, match="^a run that reads a weight cache needs the teacher's processor"):
        distilled(toy, tmp_path / "run", "C4", processor=False, **caches)
    assert not (tmp_path / "run").exists()
    losses = distilled(toy, tmp_path / "run", "C4", token_budget=2000, stages=(0.0, 0.01, 0.99), **caches)
    (folder,) = (tmp_path / "caches").iterdir()
    assert len(losses) > 3 and len(read_cache(folder)) == 4


def sensitivities(toy, documents):
    "C5's, by autograd on the outputs of whole layers of the teacher; unpadded, one document at a time."
    toy.teacher.requires_grad_()  # a run freezes it
    for document in documents:
        batch = toy.collate([document])
        with record_outputs(family_of(toy.teacher).layers(toy.teacher)[:3]) as outputs:
            loss = toy.teacher(**batch.model_inputs, labels=batch.labels).loss
        yield sum(g.square().sum(-1) for g in torch.autograd.grad(loss, outputs))[0]


@pytest.mark.parametrize("name", ["C4", "C5"])
def test_what_is_stored_is_the_teachers_within_half_a_level(toy, name):
    documents, condition = [FewPages()[i] for i in range(8)], CONDITIONS[name]
    batch, student = with_cache_keys(toy.collate, condition, documents), to_hybrid(toy.teacher)
    pair_with_teacher(student, toy.teacher)
    made = record_values(student, batch, condition, SETTINGS)
    unpair(student)
    inputs = family_of(toy.teacher).language_inputs(toy.teacher, batch.model_inputs)
    if name == "C4":
        where = inputs.visual_mask
        exact = [rho[visual] for rho, visual in zip(family_of(toy.teacher).density(inputs), where)]
    else:
        where = batch["attention_mask"].bool()
        exact = [(s / s.max()).pow(1 / 6) for s in sensitivities(toy, documents)]
    records = {key: quantize(values.numpy()) for key, values in zip(batch.cache_keys, made)}
    stored = cached_values(records, batch, where)
    assert len(records) == 8 and not stored[~where].any()
    for row, there, values in zip(stored, where, exact):
        assert not there.any() or 0 < (row[there] - values).abs().max() <= (values.max() - values.min()) / 30 + 1e-4


def test_another_question_or_answer_is_another_record(toy):
    document = FewPages()[0]
    (question, answer), *rest = document.turns
    turns = ([(question, answer + " 1"), *rest], [("So: " + question, answer), *rest], rest)
    documents = [document, *(replace(document, turns=of) for of in turns), replace(document, key="renamed")]
    keys = with_cache_keys(toy.collate, CONDITIONS["C5"], documents).cache_keys
    unasked = lambda samples: replace(batch := toy.collate(samples), labels=batch.labels.clamp(max=-100))
    keys += with_cache_keys(unasked, CONDITIONS["C5"], [document]).cache_keys
    assert len(set(keys)) == 5 and keys[0] == keys[4]


# Identities


def identity(teacher, processor, condition="C5", student=None, **changes):
    settings = replace(SETTINGS, **changes)
    return cache_identity(student or to_hybrid(teacher), teacher, processor, CONDITIONS[condition], settings)


@pytest.mark.parametrize("family", tiny.TINY)
def test_an_identity_is_that_of_the_saved_teacher_and_of_its_pair(family, tmp_path):
    teacher, processor = tiny.teacher(family), tiny.processor(family)
    found = identity(teacher, processor)
    for part in (teacher, processor):
        part.save_pretrained(tmp_path)
    assert identity(*load_teacher(tmp_path)) == found
    teacher.set_attn_implementation("eager")
    teacher.config.get_text_config().use_cache = False
    student = to_hybrid(teacher)
    pair_with_teacher(student, teacher)
    assert identity(teacher, processor, student=student, seed=3, tau=1.0) == found


CONFIGS = [
    ("vision_config", "num_heads", 2),
    ("vision_config", "hidden_act", "silu"),
    ("vision_config", "rope_parameters", {"rope_theta": 100.0, "rope_type": "axial"}),
    ("text_config", "rope_parameters", {"rope_theta": 100.0, "rope_type": "default"}),
    ("text_config", "rms_norm_eps", 0.1),
]


def test_whatever_the_values_depend_on_makes_another_cache(toy):
    found = [identity(toy.teacher, toy.processor, name, reduce=how) for name in ("C4",) for how in ("mean", "max")]
    found += [identity(toy.teacher, toy.processor)]
    found += [identity(toy.teacher, toy.processor, student=to_hybrid(toy.teacher, attention_layers=[0]))]
    assert identity(toy.teacher, toy.processor, "C6", reduce="max") == found[1]
    processor, student = copy.deepcopy(toy.processor), to_hybrid(toy.teacher)
    processor.image_processor.size = {"longest_edge": 4096, "shortest_edge": 1024}
    found += [identity(toy.teacher, processor)]
    for part, name, value in CONFIGS:
        other = copy.deepcopy(toy.teacher)
        setattr(getattr(other.config, part), name, value)
        found += [identity(other, toy.processor, student=student)]
    for name in ("visual", "layers.3.mlp"):
        other = copy.deepcopy(toy.teacher)
        with torch.no_grad():
            next(p for n, p in other.named_parameters() if name in n).view(-1)[0] += 1e-3
        found += [identity(other, toy.processor, student=student)]
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


def test_runs_of_a_scale_share_a_cache_and_say_so(copy_of_repository, tmp_path, monkeypatch):
    "And end with weights as near to those without it as four bits are."
    monkeypatch.chdir(copy_of_repository(tmp_path))
    for name, cached in (("computed", False), ("cached", True), ("again", True)):
        overrides = {"density_cache": cached, "gradient_cache": False}
        given = dict(scale="smoke", condition="C4", out=f"outputs/{name}", overrides=overrides)
        if name == "again":
            monkeypatch.setattr("heed_nb.cached_weights.quantize", None)
        run_notebook("nbs/runs/distill.ipynb", given, log=f"outputs/{name}.ipynb")
        run = json.loads(Path(f"outputs/{name}/distill.json").read_text())
        assert run["parameters"]["settings"]["density_cache"] == ("outputs/smoke/caches" if cached else None)
    start = mixer_parameters(to_hybrid(load_teacher("outputs/teachers/toy-qwen3vl")[0]))
    load = lambda name: load_file(f"outputs/{name}/student/model.safetensors")
    computed, cached, again = map(load, ("computed", "cached", "again"))
    distance = lambda a, b: sum((a[name] - b[name]).square().sum() for name in start).sqrt()
    assert distance(cached, again) == 0 < distance(cached, computed) < 0.05 * distance(computed, start)
