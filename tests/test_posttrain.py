"SFT and DPO beside plain second implementations, TRL on a stock text model, and runs that are killed or refused."

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import Qwen3Config, Qwen3ForCausalLM

import tiny
from heed_nb import posttrain
from heed_nb.conditions import CONDITIONS, DPOSettings, SFTSettings
from heed_nb.data import collate
from heed_nb.hybrid import hybrid_config, to_hybrid
from heed_nb.losses import next_tokens
from heed_nb.posttrain import as_pair, check_start, dpo, in_vision_encoder, last_checkpoint, lora_targets, sft
from heed_nb.trainer import OutOfTime

trl, peft = posttrain.load_trl()
PAGES = [tiny.page(48, 64), tiny.page(96, 32, 1)]
PAIRS = [  # one image, none, two; answers of different lengths
    dict(images=PAGES[:1], prompt="read it", chosen="total 12", rejected="total 17"),
    dict(prompt="what is a total?", chosen="a sum", rejected="a tax"),
    dict(images=PAGES, prompt="or?", chosen="b", rejected="left"),
    dict(images=PAGES[1:], prompt="x?", chosen="48", rejected="43"),
]
ANSWERS = [
    {k: v for k, v in row.items() if k in ("images", "prompt")} | dict(completion=row["chosen"]) for row in PAIRS
]
SFT = SFTSettings(batch_size=2, lr=1e-3, threads=1, checkpoint_every=1)
DPO = DPOSettings(batch_size=2, lr=1e-3, threads=1, checkpoint_every=1, rank=4, alpha=8, dropout=0.0)


def model_and_batches(family="qwen3_vl"):
    processor = tiny.processor(family)
    return to_hybrid(tiny.teacher(family)), processor, partial(collate, processor=processor)


def run(phase, out, family="qwen3_vl", settings=None, data=None, before=None, **options):
    if before:
        before()
    model, processor, batches = model_and_batches(family)
    train, rows, default = dict(sft=(sft, ANSWERS, SFT), dpo=(dpo, PAIRS, DPO))[phase]
    given = data or rows, batches, settings or default, out
    return model, train(model, *given, processor=processor, progress=False, **options)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out):
    return load_file(out / "student/model.safetensors")


def assert_same_run(a, b):
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    strip = lambda lines: [{k: v for k, v in line.items() if "second" not in k} for line in lines]
    assert strip(log(a)) == strip(log(b))


def answer_log_probabilities(model, sample, collate):
    "Of each token of a conversation's answers, from the model's own logits."
    batch = collate([sample])
    targets = next_tokens(batch.labels)[0]
    logits = model(**batch.model_inputs, use_cache=False).logits[0]
    return F.log_softmax(logits, -1)[targets != -100].gather(1, targets[targets != -100, None])[:, 0]


def adamw_step(values, gradients, moments, step, lr, settings, decayed):
    "In place, after clipping."
    norm = torch.sqrt(sum(g.square().sum() for g in gradients.values()))
    scale, (first, second) = min(1.0, settings.grad_clip / (norm.item() + 1e-6)), settings.betas
    for name, value in values.items():
        g = gradients[name] * scale
        m, v = moments.setdefault(name, [torch.zeros_like(g), torch.zeros_like(g)])
        m.mul_(first).add_(g, alpha=1 - first)
        v.mul_(second).addcmul_(g, g, value=1 - second)
        update = m / (1 - first**step) / ((v / (1 - second**step)).sqrt() + settings.eps)
        decay = settings.weight_decay if name in decayed else 0.0
        value.data = value.data - lr * (update + decay * value.data)
    return norm.item()


@pytest.fixture
def orders(monkeypatch):
    "Records which rows a run reads."
    read = []

    def reading(rows, dataset, make):
        read.extend(row["index"] for row in rows)
        return make([dataset[row["index"]] for row in rows])

    monkeypatch.setattr(posttrain, "_read", reading)
    return read


