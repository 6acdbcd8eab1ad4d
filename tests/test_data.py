"Images, rows and chat templates of every kind: what the model sees and learns, or one line that names the sample."

import base64
import io
import pickle
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, List
from datasets import Image as ImageFeature
from PIL import Image, ImageFile

import tiny
from heed_nb.conditions import CONDITIONS, TrainSettings
from heed_nb.data import BadSample, Sample, collate
from heed_nb.hybrid import to_hybrid
from heed_nb.samples import as_sample, samples_of, viewed, viewed_images
from heed_nb.teachers import family_of
from heed_nb.trainer import distill
from heed_nb.weight_cache import sample_key

FAMILIES = list(tiny.TINY)
RGB = np.array(tiny.page(48, 64, 5))
PAGE = Image.fromarray(RGB)
GREY = np.asarray(PAGE.convert("L"))
ALPHA = np.where(np.arange(48) < 24, 0, 255).astype(np.uint8) * np.ones((64, 1), np.uint8)
TURNED = [
    None,
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_90,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_270,
]  # what a camera stores under orientations 1 to 8


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(values):
    return np.repeat(values[..., None], 3, -1)


def over_white(rgb, alpha=ALPHA):
    return np.where(alpha[..., None] == 0, 255, rgb)


def photograph(orientation, kind="png"):
    exif, turned = Image.Exif(), TURNED[orientation - 1]
    exif[0x0112] = orientation
    stored = PAGE if turned is None else PAGE.transpose(turned)
    return encoded(stored, kind, exif=exif, **dict(lossless=True) if kind == "webp" else {})


def palette(clear=None, image=PAGE):
    quantized = image.quantize(8)
    if clear is not None:
        quantized.info["transparency"] = clear
    return quantized


def with_mode(mode):
    image = Image.merge("RGBA", [*PAGE.split(), Image.fromarray(ALPHA)])
    return image.convert(mode)


def sought(frame):
    image = Image.open(io.BytesIO(FRAMES["gif"]))
    image.seek(frame)
    return image


