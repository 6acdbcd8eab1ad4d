"Corpora from every source's schema: prepared, read, trained on; bad rows, kills and limits."

import threading
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import copies
import pytest
import tiny
from copies import picture

from heed_nb.conditions import CONDITIONS, TrainSettings
from heed_nb.corpora import load_corpus, prepare
from heed_nb.data import collate
from heed_nb.downloads import public_addresses
from heed_nb.hybrid import to_hybrid
from heed_nb.samples import as_sample
from heed_nb.sources import SOURCES, HeldOut
from heed_nb.trainer import distill


@pytest.fixture(scope="module")
def processor():
    return tiny.processor("qwen3_vl")


@pytest.fixture(scope="module")
def web():
    "A server that stands for the open web; yields its port."

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.strip("/")
            number = name.removesuffix(".png")
            body = picture(int(number)) if number.isdigit() else b""
            self.send_response(200 if body else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def as_declared(port):
    "Addresses with `images.test` as a public name of this machine."
    return lambda host, _: ["127.0.0.1"] if host == "images.test" else public_addresses(host, port)


@pytest.fixture
def corpus(tmp_path, processor, web, monkeypatch):
    "A function that prepares a source's rows and returns its corpus and manifest."
    monkeypatch.setattr(copies, "SITE", f"http://images.test:{web}")

    def make(name, wanted=3, rows=None, images={}, held_out=HeldOut(), limit=0.9, **options):
        copies.write(tmp_path / "copies", name, rows, **images)
        sources = {name: replace(SOURCES[name], limit=limit)}
        options = dict(copies=tmp_path / "copies", progress=False, sources=sources, resolve=as_declared(web)) | options
        made = prepare({name: wanted}, processor, tmp_path / "corpus", held_out, **options)
        return load_corpus(tmp_path / "corpus"), made["sources"][name]

    return make


def texts(row):
    "All texts of a prepared row."
    if row.get("text"):
        return [row["text"]]
    messages = row["messages"] if "messages" in row else row["prompt"] + row["chosen"] + row["rejected"]
    return [entry["text"] for message in messages for entry in message["content"] if entry["type"] == "text"]


def test_a_corpus_trains_a_student(corpus, processor, tmp_path):
    rows, made = corpus("ChartQA", 4)
    assert (made["taken"], made["skipped"]) == (4, {})
    settings, teacher = TrainSettings(3 * sum(rows["tokens"]), batch_size=2), tiny.teacher("qwen3_vl")
    collation = partial(collate, processor=processor)
    numbers = distill(to_hybrid(teacher), teacher, rows, collation, CONDITIONS["C4"], settings, tmp_path / "run")
    assert numbers["steps"] == 6 and numbers["tokens"] == settings.token_budget


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_rows_that_collate(name, corpus, processor):
    rows, made = corpus(name)
    assert made["skipped"] == {} and len(rows) == made["taken"] == 3
    assert len({str(texts(row)) for row in rows}) == 3  # other rows, not one three times
    for row in rows:
        shown = "images" if SOURCES[name].images != "none" and name != "ScienceQA" else "none"
        assert bool(row["images"]) == (shown == "images") or name == "ScienceQA"
        if row.get("text") is None and "messages" in row:
            batch = collate([as_sample(row, 0)], processor)
            assert int(batch["attention_mask"].sum()) == row["tokens"]
