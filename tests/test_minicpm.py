"MiniCPM-V 4.5 against plain forms of its parts, the library's own tower, and itself: alone, batched, cached, saved."

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from tiny import fails
from heed_nb.density import patch_density
from heed_nb.minicpm import (
    MiniCPMV45Config,
    MiniCPMV45ForConditionalGeneration,
    MiniCPMV45Model,
    MiniCPMV45Processor,
    MiniCPMV45Resampler,
    MiniCPMVImageProcessor,
    sincos_positions,
    slice_grid,
)
from heed_nb.teachers import family_of, load_teacher

torch.set_num_threads(1)
QUERIES, PATCH, SCALE = 6, 4, 32
SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <unk> <image> </image> <slice> </slice> <image_id> </image_id>".split()
WORDS = SPECIAL + ["user", "assistant", "what", "stands", "here", "and", "there", *"0123456789", "<", ">", "\n"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
IMAGE = SPECIAL.index("<unk>")


def tiny_tokenizer(**kwargs):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
        **kwargs,
    )


@pytest.fixture(scope="module")
def processor():
    images = MiniCPMVImageProcessor(scale_resolution=SCALE, patch_size=PATCH, image_feature_size=QUERIES)
    return MiniCPMV45Processor(images, tiny_tokenizer(chat_template=TEMPLATE))


TEXT = dict(
    vocab_size=len(WORDS),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.2,
)
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, patch_size=PATCH, image_size=40
)


def tiny_model(seed=0, **fields):
    "A random model whose pad token's embedding is not zero."
    torch.manual_seed(seed)
    model = MiniCPMV45ForConditionalGeneration(
        MiniCPMV45Config(text_config=TEXT, vision_config=VISION, query_num=QUERIES, image_token_id=IMAGE, **fields)
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith(("model.vpm", "model.resampler")):
                p.add_(0.2 * torch.randn(p.shape))  # off their starts: norms, biases, positions matter
    return model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def picture(width, height, seed=0):
    return Image.fromarray(
        torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8).numpy()
    )


@pytest.fixture(scope="module")
def samples():
    "No image, a small one, two of which one is sliced, one sliced."
    return [
        ("what", []),
        ("<unk> stands here", [picture(20, 30)]),
        ("<unk> and <unk> there", [picture(70, 40, 1), picture(24, 24, 2)]),
        ("<unk> here and there", [picture(33, 90, 3)]),
    ]


def batch_of(samples, processor, side="left"):
    images = [image for _, images in samples for image in images]
    return processor(
        text=[text for text, _ in samples], images=images or None, return_tensors="pt", padding=True, padding_side=side
    )


# Resampler