FRAMES = {
    kind: encoded(palette(), kind, save_all=True, append_images=[palette(image=PAGE.rotate(180))])
    for kind in ("gif", "tiff")
}
P = np.asarray(palette().convert("RGB"))
CLEAR = np.asarray(palette()) == 3
DEEP = GREY.astype(np.uint16) * 257
SEEN = (
    {  # what is given, and the pixels that a viewer shows
        "PIL": (PAGE, RGB),
        "bytes": (encoded(PAGE), RGB),
        "file": (io.BytesIO(encoded(PAGE)), RGB),
        "base64": (base64.b64encode(encoded(PAGE)).decode(), RGB),
        "data URL": ("data:image/png;base64," + base64.b64encode(encoded(PAGE)).decode(), RGB),
        "dict of bytes": (dict(bytes=encoded(PAGE), path=None), RGB),
        "dict of both": (dict(bytes=encoded(PAGE), path="elsewhere.png"), RGB),
        "L": (Image.fromarray(GREY), grey(GREY)),
        "1": (PAGE.convert("1"), grey(np.asarray(PAGE.convert("1")) * np.uint8(255))),
        "RGBA": (with_mode("RGBA"), over_white(RGB)),
        "LA": (with_mode("LA"), over_white(grey(GREY))),
        "RGBa": (with_mode("RGBA").convert("RGBa"), over_white(RGB)),
        "PA": (with_mode("RGBA").convert("PA"), over_white(np.asarray(with_mode("RGBA").convert("PA").convert("RGB")))),
        "P": (palette(), P),
        "P with a clear index": (palette(3), over_white(P, ~CLEAR)),
        "its file": (encoded(palette(3), transparency=3), over_white(P, ~CLEAR)),
        "L with a clear value": (
            encoded(Image.fromarray(GREY), transparency=int(GREY[0, 0])),
            over_white(grey(GREY), GREY != GREY[0, 0]),
        ),
        "RGB with a clear colour": (
            encoded(PAGE, transparency=tuple(map(int, RGB[0, 0]))),
            over_white(RGB, (RGB != RGB[0, 0]).any(-1)),
        ),
        "I;16": (Image.fromarray(DEEP), grey(GREY)),
        "I;16 file": (encoded(Image.fromarray(DEEP)), grey(GREY)),
        "I;16B": (Image.frombytes("I;16B", (48, 64), DEEP.astype(">u2").tobytes()), grey(GREY)),
        "I;16 with a clear value": (
            encoded(Image.fromarray(DEEP), transparency=int(DEEP[0, 0])),
            over_white(grey(GREY), GREY != GREY[0, 0]),
        ),
        "16-bit pgm": (b"P5 48 64 65535 " + DEEP.astype(">u2").tobytes(), grey(GREY)),
        "I": (Image.fromarray(GREY.astype(np.int32)), grey(GREY)),
        "F of 255": (Image.fromarray(GREY.astype(np.float32)), grey(GREY)),
        "F of 1": (Image.fromarray(GREY.astype(np.float32) / 255), grey(GREY)),
        "gif": (FRAMES["gif"], P),
        "pages of a tiff": (FRAMES["tiff"], P),
        "a frame that was sought": (sought(1), P[::-1, ::-1]),
        "HWC": (RGB, RGB),
        "CHW": (RGB.transpose(2, 0, 1), RGB),
        "HW": (GREY, grey(GREY)),
        "1HW": (GREY[None], grey(GREY)),
        "HWC with alpha": (np.dstack([RGB, ALPHA]), over_white(RGB)),
        "4HW floats": (np.dstack([RGB, ALPHA]).transpose(2, 0, 1) / 255, over_white(RGB)),
        "HW2": (np.dstack([GREY, ALPHA]), over_white(grey(GREY))),
        "floats of 1": (RGB / 255, RGB),
        "floats of 255": (RGB.astype(np.float32), RGB),
        "bfloat16": (torch.from_numpy(RGB).bfloat16(), RGB),
        "rounding": (np.clip(RGB / 255 + 1e-6, None, 1 + 1e-6), RGB),
        "uint16": ((RGB.astype(np.uint16) * 257), RGB),
        "bool": (GREY > 99, grey((GREY > 99) * np.uint8(255))),
        "tensor": (torch.from_numpy(RGB).permute(2, 0, 1) / 255, RGB),
        "tensor with gradient": ((torch.from_numpy(RGB) / 255).requires_grad_(), RGB),
    }
    | {f"orientation {i}": (photograph(i), RGB) for i in range(1, 9)}
    | {f"orientation 6 {kind}": (photograph(6, kind), RGB) for kind in ("webp", "tiff")}
    | {
        "opened with orientation": (Image.open(io.BytesIO(photograph(6))), RGB),
        "EXIF that can't be read": (encoded(PAGE, exif=b"Exif\0\0garbage!"), RGB),
        "and converted": (Image.open(io.BytesIO(photograph(8))).convert("RGBA"), RGB),
    }
)


@pytest.mark.parametrize("given, expected", SEEN.values(), ids=SEEN)
def test_an_image_is_seen_as_a_viewer_shows_it(given, expected):
    seen = viewed(given)
    assert seen.mode == "RGB" and np.array_equal(np.asarray(seen), expected)
    assert np.array_equal(np.asarray(viewed(seen)), expected)  # once more changes nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_the_model_goes_by_what_is_seen(family, tmp_path):
    processor, see = tiny.processor(family), tiny.TINY[family].see
    file = tmp_path / "a page.png"
    file.write_bytes(photograph(6))

    def asked(key, image):
        chat = [dict(role="user", content=[{"type": "image", key: image}, dict(type="text", text="total?")])]
        batch = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        return batch["pixel_values"]

    right = processor(text=[see], images=[PAGE], return_tensors="pt")["pixel_values"]
    for key, image in (
        ("image", file),
        ("image", str(file)),
        ("path", str(file)),
        ("url", file.as_uri()),
        ("image", Image.open(file)),
        ("image", photograph(3)),
        ("image", dict(bytes=None, path=str(file))),
        ("base64", base64.b64encode(photograph(5)).decode()),
        ("image", RGB),
        ("image", torch.from_numpy(RGB)),
    ):
        assert torch.equal(asked(key, image), right), (key, type(image))
    for images in ([[PAGE], [file]], [(PAGE, [file])], np.stack([RGB, RGB]), [torch.from_numpy(np.stack([RGB, RGB]))]):
        both = processor(text=[see, see], images=images, return_tensors="pt")["pixel_values"]
        assert torch.equal(both, torch.cat([right, right]))
    batch = collate([Sample("a", [str(file)], [("total?", "42")])], processor)
    assert torch.equal(batch["pixel_values"], right)
    with pytest.raises(ValueError, match="do_rescale"):
        processor(text=[see], images=[RGB / 255], do_rescale=False)


