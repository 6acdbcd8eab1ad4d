"A teacher through its family against the whole model, and every fault of its files and images."
import json
import shutil

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import Qwen3VLForConditionalGeneration

from heed_nb import toyworld
from heed_nb.density import patch_density
from heed_nb.teachers import ImageOnlyQwen3VLProcessor, family_of, load_teacher

SEE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def processor():
    return toyworld.processor()


@pytest.fixture(scope="module")
def teacher(processor):
    torch.manual_seed(0)
    config = toyworld.teacher_config(processor.tokenizer, hidden_size=32, num_hidden_layers=3, vision_hidden_size=32, vision_depth=2)
    model = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[processor.tokenizer.pad_token_id].normal_()  # what stands in the padding must not matter
    return model


def page(width, height, seed=0):
    noise = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


@pytest.fixture
def samples():
    "(text, images): no image, one, two of different sizes, one more."
    return [("what is a total?", []), (SEE + "read it", [page(48, 64)]),
            (SEE + "or" + SEE + "?", [page(96, 32, 1), page(48, 64, 2)]), (SEE, [page(64, 64, 3)])]


def batch_of(samples, processor, side="left"):
    images = [image for _, images in samples for image in images]
    return processor(text=[text for text, _ in samples], images=images or None, return_tensors="pt", padding=True, padding_side=side)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_decoder_and_head_are_the_model(teacher, processor, samples, side, dtype):
    model, batch = teacher.to(dtype), batch_of(samples, processor, side)
    family = family_of(model)
    inputs = family.language_inputs(model, batch)
    logits = family.lm_head(model)(family.decoder(model)(**inputs.kwargs).last_hidden_state)
    assert torch.equal(logits, model(**batch).logits)
    assert len(family.layers(model)) == 3 and all(layer.self_attn for layer in family.layers(model))
    teacher.float()


@torch.no_grad()
def test_text_alone_is_not_touched_by_the_pages_before_it(teacher, processor, samples):
    family, text = family_of(teacher), batch_of(samples[:1], processor)
    alone = teacher(**text).logits
    teacher.generate(**batch_of(samples[1:2], processor), max_new_tokens=2)
    inputs = family.language_inputs(teacher, text)
    assert torch.equal(family.lm_head(teacher)(family.decoder(teacher)(**inputs.kwargs).last_hidden_state), alone)
    assert inputs.patch_features == [] and not family.density(inputs).any()


