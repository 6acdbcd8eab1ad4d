"A corpus from every source's schema: fixtures of a few rows, prepared, read and trained on."

from functools import partial

import tiny
from datasets import Dataset, Features, Image, List, Value

from heed_nb.conditions import CONDITIONS, TrainSettings
from heed_nb.corpora import load_corpus, prepare
from heed_nb.data import collate
from heed_nb.hybrid import to_hybrid
from heed_nb.trainer import distill


def parquet(path, rows, **features):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row[name] for row in rows] for name in features}
    Dataset.from_dict(columns, Features(features)).to_parquet(path)


def chartqa(folder, n=6):
    rows = [dict(image=tiny.page(64, 48, i), query=f"How many {i}?", label=[str(i)]) for i in range(n)]
    path = folder / "HuggingFaceM4/ChartQA/data/train-00000-of-00001.parquet"
    parquet(path, rows, image=Image(), query=Value("string"), label=List(Value("string")))


def test_a_corpus_trains_a_student(tmp_path):
    chartqa(tmp_path / "copies")
    processor, teacher = tiny.processor("qwen3_vl"), tiny.teacher("qwen3_vl")
    made = prepare({"ChartQA": 4}, processor, tmp_path / "corpus", copies=tmp_path / "copies", progress=False)
    assert (made["samples"], made["sources"]["ChartQA"]["skipped"]) == (4, {})
    rows = load_corpus(tmp_path / "corpus")
    assert len(rows) == 4 and len({row["messages"][0]["content"][1]["text"] for row in rows}) == 4
    settings = TrainSettings(token_budget=3 * sum(rows["tokens"]), batch_size=2, lr=1e-3)
    collation = partial(collate, processor=processor)
    numbers = distill(to_hybrid(teacher), teacher, rows, collation, CONDITIONS["C4"], settings, tmp_path / "run")
    assert numbers["steps"] == 6 and numbers["tokens"] == settings.token_budget