@pytest.mark.parametrize(
    "name, given",
    {
        "https URLs are not fetched": "https://example.org/page.png",
        "page.png: there is no such file": "page.png",
        "nowhere/page.png: .*No such file": Path("nowhere/page.png"),
        "no such file": "cGFnZQ==",
        "its format is not known": b"not a picture",
        "it is a folder": "/tmp",
        "neither `bytes` nor a `path`": {},
        "NoneType is no image": None,
        "image 0: .*truncated": encoded(PAGE)[:3000],
        "it has no pixels, 0x9": Image.new("RGB", (0, 9)),
        "0x9x3 has no pixels": np.zeros((0, 9, 3)),
        "first or last": np.zeros((3, 8, 3)),
        "8x8x8 is no image": np.zeros((8, 8, 8)),
        "from -1 to 1, pixels of float64 from 0 to 1 or 0 to 255": np.linspace(-1, 1, 64).reshape(8, 8),
        "to nan": np.full((8, 8), np.nan),
        "from 0 to 4095, pixels of int32": np.linspace(0, 4095, 64).reshape(8, 8).astype(np.int32),
        "array of complex128 has no pixels": np.zeros((8, 8), complex),
        "to 4e.04, pixels": Image.new("I", (8, 8), 40000),
    }.items(),
)
def test_what_is_no_image_is_named_in_one_line(name, given, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval sets it
    with pytest.raises(ValueError, match=name) as caught:
        viewed_images([given])
    said = str(caught.value)
    assert said.startswith("can't decode ") and "\n" not in said and len(said) < 300


THIN = [(1, 1), (1, 64), (64, 1), (15, 16), (7, 90), (3, 600), (33, 1)]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_thinner_than_a_merge_block_is_scaled_up(family):
    processor, teacher, kind = tiny.processor(family), tiny.teacher(family), family_of(tiny.config(family))
    tiles = dict(crop_to_patches=True) if family == "internvl" else {}
    for image in (tiny.page(*size) for size in THIN):
        if max(image.size) > processor.aspect_limit * min(image.size):
            continue
        batch = collate([Sample("thin", [image], [("total?", "42")])], processor)
        stock = processor.image_processor(images=[image], return_tensors="pt", **tiles)
        assert torch.equal(batch["pixel_values"], stock["pixel_values"])
        assert kind.density(kind.language_inputs(teacher, batch.model_inputs)).isfinite().all()


PARTS = "{% for c in m.content %}{{ 'SEE' if c.type == 'image' else c.text }}{% endfor %}"
EITHER = "{% if m.content is string %}{{ m.content }}{% else %}" + PARTS + "{% endif %}"
STRING = "{{ m.content if m.content is string else m.content | map(attribute='text') | join }}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\nSAY<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


SYSTEM = "<|system|>\n{{ m.content if m.content is string else m.content[0].text }}"


def roles(assistant, user=EITHER, asked="<|user|>\n", said="<|assistant|>\n"):
    return (
        f"{{% for m in messages %}}{{% if m.role == 'system' %}}{SYSTEM}{{% elif m.role == 'user' %}}{asked}{user}"
        f"{{% else %}}{said}{assistant}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{said}{{% endif %}}"
    )


THINKING = """{% set text = STRING %}{% set thought = '' %}{% if '</think>' in text %}
{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip() %}
{%- set text = text.split('</think>')[-1] %}{% endif %}
{%- if loop.last and thought %}{{ '<think>' + thought + '</think>\n' }}{% else %}{{ '<think></think>\n' }}{% endif %}
{{- text.strip() }}""".replace("STRING", STRING.strip("{} "))
PLAIN, USER = ["42", "7"], "<|user|>"
IM_END = "<|im_end|>"
TEMPLATES = {  # the template, the answers, and what is learned of them
    "chatml of entries": (CHATML.replace("SAY", PARTS), PLAIN, ["42" + IM_END, "7" + IM_END]),
    "chatml of either": (CHATML.replace("SAY", EITHER), [" 42 ", "7\n"], [" 42 " + IM_END, "7\n" + IM_END]),
    "empty thoughts": (roles("<think>\n\n</think>\n\n" + STRING + IM_END), PLAIN, ["42" + IM_END, "7" + IM_END]),
    "thoughts": (roles(THINKING), ["<think>so</think>42", "<think>or</think>7"], ["42" + USER, "or</think>\n7" + USER]),
    "no thoughts": (roles(THINKING), [" 42", "7 "], ["42" + USER, "7" + USER]),
    "the next role, entries": (roles("{{ m.content[0].text }}", PARTS), PLAIN, ["42" + USER, "7" + USER]),
    "the next role, strings": (roles("{{ m.content }}"), PLAIN, ["42" + USER, "7" + USER]),
    "trims": (roles("{{ m.content | trim }}"), ["\n42 ", " é1"], ["42" + USER, "é1" + USER]),
    "a newline before the next role": (roles(STRING + "\n"), PLAIN, ["42\n" + USER, "7\n" + USER]),
    "another token": (roles(STRING + "<|observation|>\n"), PLAIN, ["42<|observation|>", "7<|observation|>"]),
    "several tokens": (
        roles(STRING + "<|observation|><|im_end|>\n"),
        PLAIN,
        [f"{answer}<|observation|><|im_end|>" for answer in PLAIN],
    ),
    "a blank and the end": (roles(" " + STRING + " <|im_end|>"), PLAIN, ["42 " + IM_END, "7 " + IM_END]),
    "text": (roles(STRING + "</turn>\n", asked="user: ", said="assistant: "), PLAIN, ["42</turn>", "7</turn>"]),
    "nothing": (roles(STRING + "\n", asked="user: ", said="assistant: "), PLAIN, ["42", "7" + IM_END]),
    "the end of all": (roles(STRING + "{{ eos_token if loop.last else '' }}"), PLAIN, ["42" + USER, "7" + IM_END]),
}


def talking(family, template):
    "A processor with this template."
    processor = tiny.processor(family)
    roles = ["<|im_start|>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    processor.tokenizer.add_special_tokens({"additional_special_tokens": roles})
    processor.chat_template = template.replace("SEE", tiny.TINY[family].see)
    return processor


def learned(batch, processor):
    "The runs of labels of each sample, as text."
    out = []
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        runs, inside = [], False
        for token, label in zip(ids.tolist(), labels.tolist()):
            if label >= 0:
                assert token == label
                runs = runs if inside else [*runs, []]
                runs[-1].append(token)
            inside = label >= 0
        out.append([processor.tokenizer.decode(run) for run in runs])
    return out


@pytest.mark.parametrize(
    "family, name",
    [*(("qwen3_vl", name) for name in TEMPLATES), *((family, "chatml of entries") for family in FAMILIES[1:])],
)
def test_labels_are_the_answers_and_the_ends_of_their_turns(family, name):
    template, answers, expected = TEMPLATES[name]
    processor = talking(family, template)
    turns = list(zip(["42? total", "and 7?"], answers))
    system = [dict(role="system", content=[dict(type="text", text="42 it is")])] if "system" in template else []
    samples = [
        Sample("two", [tiny.page(48, 64), tiny.page(96, 32)], turns),
        Sample("none", [], turns),
        Sample("told", [tiny.page(48, 64)], chat=[*system, *Sample("", [0], turns).messages()]),
    ]
    assert learned(collate(samples, processor), processor) == [expected] * 3
    if "thought" not in name:  # what is trained on is what the template prints
        text = processor.tokenizer.decode(collate(samples[1:2], processor)["input_ids"][0])
        content = (lambda m: m["content"]) if name.endswith("entries") else lambda m: m["content"][0]["text"]
        said = [dict(role=m["role"], content=content(m)) for m in samples[1].messages()]
        assert text.startswith(processor.apply_chat_template(said, tokenize=False).rstrip())


def test_a_token_that_reaches_into_an_answer_is_a_label():
    'As in "assistant: 42" with a vocabulary that holds " 42".'
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    processor = tiny.processor("qwen3_vl")
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "42", "Ġ42"]
    words = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("4", "2"), ("Ġ", "42")]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.add_special_tokens(["<|im_end|>"])
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    processor.chat_template = roles(STRING + "<|im_end|>", asked="user: ", said="assistant: ")
    assert learned(collate([Sample("a", [], [("total?", "42 é")])], processor), processor) == [[" 42 é<|im_end|>"]]