def plain_resampler(r, features, rows, columns):
    "One slice, head by head: tokens and the mean of the heads' attention."
    norm = lambda layer, x: (
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt() * layer.weight
        + layer.bias
    )
    x, q = norm(r.ln_kv, features @ r.kv_proj.weight.T), norm(r.ln_q, r.query)
    heads, dim = r.attn.num_heads, len(r.proj)
    (wq, wk, wv), (bq, bk, bv) = r.attn.in_proj_weight.split(dim), r.attn.in_proj_bias.split(dim)
    outs, maps = [], []
    for one in torch.arange(dim).chunk(heads):
        k = (x + sincos_positions(rows, columns, dim)) @ wk[one].T + bk[one]
        maps.append(((q @ wq[one].T + bq[one]) @ k.T / (dim // heads) ** 0.5).softmax(-1))
        outs.append(maps[-1] @ (x @ wv[one].T + bv[one]))
    out = torch.cat(outs, -1) @ r.attn.out_proj.weight.T + r.attn.out_proj.bias
    return norm(r.ln_post, out) @ r.proj, sum(maps) / heads


@torch.no_grad()
def test_resampler_is_its_equations():
    torch.manual_seed(1)
    resampler = MiniCPMV45Resampler(num_queries=5, embed_dim=24, num_heads=3, kv_dim=10).eval()
    for p in resampler.parameters():
        p.add_(0.5 * torch.randn(p.shape))
    sizes = torch.tensor([[3, 4], [1, 2], [2, 5]])
    mask = torch.arange(12) < sizes.prod(-1)[:, None]
    features = torch.randn(3, 12, 10)
    tokens, attention = resampler(features, mask, sizes)
    for i, (rows, columns) in enumerate(sizes.tolist()):
        out, seen = plain_resampler(resampler, features[i, mask[i]], rows, columns)
        assert_close(tokens[i], out, atol=1e-4, rtol=1e-4)
        assert_close(attention[i][:, mask[i]], seen, atol=1e-5, rtol=1e-4)
    assert_close(attention.sum(-1), torch.ones(3, 5))
    assert not attention[~mask[:, None].expand_as(attention)].any()
    junk = features.masked_fill(~mask[..., None], 1e3)
    assert_close(resampler(junk, mask, sizes)[0], tokens)


# Tower

SIZES = torch.tensor([[3, 5], [10, 10], [1, 4], [6, 2]])


def pixels_of(sizes):
    return torch.randn(int(sizes.prod(-1).sum()), 3 * PATCH * PATCH, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def test_tower_is_the_librarys_on_each_slice(model):
    "Idefics2's tower on the slice as a picture, with the same weights, gives the patches of the batch."
    peer = Idefics2VisionTransformer(Idefics2VisionConfig(**VISION)).eval()
    peer.load_state_dict(model.model.vpm.state_dict())
    pixels = pixels_of(SIZES)
    lengths = SIZES.prod(-1).tolist()
    features = model.get_image_features(pixels, SIZES).last_hidden_state
    for (h, w), patches, ours in zip(SIZES.tolist(), pixels.split(lengths), features.split(lengths)):
        image = patches.view(h, w, 3, PATCH, PATCH).permute(2, 0, 3, 1, 4).reshape(1, 3, h * PATCH, w * PATCH)
        assert_close(ours, peer(image).last_hidden_state[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3])
def test_slices_do_not_see_each_other(size):
    model, pixels = tiny_model(vision_batch_size=size), pixels_of(SIZES)
    model.set_attn_implementation("eager")  # which shows its attention
    lengths, collect = SIZES.prod(-1).tolist(), dict(output_hidden_states=True, output_attentions=True)
    together = model.get_image_features(pixels, SIZES, **collect)
    layers = [together.last_hidden_state, *together.hidden_states]
    assert len(layers) == 5 and len(together.attentions) == 3
    for i, patches in enumerate(pixels.split(lengths)):
        alone = model.get_image_features(patches, SIZES[i : i + 1], **collect)
        parts = lambda out, i: [out.pooler_output[i], out.token_attentions[i], *(layer[i] for layer in out.attentions)]
        assert_close(parts(together, i), parts(alone, 0), atol=1e-4, rtol=1e-4)
        found = [layer.split(lengths)[i] for layer in layers]
        assert_close(found, [alone.last_hidden_state, *alone.hidden_states], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_last_layer_can_be_dropped():
    whole, dropped = tiny_model(), tiny_model(drop_vision_last_layer=True)
    names = {name for name in whole.state_dict() if name.startswith("model.vpm.encoder.layers.2.")}
    assert names and whole.state_dict().keys() - dropped.state_dict().keys() == names
    dropped.load_state_dict({name: p for name, p in whole.state_dict().items() if name not in names})
    last = whole.model.vpm.encoder.layers[2]
    for p in (*last.self_attn.out_proj.parameters(), *last.mlp.fc2.parameters()):
        p.zero_()
    assert_close(*(m.get_image_features(pixels_of(SIZES), SIZES).pooler_output for m in (whole, dropped)))


# Images


def test_slice_grids_are_those_of_the_next_version():
    "The library's 4.6 slices alike, but for ties."
    peer, generator = MiniCPMV4_6ImageProcessorPil(), torch.Generator().manual_seed(0)
    for height, width in torch.randint(20, 3000, (2000, 2), generator=generator).tolist():
        assert list(slice_grid((height, width), 448, 9)) == (peer.get_sliced_grid((height, width), 9, 448) or [0, 0])


def test_pixels_are_pillows():
    "A thumbnail, then slices row by row, each patch in raster order: resized, cut and scaled by hand."
    image = picture(90, 64, 5)
    out = MiniCPMVImageProcessor(scale_resolution=SCALE, patch_size=PATCH)(image, return_tensors="pt")
    rows, columns = out["grids"][0].tolist()
    assert (rows, columns) == (2, 3) and out["tgt_sizes"].tolist() == [[6, 9]] + 6 * [[8, 8]]
    whole = image.resize((96, 64), Image.Resampling.BICUBIC)
    pieces = [
        image.resize((36, 24), Image.Resampling.BICUBIC),
        *(whole.crop((x, y, x + 32, y + 32)) for y in (0, 32) for x in (0, 32, 64)),
    ]
    patches = [
        np.asarray(piece, dtype=np.float32)[i : i + PATCH, j : j + PATCH].transpose(2, 0, 1).ravel() / 127.5 - 1
        for piece in pieces
        for i in range(0, piece.height, PATCH)
        for j in range(0, piece.width, PATCH)
    ]
    assert_close(out["pixel_values"], torch.from_numpy(np.stack(patches)), atol=1e-5, rtol=0)


# Text and images


def slots(count):
    return "<image>" + QUERIES * "<unk>" + "</image>" if count == 0 else "<slice>" + QUERIES * "<unk>" + "</slice>"


def test_placeholders(processor, samples):
    batch = batch_of(samples, processor)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "tgt_sizes"}
    texts = [
        processor.tokenizer.decode(ids[mask.bool()]).replace(" ", "")
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"])
    ]
    number = lambda i: f"<image_id>{i}</image_id>"
    assert texts == [
        "what",
        f"{number(0)}{slots(0)}standshere",
        f"{number(0)}{slots(0)}{slots(1)}{slots(1)}and{number(1)}{slots(0)}there",
        number(0) + slots(0) + "\n".join(3 * [slots(1)]) + "hereandthere",
    ]
    assert len(batch["tgt_sizes"]) == 1 + 3 + 1 + 4 and len(batch["pixel_values"]) == batch["tgt_sizes"].prod(-1).sum()
    assert set(batch_of(samples[:1], processor)) == {"input_ids", "attention_mask"}
    sizes = dict(scale_resolution=SCALE, patch_size=PATCH, image_feature_size=QUERIES)
    plain = MiniCPMV45Processor(MiniCPMVImageProcessor(**sizes, use_image_id=False), processor.tokenizer)
    ids = plain(text=["<unk>"], images=[picture(20, 30)], return_tensors="pt")["input_ids"][0]
    assert plain.tokenizer.decode(ids).replace(" ", "") == slots(0)


def test_chats(processor, samples):
    "The tokenizer's template takes strings; images and texts become its lines."
    text = dict(type="text", text="what")
    chats = [
        [dict(role="user", content=[*(dict(type="image", image=image) for image in images), text])]
        for _, images in samples
    ]
    rendered = [processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    assert rendered[2] == "<|im_start|>user <unk>\n<unk>\nwhat<|im_end|><|im_start|>assistant "
    plain = processor.apply_chat_template([{"role": "user", "content": "what"}], tokenize=False)
    assert plain == "<|im_start|>user what<|im_end|>"
    how = dict(tokenize=True, return_dict=True, return_tensors="pt")
    padding = dict(padding=True, padding_side="left")
    out = processor.apply_chat_template(chats, add_generation_prompt=True, processor_kwargs=padding, **how)
    expected = batch_of([(text, images) for text, (_, images) in zip(rendered, samples)], processor)
    assert all(torch.equal(out[name], expected[name]) for name in expected)
    assert "pixel_values" not in processor.apply_chat_template([chats[0]], **how)


def test_processor_loads_as_saved(processor, samples, tmp_path):
    processor.save_pretrained(tmp_path)
    tiny_model().config.save_pretrained(tmp_path)
    for loaded in (MiniCPMV45Processor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is MiniCPMV45Processor and type(loaded.image_processor) is MiniCPMVImageProcessor
        a, b = batch_of(samples, processor), batch_of(samples, loaded)
        assert all(torch.equal(a[name], b[name]) for name in a)
        chat = [
            {"role": "user", "content": [{"type": "image", "image": picture(9, 9)}, {"type": "text", "text": "what"}]}
        ]
        assert loaded.apply_chat_template(chat) == processor.apply_chat_template(chat)


def test_what_the_processor_refuses(processor, tmp_path):
    processor(text=["<unk><unk>"], images=[picture(80, 4), picture(805, 4)])  # any shape, as the checkpoint's own
    assert processor.aspect_limit == 20  # beyond it there is no density
    fails("only images", processor, text=["what"], videos=[np.zeros((2, 8, 8, 3))])
    fails("Found 1 <unk> tokens in the text but no images", processor, text=["<unk>"])
    for name, token in (("image", "<unk>"), ("slice end", "</slice>")):
        words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS) if w != token}, unk_token="what"))
        fails(
            f"the tokenizer has no {name} token '{token}'",
            MiniCPMV45Processor,
            processor.image_processor,
            PreTrainedTokenizerFast(tokenizer_object=words),
        )
    fails("max_slice_nums is 0; at least 1", MiniCPMVImageProcessor, max_slice_nums=0)
    path = tmp_path / "page.png"
    picture(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    for image in (Image.open(path), str(path)):
        fails("can't decode the image .*page.png", processor, text=["<unk>"], images=[image])


# The model


@torch.no_grad()
def test_images_stand_where_their_tokens_are(model, processor, samples):
    "Embeddings, with each slice's tokens in the places of its image tokens, through Qwen3 alone."
    batch = batch_of(samples, processor)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    tokens = iter(model.get_image_features(batch["pixel_values"], batch["tgt_sizes"]).pooler_output.flatten(0, 1))
    for row, ids in zip(embeds, batch["input_ids"].tolist()):
        for t, token in enumerate(ids):
            if token == IMAGE:
                row[t] = next(tokens)
    assert next(tokens, None) is None
    assert_close(
        model(**batch).logits,
        model.lm_head(
            model.get_decoder()(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).last_hidden_state
        ),
    )
    without = {
        name: value for name, value in batch.items() if name != "input_ids"
    }  # the image tokens' own embedding tells where they stand
    assert torch.equal(
        model(**without, inputs_embeds=model.get_input_embeddings()(batch["input_ids"])).logits, model(**batch).logits
    )


@pytest.mark.parametrize("how", [dict(num_beams=3, cache_implementation="static"), dict(prefill_chunk_size=5)], ids=str)
@torch.no_grad()
def test_generation_with_a_cache_is_generation_without(model, processor, samples, how):
    how = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, **how)
    batch = batch_of(samples, processor)
    cached = model.generate(**batch, **how)
    plain = {k: v for k, v in how.items() if k not in ("cache_implementation", "prefill_chunk_size")}
    assert torch.equal(cached, model.generate(**batch, **plain, use_cache=False))
    for row, sample in zip(cached, samples):
        assert torch.equal(row[-5:], model.generate(**batch_of([sample], processor), **how)[0, -5:])


def test_gradients_reach_every_part(processor, samples):
    model, batch = tiny_model().train(), batch_of(samples, processor)
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    plain = {name: p.grad for name, p in model.named_parameters()}
    key_bias = {
        f"model.vpm.encoder.layers.{i}.self_attn.k_proj.bias" for i in range(3)
    }  # adds the same to all of a row's scores
    assert all(grad is not None and grad.abs().max() > 0 for name, grad in plain.items() if name not in key_bias)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    out = model(**batch, labels=labels)
    assert_close(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    assert all(torch.equal(p.grad, plain[name]) for name, p in model.named_parameters())


def test_what_the_model_refuses(model, processor, samples):
    batch = dict(batch_of(samples, processor))
    pixels, none = {name: batch[name] for name in ("pixel_values", "tgt_sizes")}, torch.zeros(1, 2, 32)
    fails("must come together", model, **batch | dict(tgt_sizes=None))
    fails("the images make 54 tokens, but the text has 0 for them", model, inputs_embeds=none, **pixels)
    for given in (dict(), dict(input_ids=batch["input_ids"], inputs_embeds=torch.zeros(4, 2, 32))):
        fails("give either input_ids or inputs_embeds", model, **given)


# Saving and loading


@torch.no_grad()
def test_saves_and_loads_under_the_checkpoints_names(model, processor, samples, tmp_path):
    batch = batch_of(samples, processor)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        names = set(f.keys())
    assert len(names) == len(model.state_dict())
    assert {name.split(".")[0] for name in names} == {"llm", "vpm", "resampler"}
    assert {
        "llm.model.layers.0.self_attn.q_proj.weight",
        "llm.lm_head.weight",
        "vpm.encoder.layers.0.self_attn.out_proj.bias",
        "vpm.embeddings.position_embedding.weight",
        "vpm.post_layernorm.weight",
        "resampler.attn.in_proj_weight",
        "resampler.query",
        "resampler.proj",
        "resampler.ln_kv.bias",
    } <= names
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(loaded) is MiniCPMV45ForConditionalGeneration and torch.equal(
        loaded(**batch).logits, model(**batch).logits
    )
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert type(base) is MiniCPMV45Model and torch.equal(
        base(**batch).last_hidden_state, model.base_model(**batch).last_hidden_state
    )
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in base.state_dict().items())
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half(**batch).logits.isfinite().all()


def test_tied_embeddings_stay_tied(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


# The family


@torch.no_grad()
def test_language_inputs_hold_a_slices_features_and_weights(model, processor, samples):
    batch = batch_of(samples, processor)
    inputs = family_of(model).language_inputs(model, batch)
    assert [f.shape[:2] for f in inputs.patch_features] == [tuple(size) for size in batch["tgt_sizes"].tolist()]
    assert all(weights.dtype == torch.float32 for weights in inputs.patch_weights)
    assert_close(torch.cat([weights.sum(-1) for weights in inputs.patch_weights]), torch.ones(9 * QUERIES))


@torch.no_grad()
def test_density_of_a_token_is_the_mean_of_what_it_looks_at(model, processor, samples):
    "Each slice alone: its patches' density (Eq. 2), under the attention of the plain resampler."
    family, batch = family_of(model), batch_of(samples, processor)
    density = family.density(family.language_inputs(model, batch))
    visual = batch["input_ids"] == IMAGE
    assert not density[~visual].any()
    expected = []
    sizes = batch["tgt_sizes"]
    for patches, size in zip(batch["pixel_values"].split(sizes.prod(-1).tolist()), sizes):
        features, (rows, columns) = model.get_image_features(patches, size[None]).last_hidden_state, size.tolist()
        seen = plain_resampler(model.model.resampler, features, rows, columns)[1]
        expected.append(seen @ patch_density(features.view(rows, columns, -1)).flatten())
    assert_close(density[visual], torch.cat(expected), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_load_teacher_takes_the_public_files(model, processor, samples, tmp_path):
    "Their names and layout, text fields at the top level of config.json, and none of their code."
    model.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    for name in ("chat_template.jinja", "config.json"):
        (tmp_path / name).unlink()

    def change(name, **values):
        path = tmp_path / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))

    def remote(**classes):  # files of code that must not be run
        for value in classes.values():
            (tmp_path / f"{value.split('.')[0]}.py").write_text("raise SystemExit('remote code was run')")
        return classes

    text = model.config.text_config.to_dict()
    names = [*TEXT, "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"]
    change(
        "config.json",
        architectures=["MiniCPMV"],
        model_type="minicpmv",
        version="4.5",
        auto_map=remote(AutoConfig="configuration_minicpm.MiniCPMVConfig", AutoModel="modeling_minicpmv.MiniCPMV"),
        rope_theta=10000,
        rope_scaling=None,
        **{name: text[name] for name in names if name != "initializer_range"},
        vision_config=VISION | dict(model_type="siglip"),
        slice_config=dict(max_slice_nums=9, model_type="minicpmv"),
        query_num=QUERIES,
        image_token_id=IMAGE,
        use_cache=True,
        torch_dtype="bfloat16",
    )
    tokenizer = remote(AutoTokenizer="tokenization_minicpmv_fast.MiniCPMVTokenizerFast")["AutoTokenizer"]
    change(
        "tokenizer_config.json",
        tokenizer_class="MiniCPMVTokenizerFast",
        chat_template=TEMPLATE,
        auto_map=dict(AutoTokenizer=[tokenizer, None]),
    )
    change(
        "preprocessor_config.json",
        image_processor_type="MiniCPMVImageProcessor",
        processor_class="MiniCPMVProcessor",
        scale_resolution=SCALE,
        patch_size=PATCH,
        image_feature_size=QUERIES,
        max_slice_nums=9,
        use_image_id=True,
        slice_mode=True,
        norm_mean=3 * [0.5],
        norm_std=3 * [0.5],
        im_start="<image>",
        unk="<unk>",
        version=2.6,
        auto_map=remote(
            AutoProcessor="processing_minicpmv.MiniCPMVProcessor",
            AutoImageProcessor="image_processing_minicpmv.MiniCPMVImageProcessor",
        ),
    )
    loaded, reader = load_teacher(tmp_path)
    assert all(torch.equal(p, loaded.state_dict()[name]) for name, p in model.state_dict().items())
    a, b = batch_of(samples, processor), batch_of(samples, reader)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert_close(loaded(**b).logits, model(**a).logits)
    chat = [{"role": "user", "content": [{"type": "image", "image": picture(9, 9)}, {"type": "text", "text": "what"}]}]
    assert reader.apply_chat_template(chat) == processor.apply_chat_template(chat)
    loaded.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["text_config"]["hidden_size"] == 32 and "hidden_size" not in written and "auto_map" not in written
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(**b).logits, loaded(**b).logits)
    change("config.json", image_token_id=128244)
    fails(f"has image token {IMAGE}, its model 128244", load_teacher, tmp_path)
    change("config.json", version=2.6)
    fails("config.json in .* can't be used: .*MiniCPM-V 2.6 is not supported, only 4.5", load_teacher, tmp_path)
