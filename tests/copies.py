"A few rows of every source in its own schema, in a folder of repositories as the hub has them."

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

import tiny
from heed_nb.sources import BENCHMARKS, SOURCES

SITE = "http://images.test"  # stands for the open web; a test adds the port


def picture(seed, kind="PNG", **options):
    "The bytes of an image of noise."
    file = io.BytesIO()
    tiny.page(64, 48, seed).save(file, kind, **options)
    return file.getvalue()


def said(*texts):
    "A conversation in LLaVA's format."
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def messages(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def _fineweb(i):
    about = dict(id=f"<urn:{i}>", dump="CC-MAIN-2024-10", url="https://a.org", file_path="s3://a", language="en")
    return dict(text=f"Page {i} is about rivers.", **about, language_score=0.9, token_count=6, score=3.1, int_score=3)


def _grit(i):
    scores = dict(key=f"{i:09d}", clip_similarity_vitb32=0.3, clip_similarity_vitl14=0.2, id=i)
    parts = dict(noun_chunks=[[0.0, 5.0, 0.1, 0.1, 0.9, 0.9, 0.8]], ref_exps=[[0.0, 5.0, 0.1, 0.1, 0.9, 0.9, 0.8]])
    return scores | dict(url=f"{SITE}/{i}.png", caption=f"Noise number {i}", width=64, height=48) | parts


def _llava(i, **image):
    return dict(id=f"row-{i}", **image, conversations=said("<image>\nWhat is it?", f"Noise {i}.", "Is it loud?", "No."))


def _docvqa(i):
    ids = dict(questionId=str(i), question_types=["form"], docId=i, ucsf_document_id="abc", ucsf_document_page_no="1")
    return ids | dict(
        question=f"What is line {i}?", image=tiny.page(64, 48, i), answers=[f"{i}", f"{i}"], data_split="train"
    )


def _science(i):
    image = tiny.page(64, 48, i) if i % 2 else None
    asked = dict(question="Which is larger?", choices=["a cat", "a horse"], answer=1, hint="", task="closed choice")
    rest = dict(grade="grade2", subject="natural science", topic="biology", category="c", skill="s", lecture="")
    return dict(image=image) | asked | rest | dict(solution=f"A horse is larger, {i}.")


def _vlfeedback(i):
    rating = lambda n: {name: {"Rating": str(n), "Rationale": "r"} for name in ("Helpfulness", "Visual Faithfulness")}
    answers = [dict(annotations=rating(n), model=f"m{n}", response=f"Answer {n} of {i}.") for n in (3, 5, 1, 2)]
    return dict(id=f"{i}", prompt=f"What is {i}?", img_path=f"{i}.png", models=["m"], completions=answers)


def _ultrafeedback(i):
    chosen, rejected = (messages(f"Say {i}.", answer) for answer in (f"It is {i}.", "No."))
    asked = dict(prompt=f"Say {i}.", prompt_id=str(i), messages=chosen, score_chosen=8.0, score_rejected=3.0)
    return asked | dict(chosen=chosen, rejected=rejected)


def _rlhf_v(i):
    text = json.dumps(dict(question=f"What is {i}?", chosen=f"Noise {i}.", rejected="A cat."))
    origin = dict(origin_dataset="llava", origin_split="{}", idx=i, image_path=f"{i}.jpg")
    return dict(ds_name="RLHF-V", image=tiny.page(64, 48, i), text=text) | origin


def _mmpr(i):
    image = [f"{i}.png"] if i % 2 else f"{i}.png"
    return dict(image=image, question=f"<image>\nWhat is {i}?", chosen=f"Noise {i}.", rejected="A cat.")


def _synthdog(i):
    return dict(image=tiny.page(64, 48, i), ground_truth=json.dumps(dict(gt_parse=dict(text_sequence=f"words {i}"))))


def _obelics(i):
    general = json.dumps(dict(url="https://a.org", warc_filename="f"))
    page = dict(images=[None, f"{SITE}/{i}.png", None], texts=[f"Before {i}.", None, f"After {i}."])
    return page | dict(metadata=json.dumps([None, {}, None]), general_metadata=general)


def _textvqa(i):
    asked = dict(image_id=str(i), question_id=i, question=f"What is sign {i}?", question_tokens=["what"])
    flickr = dict(image_width=64, image_height=48, flickr_original_url="https://f.org", flickr_300k_url="https://f.org")
    rest = dict(answers=[f"s{i}"] * 6 + ["unreadable"] * 4, image_classes=["Sign"], set_name="train", ocr_tokens=["s"])
    return asked | dict(image=tiny.page(64, 48, i)) | flickr | rest


ONEVISION = "chartqa(cauldron,llava_format)/train-00000-of-00001.parquet"
COLUMNS = "train-00000-of-00001.parquet"
ROWS = {  # source -> the path of its file, a row of it
    "FineWeb-Edu": ("sample/10BT/000_00000.parquet", _fineweb),
    "DCLM-Baseline": (
        "global-shard_01_of_10/local-shard_0_of_10/shard_00000000_processed.jsonl.zstd",
        lambda i: dict(text=f"Text {i} of the web.", url="https://a.org", metadata={"n": i}),
    ),
    "GRIT": ("grit-20m/coyo_0_snappy.parquet", _grit),
    "LLaVA-OneVision": (ONEVISION, lambda i: _llava(i, image=tiny.page(64, 48, i)) | dict(data_source="chartqa")),
    "Cambrian-7M OCR": ("jsons/Cambrian7M.jsonl", lambda i: _llava(i, image=f"ai2d/{i}.png")),
    "ShareGPT-4o": ("image_conversations/gpt-4o.jsonl", lambda i: _llava(i, image=f"{i}.png")),
    **{f"SynthDoG-{language}": (f"data/{COLUMNS}", _synthdog) for language in ("en", "zh", "ja", "ko")},
    "DocVQA": (f"DocVQA/{COLUMNS}", _docvqa),
    "InfoVQA": (f"InfographicVQA/{COLUMNS}", _docvqa),
    "ChartQA": (
        f"data/{COLUMNS}",
        lambda i: dict(image=tiny.page(64, 48, i), query=f"How many {i}?", label=[f"{i}"], human_or_machine=0),
    ),
    "TextVQA": (f"data/{COLUMNS}", _textvqa),
    "AI2D": (ONEVISION.replace("chartqa", "ai2d"), lambda i: _llava(i, image=tiny.page(64, 48, i))),
    "OBELICS": (f"data/{COLUMNS}", _obelics),
    "Cambrian-7M": ("jsons/Cambrian7M.jsonl", lambda i: _llava(i, image=f"coco/train2017/{i}.png")),
    "ScienceQA": (f"data/{COLUMNS}", _science),
    "MathV360K": ("data/train_samples_all_tuning.json", lambda i: _llava(i, image=f"geo/{i}.png")),
    "UltraChat": (
        f"data/train_sft-{COLUMNS[6:]}",
        lambda i: dict(prompt=f"Say {i}.", prompt_id=str(i), messages=messages(f"Say {i}.", f"{i}.", "More?", "No.")),
    ),
    "Magpie-Pro": (f"data/{COLUMNS}", lambda i: dict(uuid=str(i), conversations=said(f"Say {i}.", f"{i}."))),
    "LIMA": ("train.jsonl", lambda i: dict(conversations=[f"Say {i}.", f"{i}."], source="stackexchange")),
    "SlimOrca": (
        "oo-labeled.jsonl",
        lambda i: dict(conversations=[{"from": "system", "value": "Be brief."}, *said(f"Say {i}.", f"{i}.")]),
    ),
    "MMPR": ("annotations/m3cot.jsonl", _mmpr),
    "VLFeedback": ("vlfeedback_80k.jsonl", _vlfeedback),
    "UltraFeedback": (f"data/train_prefs-{COLUMNS[6:]}", _ultrafeedback),
    "RLHF-V": ("RLHF-V-Dataset.parquet", _rlhf_v),
}


def write_rows(path, rows):
    "Rows, or a file's bytes, as Parquet, a JSON list or JSON lines by the name's end; a row may be a line's bytes."
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(rows, bytes):
        return path.write_bytes(rows)
    if path.name.endswith(".parquet"):
        return Dataset.from_list(rows).to_parquet(path)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    if path.name.endswith(".json"):
        return path.write_bytes(b"[" + b",".join(lines) + b"]")
    content = b"".join(line + b"\n" for line in lines)
    if path.name.endswith(".zstd"):
        content = pa.compress(content, "zstd", asbytes=True)
    path.write_bytes(content)


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def write(folder, name, rows=None, n=4, **images):
    "A source's repository: its rows, by default n good ones, and its archives with n images and those given by name."
    source, (path, row) = SOURCES[name], ROWS[name]
    home, rows = Path(folder, source.repository), [row(i) for i in range(n)] if rows is None else rows
    write_rows(home / path, rows)
    pictures = {f"{i}.png": picture(i) for i in range(n)} | images
    for pattern in source.archive_patterns:
        folders = {"ShareGPT-4o": "mnt/images", "MathV360K": "images/geo", "MMPR": "images/m3cot"}
        if pattern.endswith("zip"):
            write_zip(
                home / pattern, {f"{folders.get(name, 'merged')}/{file}": data for file, data in pictures.items()}
            )
        elif pattern.endswith("tar.gz*"):
            inside = pattern.removesuffix(".tar.gz*")
            below = "coco/train2017" if inside == "coco" else inside
            write_tar(home / pattern[:-1], {f"{below}/{file}": data for file, data in pictures.items()})
    if name == "MMPR":
        write_zip(home / "annotations.zip", {"annotations/m3cot.jsonl": (home / path).read_bytes()})
        root = {"root": "MMPR-v1.2/images/m3cot", "annotation": "MMPR-v1.2/annotations/m3cot.jsonl"}
        (home / "meta.json").write_text(json.dumps({"m3cot": root}))
        write_zip(home / "images.zip", {f"images/m3cot/{file}": data for file, data in pictures.items()})
        whole = (home / "images.zip").read_bytes()
        for i, end in enumerate(("aa", "ab", "ac")):
            cut = len(whole) // 3 + 1
            (home / f"images.zip_{end}").write_bytes(whole[cut * i : cut * (i + 1)])
        (home / "images.zip").unlink()


def write_benchmarks(folder):
    "One row of each benchmark: its question, and the picture of its number."
    for place, source in enumerate(BENCHMARKS.values(), 1000):
        question, *images = source.columns
        row = {question: f"What is {source.name}?"} | {image: tiny.page(64, 48, place) for image in images[:1]}
        for pattern in source.files:
            write_rows(Path(folder, source.repository, pattern.replace("*", "0")), [row | dict.fromkeys(images[1:])])