def test_sft_is_the_cross_entropy_of_the_answers_tokens_over_a_whole_step(tmp_path, orders):
    "Three steps of four rows, one row at a time, beside a loss and an AdamW that are written out here."
    data, settings = ANSWERS * 3, replace(SFT, batch_size=4, micro_batch=1, lr=3e-3, weight_decay=0.5)
    trained, numbers = run("sft", tmp_path, data=data, settings=settings)
    model, processor, batches = model_and_batches()
    named = {name: p for name, p in model.named_parameters() if not in_vision_encoder(name)}
    decayed, moments = {name for name, p in named.items() if p.ndim > 1 or name.endswith("conv_weight")}, {}
    rates = [0.0, 3e-3, 3e-3 * (1 + math.cos(math.pi / 2)) / 2]  # a step of warm-up, then half a cosine
    assert sorted(orders) == list(range(12)) and numbers["steps"] == 3
    for step, line in enumerate(log(tmp_path), 1):
        samples = [posttrain.samples_of(data)[i] for i in orders[4 * step - 4 : 4 * step]]
        loss = -torch.cat([answer_log_probabilities(model, sample, batches) for sample in samples]).mean()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5) and line["lr"] == pytest.approx(rates[step - 1])
        gradients = dict(zip(named, torch.autograd.grad(loss, named.values())))
        norm = adamw_step(named, gradients, moments, step, rates[step - 1], settings, decayed)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for name, p in trained.named_parameters():
        torch.testing.assert_close(p, dict(model.named_parameters())[name], rtol=1e-4, atol=1e-5, msg=name)


def test_dpo_is_the_papers_loss_of_two_models(tmp_path, orders):
    "Adapters as W + alpha / rank B A, and the reference as a second model, both written out here."
    settings = replace(DPO, samples=4)
    trained, _ = run("dpo", tmp_path, settings=settings)
    model, processor, batches = model_and_batches()
    reference, moments = deepcopy(model), {}
    first = load_file(tmp_path / "checkpoint-1/adapter_model.safetensors")  # the first step's rate is 0
    adapters = {name.removeprefix("base_model.model."): p.requires_grad_() for name, p in first.items()}
    targets = lora_targets(model)
    assert {name.rpartition(".lora")[0] for name in adapters} == set(targets)

    def policy():
        own = dict(model.named_parameters())
        adapted = {
            f"{n}.weight": own[f"{n}.weight"]
            + settings.alpha / settings.rank * adapters[f"{n}.lora_B.weight"] @ adapters[f"{n}.lora_A.weight"]
            for n in targets
        }
        return lambda **batch: functional_call(model, adapted, kwargs=batch)

    for step, (line, rate) in enumerate(zip(log(tmp_path), (0.0, settings.lr)), 1):
        losses, margins = [], []
        for i in orders[2 * step - 2 : 2 * step]:
            pair = as_pair(PAIRS[i], i)
            now, then = (
                [answer_log_probabilities(m, s, batches).sum() for s in pair] for m in (policy(), reference.eval())
            )
            margins.append(settings.beta * ((now[0] - then[0].detach()) - (now[1] - then[1].detach())))
            losses.append(-torch.log(1 / (1 + torch.exp(-margins[-1]))))
        loss = sum(losses) / len(losses)
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["rewards/margins"] == pytest.approx(sum(m.item() for m in margins) / len(margins), abs=1e-5)
        gradients = dict(zip(adapters, torch.autograd.grad(loss, adapters.values())))
        adamw_step(adapters, gradients, moments, step, rate, settings, set())
    merged = dict(model.named_parameters())
    for n in targets:
        a, b = adapters[f"{n}.lora_A.weight"], adapters[f"{n}.lora_B.weight"]
        assert b.abs().max() > 0, f"{n} was not trained"
        merged[f"{n}.weight"].data += settings.alpha / settings.rank * b @ a
    for name, p in trained.named_parameters():
        torch.testing.assert_close(p, merged[name], rtol=1e-4, atol=1e-5, msg=name)


def text_model():
    torch.manual_seed(0)
    processor, sizes = tiny.processor("qwen3_vl"), dict(hidden_size=32, intermediate_size=48, head_dim=16)
    heads, tokens = dict(num_attention_heads=2, num_key_value_heads=1), processor.tokenizer
    ends = dict(pad_token_id=tokens.pad_token_id, eos_token_id=tokens.eos_token_id)
    config = Qwen3Config(vocab_size=len(tokens), num_hidden_layers=2, **sizes, **heads, **ends)
    return Qwen3ForCausalLM(config), processor