PAGE_ASKED = [dict(role="user", content="total?"), dict(role="assistant", content="42")]


@pytest.mark.parametrize(
    "reason, bad",
    {
        "it has no text": dict(key="bad", messages=[]),
        "has no text": Sample("bad", []),
        "holds the image token": Sample("bad", [PAGE], [("what is SEE?", "42")]),
        "image token '": Sample("bad", [], [("what?", "a SEE")]),
        "page.png: there is no such file": Sample("bad", ["page.png"], [("total?", "42")]),
        "times the other": Sample("bad", [tiny.page(5000, 1)], [("total?", "42")]),
        "of another form|not iterable|unpack": Sample("bad", [PAGE], ["total?"]),
        "not iterable": Sample("bad", PAGE, [("total?", "42")]),
        "is a int, not a string": Sample("bad", [PAGE], [("total?", 42)]),
        "its messages have places for 2 images, it has 1": dict(
            id="bad",
            images=[PAGE],
            messages=[
                dict(role="user", content=[dict(type="image"), dict(type="image"), dict(type="text", text="total?")]),
                PAGE_ASKED[1],
            ],
        ),
        "some of its images": dict(
            id="bad",
            images=[PAGE],
            messages=[dict(role="user", content=[dict(type="image", image=PAGE)]), PAGE_ASKED[1]],
        ),
        "neither text nor image": dict(
            id="bad", messages=[dict(role="user", content=[dict(type="video", video="a.mp4")]), PAGE_ASKED[1]]
        ),
        "needs a role": dict(id="bad", messages=[{"from": "human", "value": "total?"}]),
        "message is 'total\\?'": dict(id="bad", messages=["total?"]),
        "assistant holds an image": dict(
            id="bad", messages=[PAGE_ASKED[0], dict(role="assistant", content=[dict(type="image", image=PAGE)])]
        ),
        "holds tool_calls": dict(
            id="bad", messages=[PAGE_ASKED[0], dict(role="assistant", content="42", tool_calls=[{}])]
        ),
        "its prompt holds an answer": dict(id="bad", prompt=PAGE_ASKED, completion="42"),
    }.items(),
)
def test_a_sample_that_cannot_be_used_is_named_whichever_of_the_batch_it_is(reason, bad):
    for family in ("qwen3_vl", "internvl", "minicpmv"):
        processor, good = tiny.processor(family), Sample("good", [PAGE], [("total?", "42")])
        given = bad
        if isinstance(bad, Sample) and "SEE" in str(bad.turns):
            see = lambda text: text.replace("SEE", processor.image_token)
            given = replace(bad, turns=[tuple(map(see, bad.turns[0]))])
        if "times the other" in reason and family == "internvl":
            continue  # whose tiles take any
        for samples in ([given], [good, given, good]):
            with pytest.raises(BadSample, match=reason) as caught:
                collate(samples, processor)
            error = pickle.loads(pickle.dumps(caught.value))
            assert error.key == "bad" and str(error) == f"sample 'bad': {error.reason}" and "\n" not in str(error)


