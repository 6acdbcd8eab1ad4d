"lmms-eval in process: metrics against its own, oracles with known scores, both suites, crashes and bad input."

import json
import os
import random
import shutil
import sys
from functools import cache, partial

import pytest
import torch
from PIL import Image
from rapidfuzz.distance import Levenshtein
from transformers import GenerationConfig

import tiny
from heed_nb import evaluate as module
from heed_nb import lmms_model, toyworld
from heed_nb.conditions import BENCHMARKS
from heed_nb.evaluate import METRICS, anls, evaluate, relaxed_accuracy, task_files
from heed_nb.hybrid import to_hybrid
from heed_nb.teachers import load_teacher

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Folders of a random teacher whose answers differ from page to page, and of its hybrid."
    folder, teacher = tmp_path_factory.mktemp("models"), tiny.teacher("qwen3_vl")
    for name, model in dict(teacher=teacher, student=to_hybrid(teacher)).items():
        model.save_pretrained(folder / name)
        tiny.processor("qwen3_vl").save_pretrained(folder / name)
    return folder


@pytest.fixture
def oracle(monkeypatch):
    "A function that puts a model in place whose answer is a function of task and row."

    def put(answer):
        class Oracle(lmms_model.HeedVLM):
            def __init__(self, *args):
                lmms_model.lmms.__init__(self)

            def generate_until(self, requests):
                asked = (request.args[-3:] for request in requests)
                return [answer(task, self.task_dict[task][split][i], i) for i, task, split in asked]

        monkeypatch.setattr(lmms_model, "HeedVLM", Oracle)

    return put


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# Greedy answers


CHATS = [
    [{"role": "user", "content": [{"type": "image", "image": q.image}, {"type": "text", "text": q.question}]}]
    for q in toyworld.benchmark("docvqa", 2, 0)
]


@pytest.fixture(scope="module")
def loaded(models):
    return cache(lambda name: load_teacher(models / name))


