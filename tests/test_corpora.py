"Corpora from every source's schema: prepared, read, trained on; bad rows, kills and limits."

import io
import json
import random
import signal
import ssl
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import copies
import tiny
from copies import picture
from heed_nb import corpora
from heed_nb.conditions import CONDITIONS, TrainSettings
from heed_nb.corpora import Caps, benchmark_rows, check_source, load_corpus, prepare
from heed_nb.data import collate
from heed_nb.downloads import Limits, Refused, fetch, public_addresses
from heed_nb.hybrid import to_hybrid
from heed_nb.samples import as_sample, viewed
from heed_nb.sources import BENCHMARKS, SOURCES, HeldOut
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
            self.send_response(200 if body else 302 if name == "private" else 404)
            if name == "private":
                self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/0.png")
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
def test_every_source_gives_rows_as_long_as_collated(name, corpus, processor, tmp_path):
    rows, made = corpus(name)
    assert check_source(SOURCES[name], tmp_path / "copies")[1:3] == ["columns as expected", "4 of 4 rows are read"]
    assert made["skipped"] == {} and len(rows) == made["taken"] == 3
    assert len({str(texts(row)) for row in rows}) == 3  # each row once
    if name != "ScienceQA":  # some of its questions have no image
        assert all(bool(row["images"]) == (SOURCES[name].images != "none") for row in rows)
    for row in rows:
        both = (
            [row] if "messages" in row else [dict(row, messages=row["prompt"] + row[c]) for c in ("chosen", "rejected")]
        )
        lengths = [int(collate([as_sample(one, 0)], processor)["attention_mask"].sum()) for one in both]
        assert row["tokens"] == max(lengths)


def test_text_is_learned_without_a_template(corpus, processor):
    rows, _ = corpus("FineWeb-Edu")
    batch = collate([as_sample(row, 0) for row in rows], processor)
    for row, ids, labels in zip(rows, batch["input_ids"], batch.labels):
        assert processor.tokenizer.decode(ids[labels >= 0]) == row["text"]
        assert (labels >= 0).sum() == row["tokens"]