@pytest.mark.parametrize(
    "reason, given",
    {
        "answer 0 is empty": Sample("bad", [PAGE], [("total?", "")]),
        "answer 1 is empty": Sample("bad", [PAGE], [("total?", "42"), ("and?", " \n")]),
        "it has no answer": dict(key="bad", messages=PAGE_ASKED[:1]),
        "answer 0 is empty, so": dict(key="bad", messages=[PAGE_ASKED[0], dict(role="assistant", content=None)]),
        "max_length is 90": Sample("bad", [PAGE], [("total?", "forty-two " * 9)]),
        "has .* tokens": Sample("bad", [PAGE] * 4, [("long " * 99, "42")]),
    }.items(),
)
def test_a_sample_without_a_label_is_named_and_refused_or_skipped_by_distill(reason, given, tmp_path):
    good = Sample("good", [PAGE], [("total?", "42")])
    for family in FAMILIES:
        processor = tiny.processor(family)
        with pytest.warns(UserWarning, match=f"^sample 'bad': .*{reason}"):
            batch = collate([good, given, good], processor, max_length=90)
        assert list(batch.unlabelled) == [1] and learned(batch, processor) == [["42<|im_end|>"], [], ["42<|im_end|>"]]
    teacher, settings = tiny.teacher("minicpmv"), TrainSettings(token_budget=100, batch_size=2)
    capped = partial(collate, processor=processor, max_length=90)
    begin = partial(distill, to_hybrid(teacher), teacher, collate=capped, condition=CONDITIONS["C1"], progress=False)
    with pytest.warns(UserWarning):
        with pytest.raises(ValueError, match=rf"^sample 'bad': .*{reason}.* at step 1 \(stage 3\); no checkpoint"):
            begin(dataset=[given], settings=settings, out=tmp_path / "a")
        data = [given, *[good] * 9]
        run = begin(dataset=data, settings=replace(settings, token_budget=300, skip_bad=0.9), out=tmp_path / "b")
    assert len(run["skipped"]) == 1 and min(run["skipped"].values()) >= 1 and re.search(reason, *run["skipped"])