def test_tower_has_no_gradient_and_embeddings_have_the_models(teacher, processor, samples):
    batch, family = batch_of(samples, processor), family_of(teacher)
    embeddings = teacher.get_input_embeddings().weight
    teacher.model.visual.requires_grad_(False)
    expected, = torch.autograd.grad(teacher(**batch).logits.square().mean(), embeddings)
    teacher.model.visual.requires_grad_(True)
    inputs = family.language_inputs(teacher, batch)
    logits = family.lm_head(teacher)(family.decoder(teacher)(**inputs.kwargs).last_hidden_state)
    loss = logits.square().mean()
    assert torch.equal(torch.autograd.grad(loss, embeddings, retain_graph=True)[0], expected)
    assert torch.autograd.grad(loss, teacher.model.visual.patch_embed.proj.weight, allow_unused=True) == (None,)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_density_of_a_batch_is_that_of_its_pages(teacher, processor, samples, side, reduce):
    family = family_of(teacher)
    batch = batch_of(samples, processor, side)
    density = family.density(family.language_inputs(teacher, batch), reduce=reduce)
    for row, ids, sample in zip(density, batch["input_ids"], samples):
        visual = ids == processor.image_token_id
        assert not row[~visual].any()
        expected = []
        for image in sample[1]:
            alone = family.language_inputs(teacher, batch_of([(SEE, [image])], processor)).patch_features[0]
            blocks = patch_density(alone).unfold(0, 2, 2).unfold(1, 2, 2).flatten(2)  # [h / 2, w / 2, 4]
            expected += [blocks.mean(-1).flatten() if reduce == "mean" else blocks.amax(-1).flatten()]
        assert_close(row[visual], torch.cat(expected) if expected else row[visual], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("corner", [(0, 0), (2, 0), (0, 4), (2, 4), (1, 3)])
def test_density_peaks_where_the_mark_is(teacher, processor, corner):
    "A mark in one token's cell of a 3 x 5 page, found at that token's position in the sequence."
    row, column = corner
    image = Image.new("RGB", (80, 48), "white")
    ImageDraw.Draw(image).rectangle((16 * column + 3, 16 * row + 2, 16 * column + 11, 16 * row + 13), fill="black", outline="red", width=2)
    family, batch = family_of(teacher), batch_of([(SEE + "where?", [image])], processor)
    inputs = family.language_inputs(teacher, batch)
    density = family.density(inputs)[inputs.visual_mask].view(3, 5)
    assert divmod(density.argmax().item(), 5) == corner


# Faults. One line each, before anything is computed.

def fails(match, call, *args, **kwargs):
    with pytest.raises(ValueError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_tokens_pixels_and_grids_must_match(teacher, processor, samples):
    batch, family = dict(batch_of(samples, processor)), family_of(teacher)
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


@pytest.fixture
def folder(tmp_path, teacher, processor):
    teacher.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_load_teacher_gives_back_what_was_saved(folder, teacher, processor):
    model, loaded = load_teacher(folder)
    assert not model.training and type(loaded) is ImageOnlyQwen3VLProcessor
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in teacher.state_dict().items())
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert load_teacher(str(folder), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_load_teacher_names_truncated_weights(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    fails(r"model\.safetensors is truncated or damaged", load_teacher, folder)


def test_load_teacher_names_what_is_wrong(folder, tmp_path_factory, processor):
    def with_fault(match, fault):
        copy = tmp_path_factory.mktemp("teacher") / "copy"
        shutil.copytree(folder, copy)
        fault(copy)
        fails(match, load_teacher, copy)

    def without_a_tensor(copy):
        weights = load_file(copy / "model.safetensors")
        weights.pop("model.language_model.layers.1.self_attn.q_proj.weight")
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})

    def without_image_token(copy):
        path = copy / "tokenizer.json"
        path.write_text(path.read_text().replace("<|image_pad|>", "<|picture|>"))

    wider = json.loads((folder / "config.json").read_text())["text_config"] | dict(intermediate_size=100)
    with_fault("has no config.json", lambda copy: (copy / "config.json").unlink())
    with_fault("config.json .* is damaged", lambda copy: (copy / "config.json").write_text("{\"model_type\""))
    with_fault("unsupported model type 'llama'; one of qwen3_vl", lambda copy: change(copy / "config.json", model_type="llama"))
    with_fault("has no model.safetensors", lambda copy: (copy / "model.safetensors").unlink())
    with_fault("has no model-00002-of-00002.safetensors", lambda copy: (copy / "model.safetensors.index.json").write_text(
        json.dumps(dict(weight_map={"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}))))
    with_fault("1 tensors are missing or of another shape, first model.language_model.layers.1.self_attn.q_proj.weight", without_a_tensor)
    with_fault("9 tensors are missing or of another shape, first .*mlp", lambda copy: change(copy / "config.json", text_config=wider))
    with_fault("tokenizer or processor files .* can't be used", lambda copy: (copy / "tokenizer.json").unlink())
    with_fault("tokenizer or processor files .* can't be used", lambda copy: (copy / "tokenizer.json").write_text("{\"version\": \"1"))
    with_fault("tokenizer or processor files .* can't be used", lambda copy: (copy / "processor_config.json").write_text("{"))
    with_fault(f"has image token {len(processor.tokenizer)}, its model {processor.image_token_id}", without_image_token)
    with_fault(f"has image token {processor.image_token_id}, its model 3", lambda copy: change(copy / "config.json", image_token_id=3))


def test_load_teacher_looks_for_a_missing_folder_in_the_local_cache_alone(tmp_path):
    fails("no model at .*nobody: neither a folder nor a model in the local hub cache", load_teacher, tmp_path / "nobody")
    fails("no model at heed/nobody", load_teacher, "heed/nobody")


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_a_truncated_image_is_named(tmp_path, processor, kind):
    path = tmp_path / f"page.{kind}"
    page(64, 64).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    fails("can't decode the image .*page", processor, images=[Image.open(path)], text=[SEE])
    fails("can't decode the image .*page", processor, images=[str(path)], text=[SEE])
    message = [dict(role="user", content=[dict(type="image", image=Image.open(path))])]
    fails("can't decode the image .*page", processor.apply_chat_template, message, tokenize=True, return_dict=True)


def test_what_is_no_image_is_named(tmp_path, processor):
    path = tmp_path / "page.png"
    path.write_text("not a picture")
    fails("can't decode the image .*page", processor, images=[str(path)], text=[SEE])
    fails("only images", processor, text=["a film"], videos=[torch.zeros(2, 3, 16, 16)])