def text_batch(samples, tokenizer):
    "Text alone, as TRL's own collation has it."
    asked, said = ([tokenizer(text)["input_ids"] for text in column] for column in zip(*map(texts, samples)))
    said = [ids + [tokenizer.eos_token_id] for ids in said]
    length = max(len(a) + len(b) for a, b in zip(asked, said))
    row = lambda parts, fill: parts + [fill] * (length - len(parts))
    return dict(
        input_ids=torch.tensor([row(a + b, tokenizer.pad_token_id) for a, b in zip(asked, said)]),
        attention_mask=torch.tensor([row([1] * len(a + b), 0) for a, b in zip(asked, said)]),
        labels=torch.tensor([row([-100] * len(a) + b, -100) for a, b in zip(asked, said)]),
        keys=[sample.key for sample in samples],
    )


def texts(sample):
    return [message["content"][0]["text"] for message in sample.messages()]


@pytest.mark.parametrize("phase", ["sft", "dpo"])
def test_a_stock_text_model_trains_as_by_trl_alone(tmp_path, phase):
    words = ["a", "bc", "def", "ghij", "kl", "mno"]
    rows = [dict(prompt=f"{a} and {b}?", chosen=a, rejected=b[::-1] + "x") for a in words for b in words if a != b]
    if phase == "sft":
        rows = [dict(prompt=row["prompt"], completion=row["chosen"]) for row in rows]
    settings = replace(SFT if phase == "sft" else DPO, batch_size=6, micro_batch=3)
    model, processor = text_model()
    given = rows, partial(text_batch, tokenizer=processor.tokenizer), settings, tmp_path / "ours"
    (sft if phase == "sft" else dpo)(model, *given, processor=processor, progress=False)

    theirs, processor = text_model()
    arguments = posttrain.trl_arguments(settings, tmp_path / "theirs") | dict(save_strategy="no")
    if phase == "sft":
        trainer, options = trl.SFTTrainer, dict(args=trl.SFTConfig(**arguments))
    else:
        lora = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
        options = dict(args=trl.DPOConfig(**arguments, beta=0.1, disable_dropout=False), peft_config=lora)
        trainer = trl.DPOTrainer
    trainer = trainer(theirs, train_dataset=Dataset.from_list(rows), processing_class=processor.tokenizer, **options)
    trainer.train()
    found = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert [line["loss"] for line in log(tmp_path / "ours")] == found and len(found) == 5
    theirs = theirs if phase == "sft" else trainer.model.merge_and_unload()
    assert all(p.equal(q) for p, q in zip(model.parameters(), theirs.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.TINY)
def test_every_family_trains_all_but_its_vision_encoder(tmp_path, family):
    start, processor, batches = model_and_batches(family)
    model, _ = run("sft", tmp_path / "sft", family, data=ANSWERS * 2)
    before = dict(start.named_parameters())
    for name, p in model.named_parameters():
        assert p.equal(before[name]) == in_vision_encoder(name), name
    assert any(map(in_vision_encoder, before)) and {p.requires_grad for p in model.parameters()} == {True}

    after_sft = deepcopy(model)
    dpo(model, PAIRS * 2, batches, DPO, tmp_path / "dpo", processor=processor, progress=False)
    adapter = load_file(tmp_path / "dpo/adapter/adapter_model.safetensors")
    updates = {name.split(".lora_B")[0]: p for name, p in adapter.items() if ".lora_B" in name}
    assert {name.removeprefix("base_model.model.") for name in updates} == set(lora_targets(model))
    assert all(p.abs().max() > 0 for p in updates.values())
    changed = {name for name, p in model.named_parameters() if not p.equal(dict(after_sft.named_parameters())[name])}
    assert changed == {f"{name}.weight" for name in lora_targets(model)}
    linear = {n for n, m in start.named_modules() if isinstance(m, torch.nn.Linear) and not in_vision_encoder(n)}
    assert linear - {"lm_head"} == set(lora_targets(start))
    merged = peft.PeftModel.from_pretrained(after_sft, tmp_path / "dpo/adapter").merge_and_unload()
    assert all(p.equal(q) for p, q in zip(merged.parameters(), model.parameters(), strict=True))


@pytest.mark.slow
def test_a_merged_student_gives_the_same_tokens_in_a_new_process(tmp_path):
    model, _ = run("dpo", tmp_path, settings=replace(DPO, lr=0.1))
    _, processor, batches = model_and_batches()
    code = """
import sys, torch, tiny, heed_nb
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
batch = tiny.batch_of(tiny.samples("qwen3_vl"), tiny.processor("qwen3_vl"))
print(model.generate(**batch, max_new_tokens=8, do_sample=False).tolist())
"""
    call = [sys.executable, "-c", code, tmp_path / "student"]
    done = subprocess.run(call, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    batch = tiny.batch_of(tiny.samples("qwen3_vl"), processor)
    assert json.loads(done.stdout) == model.generate(**batch, max_new_tokens=8, do_sample=False).tolist()
    assert (
        json.loads(done.stdout) != model_and_batches()[0].generate(**batch, max_new_tokens=8, do_sample=False).tolist()
    )
    assert "use_cache" not in json.loads((tmp_path / "student/config.json").read_text())


# Runs that are stopped. Four steps, a checkpoint every two, dropout in the adapters.

LONG = dict(
    sft=dict(data=ANSWERS * 2, settings=replace(SFT, checkpoint_every=2)),
    dpo=dict(data=PAIRS * 2, settings=replace(DPO, checkpoint_every=2, dropout=0.3)),
)
phases = pytest.mark.parametrize("phase", ["sft", "dpo"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Runs that nothing interrupted."
    folder = tmp_path_factory.mktemp("whole")
    return {phase: (folder / phase, run(phase, folder / phase, **given)[1]) for phase, given in LONG.items()}


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["heed_nb.posttrain", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer"])
    return context


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_a_step(step):
    on_log = posttrain.StepLog.on_log

    def logged(self, args, state, control, **kwargs):
        on_log(self, args, state, control, **kwargs)
        if state.global_step == step:
            die()

    posttrain.StepLog.on_log = logged


def die_in_a_checkpoint(step):
    settle = posttrain.settle

    def torn(folder):
        if folder.name == f"checkpoint-{step}":
            weights = next(folder.glob("*.safetensors"))
            os.truncate(weights, weights.stat().st_size // 2)
            die()
        settle(folder)

    posttrain.settle = torn


def die_before_the_student():
    posttrain.save_student = die


@pytest.mark.slow
@phases
@pytest.mark.parametrize(
    "before, resumes_at",
    [
        (partial(die_after_a_step, 3), 2),
        (partial(die_in_a_checkpoint, 2), 0),
        (partial(die_in_a_checkpoint, 4), 2),
        (die_before_the_student, 4),
    ],
    ids=["step 3", "first checkpoint", "second checkpoint", "student"],
)
def test_a_killed_run_ends_with_the_same_bits(tmp_path, whole, processes, phase, before, resumes_at):
    process = processes.Process(target=run, args=(phase, tmp_path), kwargs=LONG[phase] | dict(before=before))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "student").exists()
    found = posttrain.last_checkpoint(tmp_path)
    assert (found.name if found else None) == (f"checkpoint-{resumes_at}" if resumes_at else None)
    run(phase, tmp_path, **LONG[phase])
    assert_same_run(tmp_path, whole[phase][0])
    if phase == "dpo":
        one, other = (load_file(out / "adapter/adapter_model.safetensors") for out in (tmp_path, whole[phase][0]))
        assert all(one[name].equal(other[name]) for name in one)


def share_a_run(out, rank, port):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ |= dict(MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    for phase in ("sft", "dpo"):
        run(phase, out / phase, **SHARED[phase])


SHARED = dict(
    sft=dict(data=ANSWERS * 2, settings=replace(SFT, batch_size=4)),
    dpo=dict(data=PAIRS * 2, settings=replace(DPO, batch_size=4)),
)


@pytest.mark.slow
def test_two_processes_share_a_run(tmp_path, processes):
    tiny.run_two_ranks(processes, share_a_run, tmp_path)
    for phase, given in SHARED.items():
        run(phase, tmp_path / "alone" / phase, **given)
        together, alone = log(tmp_path / phase), log(tmp_path / "alone" / phase)
        assert [line["loss"] for line in together] == pytest.approx([line["loss"] for line in alone], rel=1e-6)
        assert [line["tokens"] for line in together] == [line["tokens"] for line in alone]
        one, other = weights(tmp_path / phase), weights(tmp_path / "alone" / phase)
        assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


@phases
def test_stopped_by_its_deadline_it_ends_with_the_same_bits(tmp_path, whole, phase):
    for step in (1, 2):
        with pytest.raises(
            OutOfTime, match=rf"^{phase} stopped at step {step} of 4; called again, .* goes on from there$"
        ):
            run(phase, tmp_path, deadline=0, **LONG[phase])
        assert not (tmp_path / "student").exists() and len(log(tmp_path)) == step
    _, numbers = run(phase, tmp_path, **LONG[phase])
    assert_same_run(tmp_path, whole[phase][0])
    same = lambda numbers: {name: value for name, value in numbers.items() if "second" not in name}
    assert same(numbers) == same(whole[phase][1]) and numbers["steps"] == 4 and numbers["samples"] == 8


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(tmp_path, whole, capfd):
    with pytest.raises(OutOfTime):
        run("sft", tmp_path, deadline=0, **LONG["sft"])
    with pytest.raises(OutOfTime):
        run("sft", tmp_path, deadline=0, **LONG["sft"])
    newest = tmp_path / "checkpoint-2/optimizer.pt"
    data = bytearray(newest.read_bytes())
    data[-1000] ^= 64
    newest.write_bytes(data)
    run("sft", tmp_path, **LONG["sft"])
    assert f"{newest} is not the file that was saved" in capfd.readouterr().err
    assert_same_run(tmp_path, whole["sft"][0])
    for path in tmp_path.glob("checkpoint-*/model.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="and no other checkpoint is whole; called again, the run begins anew$"):
        run("sft", tmp_path, **LONG["sft"])


def test_another_run_in_the_same_folder_is_refused(whole):
    out, settings = whole["sft"][0], LONG["sft"]["settings"]
    with pytest.raises(ValueError, match="holds a run with the setting lr = 0.001, this one has 0.002; choose another"):
        run("sft", out, data=ANSWERS * 2, settings=replace(settings, lr=2e-3))
    model, processor, batches = model_and_batches()
    model.model.language_model.norm.weight.data += 1
    with pytest.raises(ValueError, match="holds a run with another start"):
        sft(model, ANSWERS * 2, batches, settings, out, processor=processor, progress=False)


def test_a_half_precision_student_trains_from_float32_masters_and_keeps_its_own(tmp_path):
    model, processor, batches = model_and_batches()
    model = model.to(torch.bfloat16)
    given = dict(processor=processor, progress=False)
    with pytest.raises(
        ValueError, match="^the model is in torch.bfloat16, precision is fp32: load it in float32, or set"
    ):
        sft(model, ANSWERS, batches, SFT, tmp_path, **given)
    assert not list(tmp_path.iterdir())
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    sft(model, ANSWERS, batches, replace(SFT, precision="bf16"), tmp_path / "sft", **given)
    dpo(model, PAIRS, batches, replace(DPO, precision="bf16"), tmp_path / "dpo", **given)
    masters = load_file(tmp_path / "sft/checkpoint-2/model.safetensors")
    assert masters["model.language_model.norm.weight"].dtype == torch.float32
    for out in ("sft", "dpo"):
        saved = weights(tmp_path / out)
        assert {name: saved[name].dtype for name in dtypes if name in saved} == {
            n: dtypes[n] for n in dtypes if n in saved
        }
    assert {name: p.dtype for name, p in model.named_parameters()} == dtypes and "forward" not in vars(model)


# What is refused before work begins, each in one line


@pytest.mark.parametrize(
    "phase, data, settings, message",
    [
        ("dpo", [PAIRS[0] | dict(rejected="total 12")], {}, "'0': its chosen and its rejected answer are equal"),
        ("dpo", [*PAIRS, PAIRS[1] | dict(rejected=" ")], {}, "'4': answer 1 is empty"),
        ("dpo", [PAIRS[0] | dict(images=["no.png"])], {}, "'0': can't decode the image no.png: there is no such file"),
        ("dpo", [PAIRS[0] | dict(images=[None])], {}, "'0': can't decode image 0: NoneType is no image"),
        (
            "dpo",
            [
                dict(
                    prompt=[dict(role="user", content=[dict(type="image"), "x"])], chosen="a", rejected="b", images=None
                )
            ],
            {},
            "'0': its messages have places for 1 images, it has 0",
        ),
        ("dpo", ANSWERS, {}, "a pair has the columns prompt, chosen, rejected"),
        ("dpo", [[PAIRS[0]]], {}, "where it shows some, images; not list"),
        ("dpo", PAIRS, dict(targets=("q_proj", "w_q")), "LoRA target 'w_q' matches no linear module; there are dow"),
        ("dpo", PAIRS, dict(targets=("lm_head",)), "LoRA target 'lm_head' matches no linear module"),
        ("dpo", PAIRS, dict(samples=5), "samples is 5, but the data set has 4"),
        ("sft", [*ANSWERS, ANSWERS[0] | dict(completion="")], {}, "'4': answer 1 is empty"),
        ("sft", [dict(messages=[dict(role="user", content="x?")])], {}, "'0': it has no answer"),
        (
            "sft",
            [ANSWERS[0] | dict(images=["no.png"])],
            {},
            "'0': can't decode the image no.png: there is no such file",
        ),
        ("sft", [], {}, "the data set is empty"),
    ],
)
def test_what_cannot_train_is_refused_before_work_begins(tmp_path, phase, data, settings, message):
    model, processor, batches = model_and_batches()
    before = {name: p.clone() for name, p in model.named_parameters()}
    train, given = (sft, SFT) if phase == "sft" else (dpo, DPO)
    with pytest.raises(ValueError) as error:
        train(model, data, batches, replace(given, **settings), tmp_path / "run", processor=processor)
    assert message in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "run").exists()
    assert all(p.equal(before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "condition, start, message",
    [
        ("C4+", "teacher", "condition 'C4+' starts from a hybrid with mamba2; the checkpoint is no hybrid"),
        ("C6+", "mamba2", "condition 'C6+' starts from a hybrid with gdn; the checkpoint is a hybrid with mamba2"),
        ("C0+", "gdn", "condition 'C0+' starts from no hybrid; the checkpoint is a hybrid with gdn"),
    ],
)
def test_a_condition_starts_from_its_own_kind_of_model(condition, start, message):
    config = tiny.config("qwen3_vl")
    with pytest.raises(ValueError, match=f"^{message.replace('+', '[+]')}"):
        check_start(config if start == "teacher" else hybrid_config(config, mixer=start), CONDITIONS[condition])


def test_an_error_of_a_sample_names_it_and_the_last_checkpoint(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match="can't decode the image .*broken.png") as error:
        run("sft", tmp_path / "run", data=[*ANSWERS, ANSWERS[0] | dict(key="bad", images=[str(broken)])])
    assert "sample 'bad'" in str(error.value) and "\n" not in str(error.value)
    assert "checkpoint" in error.value.__notes__[-1]


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path, monkeypatch):
    make = posttrain.sft_batch

    def spoiled(samples, **given):
        batch = make(samples, **given)
        if any(sample.key == "6" for sample in samples):
            batch["pixel_values"] = torch.full_like(batch["pixel_values"], torch.nan)
        return batch

    monkeypatch.setattr(posttrain, "sft_batch", spoiled)
    with pytest.raises(FloatingPointError, match=r"^loss is nan at step \d of sft\n"):
        run("sft", tmp_path, data=ANSWERS * 2, settings=replace(SFT, lr=1e-4))
    assert not (tmp_path / "student").exists()
    assert len(log(tmp_path)) == posttrain._step(last_checkpoint(tmp_path))


def test_a_pair_beyond_the_longest_teaches_nothing(tmp_path):
    "Its loss is log 2 at every step, and no weight moves."
    model, numbers = run("dpo", tmp_path, settings=replace(DPO, max_length=10, lr=0.1))
    assert {round(line["loss"], 6) for line in log(tmp_path)} == {round(math.log(2), 6)}
    assert all(p.equal(q) for p, q in zip(model.parameters(), model_and_batches()[0].parameters(), strict=True))


@pytest.mark.slow
def test_without_trl_the_module_imports_and_a_run_says_what_to_install():
    code = """
import sys
sys.modules["trl"] = sys.modules["peft"] = None
from heed_nb.posttrain import load_trl
try:
    load_trl()
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout == "SFT and DPO need trl and peft (import of peft halted; None in sys.modules): "
        "pip install 'heed_nb[posttrain]'\n"
    )