def test_a_batch_that_fails_in_the_processor_names_its_sample(monkeypatch):
    processor = tiny.processor("glm4v")
    preprocess = processor.image_processor.preprocess

    def refuse(images, **kwargs):
        if any(image.size == (3, 90) for image in images):
            raise ValueError("too\nlong")
        return preprocess(images, **kwargs)

    monkeypatch.setattr(processor.image_processor, "preprocess", refuse)
    samples = [Sample(str(i), [image], [("total?", "42")]) for i, image in enumerate([PAGE, tiny.page(3, 90), PAGE])]
    with pytest.raises(BadSample, match="sample '1': too long"):
        collate(samples, processor)


class Broken:
    "Rows of which some can't be read."

    def __init__(self, bad, error=ZeroDivisionError):
        self.bad, self.error = bad, error

    def __len__(self):
        return 20

    def __getitem__(self, i):
        if i in self.bad:
            raise self.error("no\npages")
        return dict(messages=PAGE_ASKED, image=PAGE)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(ROWS)


class ByIndex:
    "Rows without an end."

    def __getitem__(self, i):
        return dict(messages=PAGE_ASKED, image=PAGE)


def asked(*content, answer="42", **row):
    "A row whose user says these entries."
    return dict(messages=[dict(role="user", content=list(content)), dict(role="assistant", content=answer)], **row)