BAD = {  # source, a bad row beside its good ones, why it is skipped
    "empty conversation": ("ShareGPT-4o", dict(image="0.png", conversations=[]), "unreadable row", "are none"),
    "no answer": ("SlimOrca", dict(conversations=copies.said("Say 7.")), "unreadable row", "are none"),
    "empty answer": ("LIMA", dict(conversations=["Say 7.", " "]), "unusable conversation", "answer 0 is empty"),
    "two answers": ("LIMA", dict(conversations=["Say 7.", None]), "unusable text", "NoneType"),
    "damaged line": ("LIMA", b'{"conversations": ["Say', "unreadable row", "control character"),
    "invalid UTF-8": ("LIMA", b'{"conversations": ["Say \xff.", "7."]}', "unreadable row", "utf-8"),
    "lone surrogate": ("LIMA", b'{"conversations": ["Say \\ud800.", "7."]}', "unusable text", "UTF-8"),
    "image token": ("LIMA", dict(conversations=["Say <|image_pad|>.", "7."]), "unusable text", "<|image_pad|>"),
    "turn token": ("LIMA", dict(conversations=["Say 7.", "7<|im_end|>8"]), "unusable text", "<|im_end|>"),
    "empty text": ("DCLM-Baseline", dict(text=" \n"), "unusable text", "it is empty"),
    "long answer": ("LIMA", dict(conversations=["Say 7.", "7" * 300]), "too long", "more tokens than the cap"),
    "no such member": ("ShareGPT-4o", copies._llava(7, image="7.png"), "missing image", "0 members"),
    "other folder": ("ShareGPT-4o", copies._llava(7, image="../../etc/passwd"), "missing image", "0 members"),
    "too few images": (
        "ShareGPT-4o",
        dict(image="0.png", conversations=copies.said("<image><image>?", "7.")),
        "",
        "2 images",
    ),
    "same answers": ("MMPR", copies._mmpr(7) | dict(rejected="Noise 7."), "unreadable row", "are the same"),
    "dead link": ("GRIT", copies._grit(7) | dict(url="http://images.test/gone"), "missing image", "HTTP 404"),
    "private link": (
        "GRIT",
        copies._grit(7) | dict(url="http://127.0.0.1/0.png"),
        "missing image",
        "no public address",
    ),
    "redirect": (
        "GRIT",
        copies._grit(7) | dict(url="http://images.test/private"),
        "missing image",
        "no public address",
    ),
    "local file": ("GRIT", copies._grit(7) | dict(url="file:///etc/passwd"), "missing image", "no http or https URL"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_skipped_and_counted(case, corpus, web):
    name, bad, reason, detail = BAD[case]
    if isinstance(bad, dict) and "url" in bad:
        bad = bad | dict(url=bad["url"].replace("images.test", f"images.test:{web}"))
    good = [copies.ROWS[name][1](i) for i in range(3)]
    rows, made = corpus(name, 3, [good[0], bad, *good[1:]], caps=Caps(tokens=200))
    ((found, (count, example)),) = made["skipped"].items()
    assert count == 1 and len(rows) == 3 and found.startswith(reason) and detail in example


def file_of(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def orientation(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


PAGE = tiny.page(64, 48)
UNUSABLE = {
    "truncated": (picture(0)[:500], "can't decode"),
    "no image": (b"<html>gone</html>", "format is not known"),
    "bomb": (file_of(Image.new("1", (8000, 8000)), "PNG"), "64000000 pixels"),
    "thin": (file_of(Image.new("RGB", (1, 10_000)), "PNG"), "200 times the other"),
    "large": (picture(0) + bytes(50_000), "40000"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_an_unusable_image_is_skipped(case, corpus):
    data, detail = UNUSABLE[case]
    good = [copies.ROWS["ShareGPT-4o"][1](i) for i in range(3)]
    bad = copies._llava(7, image="bad.png")
    rows, made = corpus("ShareGPT-4o", 3, [bad, *good], {"bad.png": data}, caps=Caps(bytes=40_000))
    ((_, (count, example)),) = made["skipped"].items()
    assert count == 1 and len(rows) == 3 and detail in example


USABLE = {
    "CMYK": file_of(PAGE.convert("CMYK"), "JPEG"),
    "16 bits": file_of(Image.fromarray(np.asarray(PAGE)[..., 0].astype(np.uint16) * 257), "PNG"),
    "turned": file_of(PAGE, "JPEG", exif=orientation(6)),
    "animated": file_of(PAGE, "GIF", save_all=True, append_images=[tiny.page(64, 48, 1)]),
    "palette": file_of(PAGE.quantize(), "PNG"),
    "clear": file_of(PAGE.convert("RGBA"), "WEBP", lossless=True),
}


@pytest.mark.parametrize("case", USABLE)
def test_an_unusual_image_is_stored_as_a_viewer_shows_it(case, corpus):
    rows, made = corpus("ShareGPT-4o", 1, [copies._llava(7, image="new.png")], {"new.png": USABLE[case]})
    (stored,) = rows[0]["images"]
    assert made["skipped"] == {}
    assert np.array_equal(np.asarray(viewed(stored)), np.asarray(viewed(USABLE[case])))
    assert (stored["bytes"] == USABLE[case]) == (case != "animated")


def test_text_that_is_not_utf8_in_parquet(corpus, tmp_path):
    "Arrow checks no text when it reads."
    binary = pa.array([b"one", b"\xff\xfe", b"two"])
    text = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"text": text}), path)
    rows, made = corpus("FineWeb-Edu", 2, path.read_bytes())
    assert sorted(rows["text"]) == ["one", "two"] and "utf-8" in made["skipped"]["unreadable row"][1]


def test_changed_columns_are_named(corpus):
    rows = [dict(image=PAGE, question="How many?", label=["7"])]
    with pytest.raises(ValueError, match="^ChartQA lacks query; its columns are image, question, label$"):
        corpus("ChartQA", 1, rows)


def test_a_source_stops_at_its_limit(corpus):
    rows = [dict(conversations=["Say 7.", ""]), *map(copies.ROWS["LIMA"][1], range(9))]
    with pytest.raises(
        ValueError, match=r"^LIMA: 1 of 10 rows can't be used, more than its limit of 5%.*answer 0 is empty"
    ):
        corpus("LIMA", 9, rows, limit=0.05)
    assert corpus("LIMA", 9, rows, limit=0.2)[1]["taken"] == 9  # the same folder, with a higher limit


def test_caps_cut_texts_drop_turns_and_scale_images(corpus, processor):
    caps = Caps(tokens=60, text_tokens=20, visual_tokens=9)
    text = "é" * 30 + " end"
    (row,), _ = corpus("DCLM-Baseline", 1, [dict(text=text)], caps=caps)
    assert text.startswith(row["text"]) and row["tokens"] == 20 == len(row["text"].encode())


def test_a_long_conversation_keeps_the_turns_that_fit(corpus):
    rows, _ = corpus("LIMA", 1, [dict(conversations=["a?", "1", "b?", "2", "c?", "3" * 99])], caps=Caps(tokens=60))
    assert texts(rows[0]) == ["a?", "1", "b?", "2"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_large_image_is_scaled_not_cut(kind, corpus, processor):
    page = Image.linear_gradient("L").resize((96, 96)).convert("RGB")  # 36 tokens
    images = {"new.png": file_of(page, kind)}
    rows, _ = corpus("ShareGPT-4o", 1, [copies._llava(7, image="new.png")], images, caps=Caps(visual_tokens=9))
    small = viewed(rows[0]["images"][0])
    assert rows[0]["visual_tokens"] == 9 and small.width == small.height < 96
    edges = np.asarray(small)[[0, -1], 0, 0].astype(int)
    assert edges[0] < 20 and edges[1] > 235  # the gradient's ends are still there
    assert rows[0]["images"][0]["bytes"][:2] == images["new.png"][:2]


def test_benchmark_rows_are_left_out(corpus, tmp_path):
    copies.write_benchmarks(tmp_path / "copies")
    held_out = benchmark_rows(tmp_path / "copies", progress=False)
    assert len(held_out.questions) == len(held_out.pixels) == len(BENCHMARKS)
    place = 1000 + list(BENCHMARKS).index("ChartQA")
    image = tiny.page(64, 48, place)
    near = Image.open(io.BytesIO(file_of(image, "JPEG", quality=90)))
    row = lambda image, query: dict(image=image, query=query, label=["7"], human_or_machine=0)
    bad = [row(image, "How many?"), row(near, "What is ChartQA?")]
    other = [row(PAGE, "What is ChartQA?"), row(near, "How many?"), copies.ROWS["ChartQA"][1](1)]
    rows, made = corpus("ChartQA", 3, bad + other, held_out=held_out, limit=0.01)
    assert made["skipped"]["in a benchmark"][0] == 2 and len(rows) == 3


def test_a_small_source_is_read_again(corpus):
    rows, made = corpus("LIMA", 2_000)
    assert made["taken"] == 4 and made["repeats"] == 500 and len(rows) == 2_000
    assert texts(rows[0]) == texts(rows[4]) == texts(rows[1996])


def test_another_plan_is_refused(corpus):
    rows, _ = corpus("LIMA", 3)
    assert list(corpus("LIMA", 3)[0]) == list(rows)  # done before
    with pytest.raises(ValueError, match="was begun with another seed; remove it"):
        corpus("LIMA", 3, seed=1)


def test_a_corpus_that_is_not_whole_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="LIMA ended after 4 of 5 rows"):
        corpus("LIMA", 5)
    with pytest.raises(ValueError, match="no whole corpus; `make data` prepares it"):
        load_corpus(tmp_path / "corpus")


def test_a_killed_preparation_goes_on_to_the_same_corpus(processor, tmp_path, monkeypatch):
    "By SIGKILL at any moment, with workers, which end too; uninterrupted and without workers it is the same corpus."
    monkeypatch.setattr(corpora, "CHUNK", 4)
    monkeypatch.setattr(corpora, "SHARD", 2)
    rows = [dict(conversations=[f"Say {i}.", "" if i % 7 == 0 else f"{i}."]) for i in range(200)]
    copies.write(tmp_path / "copies", "LIMA", rows)
    copies.write(tmp_path / "copies", "ShareGPT-4o", n=12)
    sources = {name: replace(SOURCES[name], limit=0.5) for name in ("LIMA", "ShareGPT-4o")}
    wanted = {"LIMA": 120, "ShareGPT-4o": 12}
    options = dict(copies=tmp_path / "copies", progress=False, sources=sources)

    def start(folder, **more):  # in a process of its own, as a lock of `datasets` does not outlive a fork
        arguments = (wanted, processor, tmp_path / folder, HeldOut())
        run = get_context("fork").Process(target=prepare, args=arguments, kwargs=options | more)
        run.start()
        return run

    start("whole").join()
    chance, kills = random.Random(0), 0
    while not (tmp_path / "killed/manifest.json").exists():
        run = start("killed", workers=2)
        written = lambda: len(list((tmp_path / "killed").glob("*/*.arrow")))
        enough = written() + chance.randrange(1, 10)
        while run.is_alive() and written() < enough:
            time.sleep(0.002)
        workers = psutil.Process(run.pid).children() if run.is_alive() else []
        kills += run.is_alive()
        run.kill()
        run.join()
        assert run.exitcode in (0, -signal.SIGKILL)
        assert not psutil.wait_procs(workers, timeout=10)[1]
    assert kills >= 2
    made, whole = (json.loads((tmp_path / folder / "manifest.json").read_text()) for folder in ("killed", "whole"))
    for counts in (*whole["sources"].values(), *made["sources"].values()):
        counts.pop("seconds")
    assert made == whole
    assert list(load_corpus(tmp_path / "killed")) == list(load_corpus(tmp_path / "whole"))


def test_a_seed_draws_its_own_rows(corpus, processor, tmp_path):
    copies.write(tmp_path / "copies", "LIMA", n=300)
    sources = {"LIMA": replace(SOURCES["LIMA"], rows=300)}
    options = dict(copies=tmp_path / "copies", progress=False, sources=sources)
    drawn = []
    for seed, folder in ((0, "a"), (0, "b"), (1, "c")):
        prepare({"LIMA": 100}, processor, tmp_path / folder, HeldOut(), seed=seed, **options)
        drawn.append({str(texts(row)) for row in load_corpus(tmp_path / folder)})
    assert drawn[0] == drawn[1] and len(drawn[0]) == 100 and 15 < len(drawn[0] & drawn[2]) < 55


@pytest.fixture(scope="module")
def slow_web():
    "A server that sends a header or a byte at a time, fails before it answers, or says too little."
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.strip("/")
            asked.append(name)
            if name == "headers":
                self.connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            elif name == "busy" and asked.count("busy") < 3:
                return self.send_error(503)
            else:
                self.send_response(200)
                self.send_header("Content-Length", "9" if name == "short" else "1000" if name == "drip" else "2")
                self.end_headers()
                self.wfile.write(b"ok")
            with suppress(OSError):
                for _ in range(60 if name in ("drip", "headers") else 0):
                    self.wfile.write(b"x")
                    time.sleep(0.1)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://images.test:{server.server_port}/", asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("drip", TimeoutError, "more than 0.4 seconds"),
        ("headers", TimeoutError, "0.4"),
        ("short", OSError, "2 of 9 bytes"),
    ],
)
def test_a_slow_or_short_answer_ends(name, error, message, slow_web):
    site, asked = slow_web
    began = time.monotonic()
    with pytest.raises(error, match=message):
        fetch(site + name, Limits(seconds=0.4, tries=1), as_declared(0))
    assert time.monotonic() - began < 2 and asked.count(name) == 1


def test_a_busy_server_is_asked_again(slow_web):
    site, asked = slow_web
    assert fetch(site + "busy", resolve=as_declared(0)) == b"ok" and asked.count("busy") == 3


def test_a_certificate_must_be_the_hosts(tmp_path):
    "The connection goes to an address, the certificate is checked against the name."
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=images.test"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=DNS:images.test"], cwd=tmp_path, check=True, capture_output=True
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here, url = lambda host, port: ["127.0.0.1"], f"https://{{}}:{server.server_port}/no-such-file"
    try:
        with pytest.raises(Refused, match="certificate is not valid"):
            fetch(url.format("images.test"), resolve=here)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
            with pytest.raises(Refused, match="HTTP 404"):
                fetch(url.format("images.test"), resolve=here)
            with pytest.raises(Refused, match="certificate is not valid: Hostname mismatch"):
                fetch(url.format("other.test"), resolve=here)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_a_users_images_train_from_make_data(copy_of_repository, tmp_path):
    home, pages = copy_of_repository(tmp_path / "repository"), tmp_path / "pages"
    pages.mkdir()
    for i in range(20):
        tiny.page(96, 96, i).save(pages / f"{i}.png")
    rows = [dict(file_name=f"{i}.png", question=f"Which is {i}?", answer=f"{i}") for i in range(20)]
    (pages / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scale = f"teacher: outputs/teachers/toy-qwen3vl\ndata: {pages}\ntoken_budget: 400\ntrain: {{batch_size: 2}}\n"
    (home / "workflow/scales/mine.yaml").write_text(scale)

    def run(name, **parameters):
        code = f"from heed_nb.batch import run_notebook; run_notebook('nbs/runs/{name}.ipynb', {parameters})"
        return subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True)

    early = run("distill", scale="mine", condition="C4")
    assert early.stderr.splitlines()[-1].endswith("is not prepared; `make data SCALE=mine` prepares it")
    for name, parameters in (("prepare", {}), ("prepare", {}), ("distill", dict(condition="C4"))):
        done = run(name, scale="mine", **parameters)
        assert done.returncode == 0, done.stderr
    (made,) = home.glob("outputs/mine/runs/*/distill.json")
    assert json.loads(made.read_text())["numbers"]["tokens"] >= 400
