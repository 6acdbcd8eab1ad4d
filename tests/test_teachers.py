"A teacher of each family through its interface against the whole model, and every fault of its files and images."
import copy
import json
from functools import cache
import shutil

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

import tiny
from heed_nb.density import patch_density
from heed_nb.teachers import family_class, family_of, load_teacher
from tiny import batch_of, page

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
    expected, = torch.autograd.grad(model(**batch).logits.square().mean(), embeddings)
    logits_of(family_of(model), model, batch).square().mean().backward()
    assert_close(embeddings.grad, expected, rtol=1e-4, atol=1e-6)
    decoder = {id(p) for module in (family_of(model).decoder(model), family_of(model).lm_head(model)) for p in module.parameters()}
    assert all((p.grad is not None) == (id(p) in decoder) for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", IN_BLOCKS, scope="module")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_density_of_a_batch_is_that_of_its_pages(teacher, processor, samples, see, side, reduce):
    family = family_of(teacher)
    batch = batch_of(samples, processor, side)
    density = family.density(family.language_inputs(teacher, batch), reduce=reduce)
    for row, ids, (_, images) in zip(density, batch["input_ids"], samples):
        visual = ids == processor.image_token_id
        assert not row[~visual].any()
        expected = []
        for image in images:
            for features in family.language_inputs(teacher, batch_of([(see, [image])], processor)).patch_features:  # a page, or its tiles
                blocks = patch_density(features).unfold(0, 2, 2).unfold(1, 2, 2).flatten(2)  # [h / 2, w / 2, 4]
                expected += [blocks.mean(-1).flatten() if reduce == "mean" else blocks.amax(-1).flatten()]
        assert_close(row[visual], torch.cat(expected) if expected else row[visual], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", IN_BLOCKS, scope="module")
@pytest.mark.parametrize("corner", [(0, 0), (2, 0), (0, 3), (3, 3), (1, 2)])
def test_density_peaks_where_the_mark_is(name, teacher, processor, see, corner):
    "A mark in one token's cell of a 4 x 4 page, found at that token's position in the sequence; in tiles, at its tile's."
    row, column = corner
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).rectangle((16 * column + 3, 16 * row + 2, 16 * column + 11, 16 * row + 13), fill="black", outline="red", width=2)
    model = copy.deepcopy(teacher)
    for key, p in model.named_parameters():
        if "pos_embed" in key or "position_embed" in key: p.zero_()  # a blank page is the same everywhere
    family = family_of(model)
    inputs = family.language_inputs(model, batch_of([(see + "where?", [image])], processor))
    density = family.density(inputs)[inputs.visual_mask]
    if name == "internvl":  # 2 x 2 tiles of 2 x 2 tokens, then the thumbnail
        assert len(density) == 20
        density = density[:16].view(2, 2, 2, 2).transpose(1, 2)
    assert divmod(density.flatten().argmax().item(), 4) == corner


# Faults. One line each, before anything is computed.

def fails(match, call, *args, **kwargs):
    with pytest.raises(ValueError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BLOCK_TOWERS, scope="module")
def test_tokens_pixels_and_grids_must_match(teacher, processor, samples):
    batch, family = batch_of(samples, processor), family_of(teacher)
    grids = batch["image_grid_thw"]  # 8x6, 4x12, 8x6, 8x8
    def broken(match, **changes): fails(match, family.language_inputs, teacher, batch | changes)
    broken("image 2 has 12 tokens in the text, but its grid of 8x8 patches makes 16", image_grid_thw=grids[[0, 1, 3, 2]])
    broken("7x6 patches does not divide into 2x2", image_grid_thw=torch.tensor([[1, 7, 6], *grids[1:].tolist()]))
    broken("image 0 has 2 frames", image_grid_thw=grids * torch.tensor([2, 1, 1]))
    broken("tokens for 4 images, but there are pixels for 5", image_grid_thw=grids[[0, 1, 2, 3, 3]])
    broken("pixel_values holds 207 patches, but image_grid_thw gives 208", pixel_values=batch["pixel_values"][:-1])
    broken("must come together", image_grid_thw=None)
    broken("image 3 has 15 tokens", input_ids=torch.cat([batch["input_ids"][:, :-2], batch["input_ids"][:, -1:]], 1),
           attention_mask=batch["attention_mask"][:, 1:], mm_token_type_ids=batch["mm_token_type_ids"][:, 1:])


@pytest.mark.parametrize("name", ["internvl"], scope="module")
def test_tokens_and_tiles_must_match(teacher, processor, samples):
    batch, family = batch_of(samples, processor), family_of(teacher)
    tiles, pixels = len(batch["pixel_values"]), batch["pixel_values"]
    def broken(match, **changes): fails(match, family.language_inputs, teacher, batch | changes)
    broken(f"tokens for {tiles} tiles, but there are pixels for {tiles - 1}", pixel_values=pixels[1:])
    broken(f"tokens for {tiles} tiles, but there are pixels for 0", pixel_values=None)
    broken(r"tiles of \(32, 16\) pixels, the model takes \(32, 32\)", pixel_values=pixels[..., :16])
    broken("image 3 has 19 tokens in the text, not a multiple of the 4 of a tile", input_ids=torch.cat([batch["input_ids"][:, :-2], batch["input_ids"][:, -1:]], 1))


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


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


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
    path = folder / "processor_config.json"
    images = json.loads(path.read_text())["image_processor"]
    stock = images["image_processor_type"].removesuffix("Pil")
    change(path, processor_class=type(processor).__bases__[1].__name__, image_processor=images | dict(image_processor_type=stock),
           video_processor=dict(video_processor_type=stock.replace("Image", "Video")))
    loaded = load_teacher(folder)[1]
    again = batch_of(samples, loaded)
    assert type(loaded) is type(processor) and all(torch.equal(value, again[key]) for key, value in batch_of(samples, processor).items())


def test_missing_and_surplus_tensors_are_named(name, folder):
    last = "layers.3.self_attn.q_proj.weight"
    weights = load_file(folder / "model.safetensors")
    key = next(key for key in weights if key.endswith(last))
    save_file({k: v for k, v in weights.items() if k != key}, folder / "model.safetensors", metadata={"format": "pt"})
    fails(f"1 tensors are missing or of another shape, first model.language_model.{last}", load_teacher, folder)
    save_file(weights | {key.replace("layers.3", "layers.4"): weights[key].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    fails("hold 1 tensors that its config.json has no place for, first .*layers.4.self_attn.q_proj.weight", load_teacher, folder)


def test_tensors_are_compared_before_a_weight_is_read(folder, monkeypatch):
    devices, load = [], AutoModelForImageTextToText.from_pretrained
    def watched(*args, **kwargs):
        model, report = load(*args, **kwargs)
        devices.extend({p.device.type for p in model.parameters()})
        return model, report
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", watched)
    weights = load_file(folder / "model.safetensors")
    save_file(dict(list(weights.items())[1:]), folder / "model.safetensors", metadata={"format": "pt"})
    fails("1 tensors are missing", load_teacher, folder)
    assert devices == ["meta"]


@pytest.mark.parametrize("name", ["qwen3_vl"], scope="module")
@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_load_teacher_names_truncated_weights(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    fails(r"model\.safetensors is truncated or damaged", load_teacher, folder)


def test_load_teacher_names_what_is_wrong(folder, tmp_path, name, processor):
    def with_fault(match, fault):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        fault(copy)
        fails(match, load_teacher, copy)
        shutil.rmtree(copy)

    def without_image_token(copy):
        for path in copy.glob("tokenizer*"): path.write_text(path.read_text().replace(tiny.TINY[name].special[0], "<|picture|>"))

    config = json.loads((folder / "config.json").read_text())
    index = json.dumps(dict(weight_map={"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}))
    with_fault("has no config.json", lambda copy: (copy / "config.json").unlink())
    with_fault("config.json .* is damaged", lambda copy: (copy / "config.json").write_text("{\"model_type\""))
    with_fault("unsupported model type 'llama'; one of qwen3_vl", lambda copy: change(copy / "config.json", model_type="llama"))
    with_fault("config.json in .* can't be used: .*hidden_size", lambda copy: change(copy / "config.json", text_config=config["text_config"] | dict(hidden_size="wide")))
    with_fault("has no model.safetensors", lambda copy: (copy / "model.safetensors").unlink())
    with_fault("has no model-00002-of-00002.safetensors", lambda copy: (copy / "model.safetensors.index.json").write_text(index))
    with_fault(r"(8|12) tensors are missing or of another shape, first .*mlp",
               lambda copy: change(copy / "config.json", text_config=config["text_config"] | dict(intermediate_size=100)))
    with_fault("tokenizer or processor files .* can't be used", lambda copy: (copy / "tokenizer.json").unlink())
    with_fault("tokenizer or processor files .* can't be used", lambda copy: (copy / "tokenizer.json").write_text("{\"version\": \"1"))
    with_fault("tokenizer or processor files .* can't be used", lambda copy: (copy / "processor_config.json").write_text("{"))
    with_fault(r"can't be used: the tokenizer has no image token '.*'", without_image_token)
    with_fault(f"has image token {processor.image_token_id}, its model 7", lambda copy: change(copy / "config.json", image_token_id=7))


def test_load_teacher_looks_for_a_missing_folder_in_the_local_cache_alone(tmp_path):
    fails("no model at .*nobody: neither a folder nor a model in the local hub cache", load_teacher, tmp_path / "nobody")
    fails("no model at heed/nobody", load_teacher, "heed/nobody")


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_a_truncated_image_is_named(tmp_path, processor, see, kind):
    path = tmp_path / f"page.{kind}"
    page(64, 64).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    fails("can't decode the image .*page", processor, images=[Image.open(path)], text=[see])
    fails("can't decode the image .*page", processor, images=[str(path)], text=[see])
    message = [dict(role="user", content=[dict(type="image", image=Image.open(path))])]
    fails("can't decode the image .*page", processor.apply_chat_template, message, tokenize=True, return_dict=True)


def test_what_is_no_image_is_named(tmp_path, processor, see):
    path = tmp_path / "page.png"
    path.write_text("not a picture")
    fails("can't decode the image .*page", processor, images=[str(path)], text=[see])
    fails("only images", processor, text=["a film"], videos=[torch.zeros(2, 3, 16, 16)])


def test_images_out_of_bounds_are_named(name, processor, see):
    limit = {"internvl": None, "minicpmv": 13}.get(name, 200)   # tiles take any ratio; for 48 pixels and patches of 8: (48 / 13) ** 2
    for side in (1, 16):
        processor(text=[see], images=[page(side, side * (limit or 300))])
    if name in BLOCK_TOWERS:
        fails("image 1 is 16x3201 pixels; the long side may be 200 times the short one at most", processor, text=[see + see], images=[page(32, 32), page(16, 3201)])
    elif limit: processor(text=[see], images=[page(16, 3201)])   # has no density, but can be read


@pytest.mark.parametrize("size", [(16, 208), (208, 16), (32, 32)], ids=str)
@torch.no_grad()
def test_every_image_that_is_taken_has_a_density(teacher, processor, see, size):
    family = family_of(teacher)
    density = family.density(family.language_inputs(teacher, processor(text=[see], images=[page(*size)], return_tensors="pt")))
    assert density.isfinite().all() and density.any()


@pytest.mark.parametrize("images", [[], (), [[]], [[], []]], ids=str)
def test_no_images_are_none(teacher, processor, images):
    batch = processor(text=["what", "total?"], images=images, return_tensors="pt", padding=True)
    expected = processor(text=["what", "total?"], return_tensors="pt", padding=True)
    assert batch.keys() == expected.keys() and all(torch.equal(batch[key], expected[key]) for key in batch)


def test_another_familys_tokenizer_is_named(name, processor):
    other = tiny.tokenizer("glm4v" if name == "internvl" else "internvl")
    fails("the tokenizer has no image token '.*'", type(processor), processor.image_processor, other)