OF, PLACE = dict(type="text", text="of"), dict(type="image", text=None)
URL = dict(url="data:image/png;base64," + base64.b64encode(encoded(PAGE)).decode())
ROWS = {  # a row, and the user's first entries
    "strings": (dict(messages=PAGE_ASKED, images=[PAGE, PAGE]), ["image", "image", "total?"]),
    "one image": (dict(messages=PAGE_ASKED, image=PAGE), ["image", "total?"]),
    "places": (asked(OF, PLACE, OF, PLACE, images=[PAGE, PAGE]), ["of", "image", "of", "image"]),
    "no places": (asked(OF, images=[PAGE]), ["image", "of"]),
    "held": (asked(dict(type="image", image=PAGE), OF), ["image", "of"]),
    "image_url": (asked(dict(type="image_url", image_url=URL)), ["image"]),
    "system": (dict(messages=[dict(role="system", content="Read."), *PAGE_ASKED], images=[PAGE]), ["image", "total?"]),
    "text": (dict(messages=PAGE_ASKED, images=None), ["total?"]),
    "prompt": (dict(prompt="total?", completion="42", images=[PAGE]), ["image", "total?"]),
    "prompt of messages": (dict(prompt=PAGE_ASKED[:1], completion=PAGE_ASKED[1:]), ["total?"]),
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_read_as_they_are(kind):
    row, expected = ROWS[kind]
    sample = samples_of([row])[0]
    asked = next(message for message in sample.messages() if message["role"] == "user")
    assert sample.key == "0" and [entry.get("text", "image") for entry in asked["content"]] == expected
    assert as_sample(row | dict(id=7), 0).key == "7" and as_sample(row | dict(id=7, key="a"), 0).key == "a"
    for family in FAMILIES:
        processor = tiny.processor(family)
        batch = collate([row, Sample("good", [PAGE], [("total?", "42")])], processor)
        assert learned(batch, processor)[0] == ["42<|im_end|>"] and batch.keys == ["0", "good"]
        page = processor.decode(collate([Sample("", [PAGE], [("", "42")])], processor)["input_ids"][0]).split(":")[0]
        if family != "minicpmv":
            shown = "".join(page if part == "image" else part for part in expected)
            assert shown in processor.decode(batch["input_ids"][0])


def test_rows_of_datasets_are_read_as_they_are(tmp_path):
    PAGE.save(tmp_path / "page.png")
    row = lambda image: asked(OF, PLACE, answer=[OF], images=[image])
    table = Dataset.from_list([row(str(tmp_path / "page.png"))] * 2)
    expected = samples_of([row(PAGE)])[0].messages()
    for table in (table, *(table.cast_column("images", List(ImageFeature(decode=decode))) for decode in (True, False))):
        read = samples_of(table)
        assert len(read) == 2 and read[1].key == "1" and read[1].messages() == expected
        assert np.array_equal(np.asarray(viewed(read[1].images[0])), RGB)


def test_what_is_read_by_index_is_a_data_set():
    row = ROWS["strings"][0]
    assert [samples_of(given)[0].key for given in ([row], (row,), ByIndex())] == ["0"] * 3
    for given in ([Sample("a", [], [("a", "b")])], [dict(ids=torch.zeros(3))], [object()]):  # for one's own collate
        assert samples_of(given) is given
    for error in (OSError, KeyError, TypeError):
        read = samples_of(Broken([0, 1], error))
        assert read[2].key == "2"
        with pytest.raises(error):
            read[0]
    assert not hasattr(samples_of(ByIndex()), "__len__")


NO_DATA_SETS = [[], {}, dict(train=[1]), iter([1]), {1}, None, 7, "rows.json", ["total?"], [("total?", "42")], [PAGE]]
NO_DATA_SETS += [[dict(image=PAGE, question="total?", answer="42")], [{}], [dict(messages=None)], np.zeros((2, 3))]
NO_DATA_SETS += [torch.zeros(2, 3), pd.DataFrame(dict(messages=[PAGE_ASKED])), Stream()]
NO_DATA_SETS += [Broken(range(99)), Dataset.from_list([dict(messages=PAGE_ASKED)]).to_iterable_dataset()]


@pytest.mark.parametrize("given", NO_DATA_SETS, ids=lambda given: type(given).__name__)
def test_what_is_no_data_set_is_told_what_one_is(given):
    with pytest.raises(
        ValueError, match="a data set is a list, a `datasets.Dataset` or another object read by index"
    ) as caught:
        samples_of(given)
    assert "\n" not in str(caught.value)


def test_distill_reads_rows_and_refuses_what_is_no_data_set_before_it_begins(tmp_path):
    teacher, rows = tiny.teacher("qwen3_vl"), [dict(messages=PAGE_ASKED, images=[photograph(6)])] * 2
    begin = partial(
        distill,
        to_hybrid(teacher),
        teacher,
        condition=CONDITIONS["C1"],
        settings=TrainSettings(token_budget=100, batch_size=2),
        out=tmp_path / "run",
        collate=partial(collate, processor=tiny.processor("qwen3_vl")),
        progress=False,
    )
    with pytest.raises(ValueError, match="the data set is empty"):
        begin(dataset=[])
    assert not (tmp_path / "run").exists()
    assert begin(dataset=rows)["steps"] >= 1


def test_a_cache_knows_an_image_by_what_is_seen():
    assert sample_key([photograph(6)]) == sample_key([PAGE]) != sample_key([PAGE.convert("L")])