@pytest.fixture(scope="module")
def likeliest(loaded):
    "A function: the answers to CHATS, one argmax at a time, each alone and without a cache."

    @cache
    def answers(name, ends):
        (model, processor), said = loaded(name), []
        for chat in CHATS:
            batch = processor.apply_chat_template(
                chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            prompt = batch["input_ids"].shape[1]
            for _ in range(6):
                with torch.no_grad():
                    token = model(**batch).logits[:, -1:].argmax(-1)
                batch["input_ids"] = torch.cat([batch["input_ids"], token], 1)
                for key, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
                    batch[key] = torch.nn.functional.pad(batch[key], (0, 1), value=fill)
                if token in ends:
                    break
            said.append(processor.tokenizer.decode(batch["input_ids"][0, prompt:], skip_special_tokens=True))
        return said

    return answers


SETTINGS = {  # of a generation config, by what they change
    "tokens": dict(
        repetition_penalty=1.5,
        encoder_repetition_penalty=0.5,
        no_repeat_ngram_size=1,
        bad_words_ids=[[i] for i in range(20, 90)],
        suppress_tokens=list(range(20, 90)),
        begin_suppress_tokens=list(range(20, 90)),
        sequence_bias=[[[40], 50.0]],
    ),
    "length": dict(
        exponential_decay_length_penalty=[1, 1.5], min_new_tokens=8, min_length=400, max_length=3, stop_strings=["a"]
    ),
    "at once": dict(max_new_tokens=2, max_time=1e-6, forced_bos_token_id=40, forced_eos_token_id=40),
    "cache": dict(use_cache=False, cache_implementation="offloaded", prefill_chunk_size=4),
    "output": dict(return_dict_in_generate=True, output_scores=True, renormalize_logits=True),
    "another way": dict(penalty_alpha=0.6, dola_layers="high", low_memory=True),
    "guidance": dict(guidance_scale=3.0, token_healing=True, remove_invalid_values=True),
    "sampling": dict(do_sample=True, temperature=5.0, top_k=40, top_p=0.9, min_p=0.1, typical_p=0.9, top_h=0.5),
    "watermark": dict(watermarking_config={"bias": 9.0, "greenlist_ratio": 0.25}),
    "beams": dict(num_beams=4, num_return_sequences=2, num_beam_groups=2, diversity_penalty=1.0, length_penalty=2.0),
    "assistance": dict(prompt_lookup_num_tokens=3, max_matching_ngram_size=2),
    "ends": dict(eos_token_id=[200, 266]),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_only_its_end_tokens_of_a_generation_config_count(monkeypatch, loaded, likeliest, settings):
    name = "teacher" if "prompt_lookup_num_tokens" in settings else "student"
    model, processor = loaded(name)
    given = GenerationConfig.from_dict(model.generation_config.to_dict() | settings)
    monkeypatch.setattr(model, "generation_config", given)
    monkeypatch.setattr(lmms_model, "load_teacher", lambda *args, **kwargs: (model, processor))
    wanted = likeliest(name, (processor.tokenizer.eos_token_id, *settings.get("eos_token_id", [])))
    assert lmms_model.HeedVLM("anywhere").texts(CHATS, 6) == wanted and model.generation_config is given


def test_a_generation_config_of_a_folder_changes_no_score(models, tmp_path):
    folder = shutil.copytree(models / "student", tmp_path / "student")
    path = folder / "generation_config.json"
    numbers = []
    for settings in ({}, dict(repetition_penalty=1.8, do_sample=True, temperature=9.0, suppress_tokens=[40, 41])):
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        evaluate(folder, benchmarks=["docvqa"], questions=2, out=tmp_path)
        numbers.append(lines(tmp_path / "answers.jsonl"))
    assert numbers[0] == numbers[1]


# Metrics


def test_metrics_are_the_harness_own():
    from lmms_eval.api.metrics import anls as theirs
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness

    r = random.Random(0)
    word = lambda: "".join(r.choices("abcd", k=r.randint(1, 8)))
    for _ in range(300):
        response, answers = word(), [word().title(), word().title()]
        assert anls(response, answers) == pytest.approx(theirs(references=answers, predictions=[response])["anls"])
        answer = r.choice(["red", "12%", str(r.randint(0, 40)), str(r.randint(-400, 400) / 10)])
        response = r.choice([answer, answer.upper(), "blue", str(r.randint(0, 40)), f"{r.uniform(0, 40):.1f}", "0.12"])
        assert relaxed_accuracy(response, [answer]) == relaxed_correctness(response, answer)


# The toy suite


def test_an_oracle_scores_100_and_half_an_oracle_50(models, oracle, tmp_path):
    oracle(lambda task, row, i: row["answers"][0])
    numbers = evaluate(models / "teacher", questions=4, seed=3, out=tmp_path)
    assert numbers["scores"] == dict.fromkeys(BENCHMARKS, 100) and numbers["n"] == dict.fromkeys(BENCHMARKS, 4)
    asked = [q for key in BENCHMARKS for q in toyworld.benchmark(key, 4, 3)]
    assert lines(tmp_path / "answers.jsonl") == [
        dict(key=q.key, benchmark=q.benchmark, question=q.question, answers=[q.answer], response=q.answer, score=1.0)
        for q in asked
    ]
    oracle(lambda task, row, i: row["answers"][0] if i % 2 else "?")
    assert evaluate(models / "teacher", questions=4)["scores"] == dict.fromkeys(BENCHMARKS, 50)


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_the_batch_size_changes_no_answer(models, tmp_path, name):
    keys = ["docvqa", "mmmu_pro"]
    for size in (1, 32):
        numbers = evaluate(models / name, benchmarks=keys, questions=6, batch_size=size, out=tmp_path / str(size))
        assert numbers["n"] == dict.fromkeys(keys, 6)
    one, many = (lines(tmp_path / size / "answers.jsonl") for size in ("1", "32"))
    assert one == many
    assert len({line["response"] for line in one}) > 3  # they look at the page


def test_the_command_line_gives_the_same_scores(models, monkeypatch, tmp_path):
    from lmms_eval import __main__ as command
    from lmms_eval.cli.dispatch import main

    keys = ["docvqa", "textvqa"]
    task_manager = partial(command.TaskManager, include_defaults=False)  # the 2000 stock tasks take long to read
    monkeypatch.setattr(command, "TaskManager", task_manager)
    given = dict(
        model="heed_vlm",
        model_args=f"pretrained={models / 'student'},dtype=float32",
        device="cpu",
        tasks=",".join(f"toy_{key}" for key in keys),
        include_path=task_files("toy", keys)[0].parent,
        batch_size=4,
        limit=4,
        output_path=tmp_path / "out",
    )
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["lmms_eval", *words, "--log_samples"])
    try:
        main()
    except SystemExit as exit:
        assert not exit.code
    (results,) = tmp_path.glob("out/*/*_results.json")
    reported = json.loads(results.read_text())["results"]
    numbers = evaluate(models / "student", benchmarks=keys, questions=4, out=tmp_path)
    for key in keys:
        assert 100 * reported[f"toy_{key}"][f"{BENCHMARKS[key].metric},none"] == pytest.approx(numbers["scores"][key])
    said = {s["doc_id"]: s["filtered_resps"] for s in lines(next(tmp_path.glob("out/*/*_samples_toy_docvqa.jsonl")))}
    wanted = [line["response"].strip() for line in lines(tmp_path / "answers.jsonl")[:4]]
    assert [said[i].strip() for i in range(4)] == wanted


# The paper's suite, on small copies of the datasets


def mirror(folder, name, config, split, rows):
    "A dataset's copy as a hub download leaves it."
    from datasets import Dataset

    media, page = "image_1" if config.startswith("standard") else "image", Image.new("RGB", (32, 32), "white")
    data = folder / name / config.split()[0]
    data.mkdir(parents=True)
    Dataset.from_list([row | {media: page} for row in rows]).to_parquet(data / f"{split}-00000-of-00001.parquet")
    readme = folder / name / "README.md"
    earlier = readme.read_text().removesuffix("---\n") if readme.exists() else "---\nconfigs:\n"
    paths = f"  data_files:\n  - split: {split}\n    path: {data.name}/{split}-*\n"
    readme.write_text(f"{earlier}- config_name: {config}\n{paths}---\n")


@pytest.fixture
def copies(tmp_path, monkeypatch):
    "Three or four rows of eight of the ten benchmarks."
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    from lmms_eval.api import task

    task._resolve_hf_datasets_cache_dir.cache_clear()
    folder = tmp_path / "mirror"
    several = dict(options="['one', 'two', 'three']", answer="B", subject="Art")
    word = dict(question="Which word?", answers=["paris"])
    star = dict(question="Which? Options: A: one, B: two", answer="B", category="math", l2_category="geometry")
    bench = dict(question="Which?", hint="nan", A="one", B="two", C="nan", D="nan", answer="B", category="ocr")
    bench |= {"L2-category": "reading", "source": "toy", "split": "dev"}
    choice = dict(question="Which?", options=["one", "two"], answer="1")
    for name, config, split, key, row in (
        ("lmms-lab-encoder/DocVQA", "DocVQA", "validation", "questionId", word),
        ("lmms-lab-encoder/DocVQA", "InfographicVQA", "validation", "questionId", word),
        ("lmms-lab-encoder/ChartQA", "default", "test", None, dict(question="?", answer="100", type="human_test")),
        ("lmms-lab-encoder/textvqa", "default", "validation", "question_id", word | dict(answers=["paris"] * 10)),
        ("lmms-lab-encoder/ai2d", "default", "test", None, choice),
        ("MMMU/MMMU_Pro", "standard (10 options)", "test", "id", dict(question="<image 1> Which?") | several),
        ("MMMU/MMMU_Pro", "vision", "test", "id", several),
        ("Lin-Chen/MMStar", "default", "val", "index", star),
        ("lmms-lab-encoder/MMBench", "en", "dev", "index", bench),
    ):
        number = int if key in ("question_id", "index") else lambda i: f"{split} {i}"
        mirror(folder, name, config, split, [({key: number(i)} if key else {}) | row for i in range(3)])
    yield folder
    task._resolve_hf_datasets_cache_dir.cache_clear()


READING, CHOOSING = ["docvqa", "chartqa", "textvqa", "infovqa"], ["ai2d", "mmmu_pro", "mmstar", "mmbench"]


def test_the_real_tasks_score_from_0_to_100(models, oracle, copies, tmp_path):
    choosing = ("ai2d", "mmmu_pro_standard", "mmmu_pro_vision", "mmstar", "mmbench")
    right = {f"heed_{name}": ("B", "B", "A") for name in choosing} | {
        "heed_docvqa": ("Paris", "Parix", "Rome"),
        "heed_infovqa": ("paris", "parix", "Rome"),
        "heed_chartqa": ("100", "104", "106"),
        "heed_textvqa": ("Paris", "paris.", "Rome"),
    }
    oracle(lambda task, row, i: right[task][i])
    how = dict(suite="paper", benchmarks=READING + CHOOSING, questions=None, mirror=copies)
    numbers = evaluate(models / "teacher", **how, out=tmp_path)
    wanted = dict(docvqa=60, infovqa=60) | dict.fromkeys(["chartqa", "textvqa"] + CHOOSING, 200 / 3)
    assert numbers["scores"] == pytest.approx(wanted, abs=0.01)
    assert numbers["n"] == dict.fromkeys(wanted, 3) | {"mmmu_pro": 6}
    answers = lines(tmp_path / "answers.jsonl")
    assert len(answers) == 27 and answers[0] == {
        "key": "heed_docvqa-000000",
        "benchmark": "docvqa",
        "question": "Which word?\nAnswer the question using a single word or phrase.",
        "answers": ["paris"],
        "response": "Paris",
        "score": 1.0,
    }


UNREADABLE = ["", " \n", "?!", "...", "I cannot tell.", "<unk>", "1e400", "()", "nan"]


@pytest.mark.parametrize("answers", [UNREADABLE, ["B", "(A)", "Paris", "100"]], ids=["unreadable", "readable"])
def test_scores_are_a_function_of_the_answers(models, oracle, copies, answers):
    "The same from any state of Python's generator, which stays where it was, and from any order of the questions."
    scores, keys = [], READING + CHOOSING
    for seed, order in ((0, keys), (1, keys[::-1])):
        oracle(lambda task, row, i: answers[i % len(answers)])
        random.seed(seed)
        state = random.getstate()
        how = dict(suite="paper", benchmarks=order, questions=None, mirror=copies)
        scores.append(evaluate(models / "teacher", **how)["scores"])
        assert random.getstate() == state
    assert scores[0] == scores[1]
    if answers is UNREADABLE:
        assert scores[0] == dict.fromkeys(keys, 0)
    else:
        assert all(scores[0][key] for key in CHOOSING)


@pytest.mark.parametrize(
    "read, right", [("B", 1), ("(b) osaka", 1), ("it is osaka city", 1), ("osaki", 1), ("", 0), ("?", 0), ("rome", 0)]
)
def test_an_option_that_mathvistas_judge_does_not_name_is_wrong(monkeypatch, read, right):
    monkeypatch.setenv("API_TYPE", "dummy")
    monkeypatch.setitem(sys.modules, "Levenshtein", Levenshtein)
    from lmms_eval.tasks.mathvista import utils

    monkeypatch.setattr(utils.mathvista_evaluator, "get_chat_response", lambda *args, **kwargs: read)
    doc = dict(question_type="multi_choice", answer_type="text", query="Which?", pid="1", metadata={})
    doc |= dict(choices=["hong kong", "osaka"], answer="osaka")
    process = module.unread_is_wrong(utils.mathvista_process_results)
    assert process(doc, ["so to say"])["llm_as_judge_eval"]["true_false"] == right
    assert not process(doc | dict(choices=["hong kong", ""], answer=""), [" "])["llm_as_judge_eval"]["true_false"]


@pytest.mark.parametrize(
    "value, wrong",
    [
        (0.7, 0.0),
        (dict(score=0.7, question_type="document parsing en"), dict(score=0.0, question_type="document parsing en")),
        (dict(true_false=True), dict(true_false=False)),
        (dict(parsed_pred="A", id=1), dict(parsed_pred="", id=1)),
    ],
)
def test_a_scorer_that_rewards_a_blank_answer_is_overruled(value, wrong):
    process = module.unread_is_wrong(lambda doc, results: {"metric": value})
    scored = [process({}, [response])["metric"] for response in ("", " \n\t", "word")]
    assert scored == [wrong, wrong, value]


def test_a_model_answers_a_real_task(models, copies):
    numbers = evaluate(models / "student", suite="paper", benchmarks=["chartqa", "ai2d"], questions=2, mirror=copies)
    assert numbers["n"] == {"chartqa": 2, "ai2d": 2} and all(0 <= score <= 100 for score in numbers["scores"].values())


def test_a_missing_dataset_is_named_with_how_to_get_it(models, copies):
    listed = "docvqa: lmms-lab-encoder/DocVQA; ai2d: lmms-lab-encoder/ai2d"
    with pytest.raises(ValueError, match=rf"^datasets are missing \({listed}\); fetch each .*$"):
        evaluate(models / "teacher", suite="paper", benchmarks=["docvqa", "ai2d"])


def test_a_judge_that_judges_nothing_is_none(models, monkeypatch):
    for name, value in {"API_TYPE": "dummy", "OPENAI_API_KEY": "x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="mathvista needs a judge"):
        evaluate(models / "teacher", suite="paper")


def test_the_pins_name_every_benchmark_once_and_a_metric_of_lmms_eval():
    import yaml

    for suite in module.SUITES:
        named = [
            yaml.load(path.read_text().replace("!function ", ""), yaml.SafeLoader)["metadata"]["benchmark"]
            for path in task_files(suite, list(BENCHMARKS))
        ]
        assert list(dict.fromkeys(named)) == list(BENCHMARKS)
    for path in task_files("paper", READING + CHOOSING):
        config = module.pinned_config(path)
        assert [m["metric"] for m in config["metric_list"]] == [config["metadata"]["score"].split(",")[0]], path
        assert "token" not in config["dataset_kwargs"] and config["generation_kwargs"]["do_sample"] is False


# Rows of one's own


ASKED = [dict(role="user", content="a?")]


def row(q):
    turns = [{"role": "user", "content": q.question}, {"role": "assistant", "content": q.answer}]
    return {"images": [q.image], "messages": turns}


@pytest.fixture(scope="module")
def rows():
    return [row(q) for q in toyworld.benchmark("docvqa", 5, 0)]


def test_rows_are_answered_as_a_benchmarks_questions_are(models, rows, tmp_path):
    "And in any order and batches, without the harness."
    columns = lambda path: [[line[c] for c in ("question", "answers", "response", "score")] for line in lines(path)]
    evaluate(models / "student", benchmarks=["docvqa"], questions=5, out=tmp_path / "toy")
    toy = columns(tmp_path / "toy/answers.jsonl")
    for size, order in ((64, 1), (2, -1)):
        numbers = evaluate(models / "student", rows=rows[::order], max_new_tokens=8, batch_size=size, out=tmp_path)
        assert columns(tmp_path / "answers.jsonl")[::order] == toy
        named = [(line["key"], line["benchmark"]) for line in lines(tmp_path / "answers.jsonl")]
        assert named == [(key, "rows") for key in "01234"]
        assert numbers["n"] == {"rows": 5}
        assert numbers["scores"]["rows"] == pytest.approx(20 * sum(score for *_, score in toy))


def test_rows_may_hold_text_alone_and_earlier_turns(models, rows, tmp_path):
    from heed_nb.data import Sample

    turns = [*rows[0]["messages"], *ASKED, {"role": "assistant", "content": "5"}]
    given = [rows[0] | dict(messages=turns), dict(messages=turns[2:], id="text"), Sample("s", [], [("how?", "so")])]
    for metric in METRICS:
        evaluate(models / "student", rows=given, metric=metric, max_new_tokens=3, out=tmp_path)
    asked = [(line["key"], line["question"], line["answers"]) for line in lines(tmp_path / "answers.jsonl")]
    assert asked == [("0", "a?", ["5"]), ("text", "a?", ["5"]), ("s", "how?", ["so"])]


def test_rows_need_no_lmms_eval(models, rows, monkeypatch):
    monkeypatch.setattr(module, "version", lambda name: "0")
    monkeypatch.setattr(module, "run_tasks", None)
    assert evaluate(models / "teacher", rows=rows[:1], max_new_tokens=2)["n"] == {"rows": 1}


# Faults


def test_a_crash_raises_and_leaves_earlier_answers(models, monkeypatch, tmp_path):
    (tmp_path / "answers.jsonl").write_text("earlier\n")
    calls = []

    def texts(self, chats, max_new_tokens):
        calls.append(len(chats))
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return [""] * len(chats)

    monkeypatch.setattr(lmms_model.HeedVLM, "texts", texts)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(models / "teacher", benchmarks=["docvqa"], questions=8, batch_size=4, out=tmp_path)
    assert calls == [4, 4] and [p.name for p in tmp_path.iterdir()] == ["answers.jsonl"]
    assert (tmp_path / "answers.jsonl").read_text() == "earlier\n"


def test_a_full_disk_leaves_earlier_answers(models, monkeypatch, tmp_path):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    (tmp_path / "answers.jsonl").write_text("earlier\n")
    monkeypatch.setattr(os, "fsync", full)  # a disk may say so no earlier
    message = "could not write .*answers.jsonl .No space left on device.; an earlier file is untouched"
    with pytest.raises(OSError, match=message):
        evaluate(models / "teacher", benchmarks=["docvqa"], questions=2, out=tmp_path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("answers.jsonl", "earlier\n")]


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(rows=[]), "empty"),
        (dict(rows=[0, 1]), "data set"),
        (dict(rows=[dict(messages=[])]), "sample '0': its messages end with none, not with a question and an answer"),
        (dict(rows=[dict(id="x", messages=ASKED)]), "sample 'x': its messages end with user, not with"),
        (dict(rows=[dict(messages=[*ASKED, dict(role="assistant", content=" ")])]), "sample '0': its last answer is e"),
        (dict(rows=[dict(images=["none.png"], messages=[*ASKED, dict(role="assistant", content="b")])]), "none.png"),
        (dict(rows=[], metric="bleu"), "unknown metric 'bleu'; one of anls"),
        (dict(rows=[], benchmarks=["docvqa"]), "give either rows or benchmarks, not both"),
        (dict(rows=[], max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (dict(suite="tiny"), "unknown suite 'tiny'; one of toy, paper"),
        (dict(benchmarks=[]), "no benchmarks given"),
        (dict(suite="paper", benchmarks=["texture"]), "unknown benchmark 'texture'; some of ocrbench_v2"),
        (dict(questions=0), "questions must be at least 1, got 0"),
        (dict(questions=None), "questions must be a number"),
        (dict(batch_size=1.5), "batch_size must be at least 1, got 1.5"),
        (dict(dtype="fp32"), "unknown dtype 'fp32'; one of float32, bfloat16, float16"),
    ],
)
def test_a_wrong_argument_is_named_before_the_model_is_loaded(models, monkeypatch, tmp_path, wrong, says):
    monkeypatch.setattr(module, "load_teacher", None)
    monkeypatch.setattr(lmms_model, "load_teacher", None)
    with pytest.raises(ValueError) as error:
        evaluate(models / "teacher", out=tmp_path, **wrong)
    assert says in str(error.value) and "\n" not in str(error.value) and not list(tmp_path.iterdir())
