"A teacher of each family through its interface against the whole model, and every fault of its files and images."

import copy
import json
import shutil
import subprocess
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

import tiny
from heed_nb.files import check_sums, save_parts
from heed_nb.teachers import check_checkpoint, end_tokens, family_class, family_of, load_teacher, turn_end
from tiny import batch_of, fails, page

PROCESSORS = {name: tiny.processor(name) for name in tiny.TINY}
BLOCK_TOWERS = ["qwen3_vl", "glm4v"]
IN_BLOCKS = [*BLOCK_TOWERS, "internvl"]  # whose tokens are blocks of patches; for MiniCPM's see test_minicpm


@pytest.fixture(scope="module", params=list(tiny.TINY))
def name(request):
    return request.param


@pytest.fixture
def see(name):
    return tiny.TINY[name].see


@pytest.fixture
def processor(name):
    return PROCESSORS[name]


teacher_of = cache(tiny.teacher)


@pytest.fixture
def teacher(name):
    return teacher_of(name)


@pytest.fixture
def samples(name):
    return tiny.samples(name)


def logits_of(family, model, batch):
    return family.lm_head(model)(family.decoder(model)(**family.language_inputs(model, batch).kwargs).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_decoder_and_head_are_the_model(teacher, processor, samples, side, dtype):
    model, batch = copy.deepcopy(teacher).to(dtype), batch_of(samples, processor, side)
    family = family_of(model)
    assert torch.equal(logits_of(family, model, batch), model(**batch).logits)
    assert len(family.layers(model)) == 4 and all(layer.self_attn for layer in family.layers(model))


@torch.no_grad()
def test_text_alone_is_not_touched_by_the_pages_before_it(teacher, processor, samples):
    family, text = family_of(teacher), batch_of(samples[:1], processor)
    alone = teacher(**text).logits
    teacher.generate(**batch_of(samples[1:2], processor), max_new_tokens=2)
    assert torch.equal(logits_of(family, teacher, text), alone)
    inputs = family.language_inputs(teacher, text)
    assert inputs.patch_features == [] and not family.density(inputs).any()


def test_tower_has_no_gradient_and_embeddings_have_the_models(teacher, processor, samples):
    model, batch = copy.deepcopy(teacher), batch_of(samples, processor)
    embeddings = model.get_input_embeddings().weight
    (expected,) = torch.autograd.grad(model(**batch).logits.square().mean(), embeddings)
    logits_of(family_of(model), model, batch).square().mean().backward()
    assert_close(embeddings.grad, expected, rtol=1e-4, atol=1e-6)
    decoder = {
        id(p)
        for module in (family_of(model).decoder(model), family_of(model).lm_head(model))
        for p in module.parameters()
    }
    assert all((p.grad is not None) == (id(p) in decoder) for p in model.parameters())


def eq_2(features):
    "Eq. 2 with numpy's mirrored border, [h, w, D] -> [h, w]."
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    border, (h, w, _) = np.pad(unit, ((1, 1), (1, 1), (0, 0)), mode="reflect"), unit.shape
    return 1 - sum((unit * border[y : y + h, x : x + w]).sum(-1) for y in range(3) for x in range(3)) / 9


def density_of_tokens(features, attention, reduce):
    "The density of one image's or tile's tokens, in order."
    if attention is not None:  # a resampler's tokens have no grid
        return attention.numpy() @ eq_2(features.numpy()).ravel()
    h, w, _ = features.shape
    blocks = [(slice(y, y + 2), slice(x, x + 2)) for y in range(0, h, 2) for x in range(0, w, 2)]
    if reduce == "features":
        return eq_2(np.stack([features[block].numpy().mean((0, 1)) for block in blocks]).reshape(h // 2, w // 2, -1))
    rho = eq_2(features.numpy())
    return np.array([getattr(rho[block], reduce)() for block in blocks])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reduce", ["features", "mean", "max"])
def test_density_of_a_batch_is_that_of_its_pages(name, teacher, processor, samples, see, side, reduce):
    samples = [*samples, (see + "thin", [page(96, 16, 4)])]
    family, batch = family_of(teacher), batch_of(samples, processor, side)
    inputs = family.language_inputs(teacher, batch)
    if name == "minicpmv" and reduce == "max":
        fails("reduce must be 'features' or 'mean' with a resampler, got 'max'", family.density, inputs, reduce=reduce)
        return
    density = family.density(inputs, reduce=reduce)
    assert reduce != "features" or torch.equal(density, family.density(inputs))
    for row, ids, (_, images) in zip(density, batch["input_ids"], samples):
        visual = ids == processor.image_token_id
        assert not row[~visual].any()
        expected = [np.zeros(0)]
        for image in images:
            alone = family.language_inputs(teacher, batch_of([(see, [image])], processor))
            attentions = alone.patch_weights or [None] * len(alone.patch_features)  # a page's, or its tiles'
            expected += [density_of_tokens(f, a, reduce).ravel() for f, a in zip(alone.patch_features, attentions)]
        assert_close(row[visual].numpy(), np.concatenate(expected), rtol=1e-4, atol=1e-5, check_dtype=False)


@torch.no_grad()
@pytest.mark.parametrize("name", BLOCK_TOWERS, scope="module")
def test_a_grid_of_tokens_too_small_for_the_neighbourhood_is_named(teacher, processor, see):
    family = family_of(teacher)
    inputs = family.language_inputs(teacher, batch_of([(see, [page(48, 64)])], processor))
    fails(
        "a grid of 4x3 features is too small for radius 3; each side must be 4 or more",
        family.density,
        inputs,
        radius=3,
    )
    assert family.density(inputs, reduce="mean", radius=3)[inputs.visual_mask].all()  # 8x6 patches


@torch.no_grad()
@pytest.mark.parametrize("name", IN_BLOCKS, scope="module")
@pytest.mark.parametrize("corner", [(0, 3), (2, 0), (1, 2)])
def test_density_peaks_where_the_mark_is(name, teacher, processor, see, corner):
    "A mark in one token's cell of a 4 x 4 page, found at that token's position; in tiles, at its tile's."
    row, column = corner
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).rectangle(
        (16 * column + 3, 16 * row + 2, 16 * column + 11, 16 * row + 13), fill="black", outline="red", width=2
    )
    model = copy.deepcopy(teacher)
    for key, p in model.named_parameters():
        if "pos_embed" in key or "position_embed" in key:
            p.zero_()  # a blank page is the same everywhere
    family = family_of(model)
    inputs = family.language_inputs(model, batch_of([(see + "where?", [image])], processor))
    density = family.density(inputs)[inputs.visual_mask]
    if name == "internvl":  # 2 x 2 tiles of 2 x 2 tokens, then the thumbnail
        assert len(density) == 20
        density = density[:16].view(2, 2, 2, 2).transpose(1, 2)
    assert divmod(density.flatten().argmax().item(), 4) == corner


# Faults. One line each, before anything is computed.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    @cache
    def folder_of(name):
        path = tmp_path_factory.mktemp(name)
        teacher_of(name).save_pretrained(path)
        PROCESSORS[name].save_pretrained(path)
        return path

    return folder_of


@pytest.fixture
def folder(name, saved, tmp_path):
    return shutil.copytree(saved(name), tmp_path / "teacher")


def test_load_teacher_gives_back_what_was_saved(folder, name, teacher, processor, samples):
    model, loaded = load_teacher(folder)
    assert not model.training and type(model) is type(teacher) and type(loaded) is family_class(name).processor_class
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in teacher.state_dict().items())
    again = batch_of(samples, loaded)
    assert all(torch.equal(value, again[key]) for key, value in batch_of(samples, processor).items())
    assert load_teacher(str(folder), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", IN_BLOCKS, scope="module")
def test_reads_the_files_of_a_stock_processor(folder, processor, samples):
    "As one that was saved where torchvision is: other class names, and a video processor beside."
    images = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    stock = images["image_processor_type"].removesuffix("Pil")
    put(
        folder,
        "processor_config.json",
        processor_class=type(processor).__bases__[1].__name__,
        image_processor=images | dict(image_processor_type=stock),
        video_processor=dict(video_processor_type=stock.replace("Image", "Video")),
    )
    loaded = load_teacher(folder)[1]
    again = batch_of(samples, loaded)
    assert type(loaded) is type(processor) and all(
        torch.equal(value, again[key]) for key, value in batch_of(samples, processor).items()
    )


def test_missing_and_surplus_tensors_are_named_before_a_weight_is_read(folder, monkeypatch):
    devices, load = [], AutoModelForImageTextToText.from_pretrained

    def watched(*args, **kwargs):
        model, report = load(*args, **kwargs)
        devices.extend({p.device.type for p in model.parameters()})
        return model, report

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", watched)
    weights, last = load_file(folder / "model.safetensors"), "layers.3.self_attn.q_proj.weight"
    key = next(key for key in weights if key.endswith(last))
    save = lambda weights: save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save({k: v for k, v in weights.items() if k != key})
    fails(f"1 tensors are missing or of another shape, first model.language_model.{last}", load_teacher, folder)
    save(weights | {key.replace("layers.3", "layers.4"): weights[key].clone()})
    surplus = "hold 1 tensors that its config.json has no place for, first .*layers.4.self_attn.q_proj.weight"
    fails(surplus, load_teacher, folder)
    assert devices == ["meta", "meta"]


def without_image_token(folder, name):
    for path in folder.glob("tokenizer*"):
        path.write_text(path.read_text().replace(tiny.TINY[name].special[0], "<|picture|>"))


FAULTS = {  # the message, and what is done to the folder
    "has no config.json": lambda folder, _: (folder / "config.json").unlink(),
    "unsupported model type 'llama'; one of qwen3_vl": lambda folder, _: put(folder, model_type="llama"),
    "has no model.safetensors": lambda folder, _: (folder / "model.safetensors").unlink(),
    "has no model-2.safetensors": lambda folder, _: write_json(
        folder / "model.safetensors.index.json", dict(weight_map=dict(a="model.safetensors", b="model-2.safetensors"))
    ),
    r"(8|12) tensors are missing or of another shape, first .*mlp": lambda folder, _: put(
        folder, **{"text_config.intermediate_size": 100}
    ),
    "tokenizer or processor files .* can't be used": lambda folder, _: (folder / "tokenizer.json").unlink(),
    "can't be used: the tokenizer has no image token '.*'": without_image_token,
    r"has image token \d+, its model 7": lambda folder, _: put(folder, image_token_id=7),
    "can't be used: the chat template: TemplateSyntaxError": lambda folder, _: (
        folder / "chat_template.jinja"
    ).write_text("{% if %}"),
    "holds an adapter": lambda folder, _: write_json(folder / "adapter_config.json", dict(base_model_name_or_path="a")),
    r"the tokenizer has a token \d+, the model has 250": lambda folder, _: put(
        folder, **{"text_config.vocab_size": 250}
    ),
}


@pytest.mark.parametrize("name", ["qwen3_vl", "minicpmv"], scope="module")
@pytest.mark.parametrize("match", FAULTS)
def test_load_teacher_names_what_is_wrong(folder, name, match):
    FAULTS[match](folder, name)
    fails(match, load_teacher, folder)


def write_json(path, value):
    path.write_text(json.dumps(value))


def put(folder, file="config.json", **values):
    "Puts values in a JSON file, each under the names that lead to it, with dots between."
    content = json.loads((folder / file).read_text())
    for name, value in values.items():
        *inner, last = name.split(".")
        part = content
        for key in inner:
            part = part[key]
        part[last] = value
    write_json(folder / file, content)


DAMAGE = ["[]", "null", "7", "{", "", "NaN", b"\xff\xfe{}", "a folder", "a broken link"]
READ = ["generation_config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
READ += ["processor_config.json", "special_tokens_map.json", "preprocessor_config.json"]


@pytest.mark.parametrize("name", ["qwen3_vl"], scope="module")
@pytest.mark.parametrize(
    "file, fault", [*(("config.json", fault) for fault in DAMAGE), *((file, "{") for file in READ)], ids=str
)
def test_a_damaged_json_file_is_named(folder, file, fault):
    path = folder / file
    path.unlink(missing_ok=True)
    if fault == "a folder":
        path.mkdir()
    elif fault == "a broken link":
        path.symlink_to(folder / "nowhere")
    else:
        path.write_bytes(fault if isinstance(fault, bytes) else fault.encode())
    fails(f"^{file} in .* is damaged: .", load_teacher, folder)


CONFIG, PROCESSOR = "config.json in .* can't be used: ", "tokenizer or processor files in .* can't be used: "


UNFIT = {  # a field, values that don't fit, and the message
    "text_config.hidden_size": ([-1, 10**9, "wide", None, 1.5], CONFIG),
    "text_config.num_attention_heads": ([0], CONFIG),
    "text_config.num_hidden_layers": ([10**9, 10**30], CONFIG),
    "vision_config.depth": ([10**9], CONFIG),
    "num_labels": ([10**9], CONFIG),
    "vision_config.deepstack_visual_indexes": ([[0] * 10**5, [99], ["0"]], CONFIG),
    "text_config.hidden_act": (["no"], CONFIG),
    "dtype": (["no"], CONFIG),
    "vision_config": ([[]], CONFIG),
    "text_config.rope_parameters.mrope_section": ([[2, 1, 2]], CONFIG),
    "quantization_config": ([dict(quant_method="fp8")], CONFIG),
    "transformers_weights": (["../other.safetensors"], CONFIG),
    "_attn_implementation": (["a/b", {"text_config": "a/b"}], CONFIG),
    "vision_config.attn_implementation": (["kernels-community/flash"], CONFIG),
    "text_config.experts_implementation": (["a/b"], CONFIG),
    "text_config.rms_norm_eps": ([float("nan")], "config.json in .* is damaged: NaN is not a finite number"),
    "text_config.rope_parameters.rope_theta": ([0.0], "can't be loaded: its config.json makes .*inv_freq infinite"),
    "text_config.vocab_size": ([0], "the model has 0"),
    "vision_config.spatial_merge_size": ([0], "merge_size is 2 in the processor, 0 in the model"),
}
LAYERS = {  # a number of layers, and what is said of the weights of four
    0: "hold .* tensors that its config.json has no place for",
    3: "hold .* tensors that its config.json has no place for, first .*layers.3",
    5: "tensors are missing or of another shape, first .*layers.4",
}


@pytest.mark.parametrize("name", ["qwen3_vl"], scope="module")
@pytest.mark.parametrize(
    "field, value, match",
    [
        *((field, value, match) for field, (values, match) in UNFIT.items() for value in values),
        *(("text_config.num_hidden_layers", value, match) for value, match in LAYERS.items()),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_named(folder, field, value, match):
    put(folder, **{field: value})
    fails(match, load_teacher, folder)


@pytest.mark.parametrize("name", ["qwen3_vl"], scope="module")
@pytest.mark.parametrize(
    "field, value",
    [
        ("patch_size", 0),
        ("patch_size", 16),
        ("patch_size", "x"),
        ("merge_size", 4),
        ("temporal_patch_size", 2),
        ("size", []),
        ("size", dict(shortest_edge=10**12, longest_edge=10**12)),
        ("image_std", [0, 0, 0]),
        ("rescale_factor", 1e300),
        ("image_mean", ["x"]),
        ("image_processor_type", "no"),
    ],
    ids=str,
)
def test_a_processor_that_does_not_fit_is_named(folder, field, value):
    put(folder, "processor_config.json", **{f"image_processor.{field}": value})
    fails(PROCESSOR, load_teacher, folder)


@pytest.mark.parametrize("name", ["qwen3_vl"], scope="module")
@pytest.mark.parametrize(
    "fault, match",
    [
        (lambda content: content["model"]["vocab"].pop("A"), PROCESSOR + "the tokenizer has no piece for 'A'"),
        (lambda content: content["model"].update(vocab={}), PROCESSOR + "the tokenizer has no piece for 'a'"),
        (
            lambda content: content["model"]["vocab"].update(zz=10**6),
            PROCESSOR + "the tokenizer has a token 1000000, the model has 272",
        ),
        (lambda content: content["model"].update(vocab=[]), PROCESSOR),
        (lambda content: content.update(model=None), PROCESSOR),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_named(folder, fault, match):
    content = json.loads((folder / "tokenizer.json").read_text())
    fault(content)
    write_json(folder / "tokenizer.json", content)
    fails(match, load_teacher, folder)


@pytest.mark.parametrize(
    "path", [None, 7, "x" * 5000, "", "~", "a/b/c", "https://hub/a", "a\0"], ids=lambda path: repr(path)[:9]
)
def test_what_is_no_path_of_a_model_is_named(path):
    fails("^no model (at|in) ", load_teacher, path)


@pytest.mark.parametrize("name", ["qwen3_vl"], scope="module")
@pytest.mark.parametrize("ends", [-1, 10**9, "x", 1.5, True, [2, -1], [None]], ids=str)
def test_ends_outside_the_vocabulary_are_named(folder, ends):
    put(folder, "generation_config.json", eos_token_id=ends)
    fails("eos_token_id .* is none of the 272 tokens|generation_config.json in .* can't be used", load_teacher, folder)


MESSAGES = "{% for m in messages %}{% if m.role == 'user' %}USER{% else %}ANSWER{% endif %}{% endfor %}"
TEMPLATES = {
    "by the next question": ("<|endoftext|>a", "{{ m.content }}", "<|endoftext|>"),
    "by its own token": ("a", "{{ m.content[0].text | trim }}<|im_end|>", "<|im_end|>"),
    "by lines": ("a", "{{ m.content }}\n\n", None),
    "by none": ("{{ raise_exception('no') }}", "", None),
}


@pytest.mark.parametrize("user, answer, end", TEMPLATES.values(), ids=TEMPLATES)
def test_the_chat_templates_end_of_turn_ends_an_answer(name, user, answer, end):
    processor = copy.copy(PROCESSORS[name])
    processor.chat_template = MESSAGES.replace("USER", user).replace("ANSWER", answer)
    token = processor.tokenizer.convert_tokens_to_ids(end) if end else None
    assert turn_end(processor) == token
    assert end_tokens(teacher_of(name), processor) == sorted({processor.tokenizer.eos_token_id, token} - {None})


@pytest.mark.parametrize("name", ["qwen3_vl"], scope="module")
def test_one_check_finds_what_is_wrong_for_all_who_load(folder):
    from heed_nb import evaluate, lmms_model

    put(folder, **{"text_config.hidden_size": -1})
    for load in (load_teacher, check_checkpoint, lmms_model.HeedVLM, evaluate.evaluate):
        fails(CONFIG, load, str(folder))


@pytest.mark.parametrize("name", ["qwen3_vl"], scope="module")
def test_the_attention_is_the_librarys_choice(folder):
    implementations = lambda config: [
        part._attn_implementation for part in (config, config.text_config, config.vision_config)
    ]
    wanted = implementations(load_teacher(folder)[0].config)
    put(folder, **{"text_config._attn_implementation": "eager"})
    assert implementations(load_teacher(folder)[0].config) == wanted and "eager" not in wanted


@pytest.mark.parametrize("name", ["qwen3_vl"], scope="module")
def test_a_flipped_bit_of_a_saved_folder_is_named(teacher, processor, tmp_path):
    folder = save_parts(tmp_path / "saved", teacher, processor)
    load_teacher(folder)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    hashed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    unhashed = {"SHA256SUMS", "generation_config.json"}
    assert hashed == {path.name for path in folder.iterdir()} - unhashed
    for path in (folder / name for name in [*hashed, "SHA256SUMS"]):
        content = path.read_bytes()
        named = f"{path.name} is not the file that was saved, by SHA256SUMS" * (path.name in hashed) or "SHA256SUMS"
        for place, bit in ((0, 0), (len(content) // 2, 5), (len(content) - 1, 0)):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            fails(named, check_sums, folder)
        path.write_bytes(content)
    put(folder, "generation_config.json", repetition_penalty=1.1)
    load_teacher(folder)
    (folder / "model.safetensors").unlink()
    fails("model.safetensors can't be read, but SHA256SUMS names it", load_teacher, folder)


def test_what_is_no_image_is_named(tmp_path, processor, see):
    path = tmp_path / "page.png"
    page(64, 64).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for image in (Image.open(path), str(path)):
        fails("can't decode the image .*page", processor, images=[image], text=[see])
    message = [dict(role="user", content=[dict(type="image", image=Image.open(path))])]
    fails("can't decode the image .*page", processor.apply_chat_template, message, tokenize=True, return_dict=True)
    fails("only images", processor, text=["a film"], videos=[torch.zeros(2, 3, 16, 16)])


def test_images_out_of_bounds_are_named(name, processor, see):
    limit = {"internvl": None, "minicpmv": 13}.get(
        name, 200
    )  # tiles take any ratio; for 48 pixels and patches of 8: (48 / 13) ** 2
    for side in (1, 16):
        processor(text=[see], images=[page(side, side * (limit or 300))])
    if name in BLOCK_TOWERS:
        fails(
            "image 1 is 16x3201 pixels; the long side may be 200 times the short one at most",
            processor,
            text=[see + see],
            images=[page(32, 32), page(16, 3201)],
        )
    elif limit:
        processor(text=[see], images=[page(16, 3201)])  # has no density, but can be read


@pytest.mark.parametrize("size", [(16, 208), (208, 16)], ids=str)
@torch.no_grad()
def test_every_image_that_is_taken_has_a_density(teacher, processor, see, size):
    family = family_of(teacher)
    density = family.density(
        family.language_inputs(teacher, processor(text=[see], images=[page(*size)], return_tensors="pt"))
    )
    assert density.isfinite().all() and density.any()


@pytest.mark.parametrize("images", [[], [[], []]], ids=str)
def test_no_images_are_none(teacher, processor, images):
    batch = processor(text=["what", "total?"], images=images, return_tensors="pt", padding=True)
    expected = processor(text=["what", "total?"], return_tensors="pt", padding=True)
    assert batch.keys() == expected.keys() and all(torch.equal(batch[key], expected[key]) for key in batch)
