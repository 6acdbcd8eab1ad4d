"MiniCPM-V 4.5 against plain forms of its parts, the library's own tower, and itself: cached, saved."

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer, models
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

import tiny
from heed_nb.minicpm import (
    MiniCPMV45ForConditionalGeneration,
    MiniCPMV45Model,
    MiniCPMV45Processor,
    MiniCPMV45Resampler,
    MiniCPMVImageProcessor,
    sincos_positions,
    slice_grid,
)
from heed_nb.teachers import load_teacher
from tiny import batch_of, fails, page

torch.set_num_threads(1)
TINY = tiny.TINY["minicpmv"]
IMAGES = dict(scale_resolution=48, patch_size=8, image_feature_size=4)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


@pytest.fixture(scope="module")
def processor():
    "The template is the tokenizer's, as in the checkpoint."
    tokenizer = tiny.tokenizer("minicpmv")
    tokenizer.chat_template = TEMPLATE
    return MiniCPMV45Processor(TINY.image_processor, tokenizer)


@pytest.fixture
def model():
    return tiny.teacher("minicpmv")


@pytest.fixture(scope="module")
def batch(processor):
    return batch_of(tiny.samples("minicpmv"), processor)


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

SIZES = torch.tensor([[3, 5], [6, 6], [1, 4], [6, 2]])


def pixels_of(sizes):
    return torch.randn(int(sizes.prod(-1).sum()), 3 * 8 * 8, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def test_tower_is_the_librarys_on_each_slice(model):
    "Idefics2's tower on the slice as a picture, with the same weights, gives the patches of the batch."
    peer = Idefics2VisionTransformer(Idefics2VisionConfig(**TINY.vision)).eval()
    peer.load_state_dict(model.model.vpm.state_dict())
    pixels = pixels_of(SIZES)
    lengths = SIZES.prod(-1).tolist()
    features = model.get_image_features(pixels, SIZES).last_hidden_state
    for (h, w), patches, ours in zip(SIZES.tolist(), pixels.split(lengths), features.split(lengths)):
        image = patches.view(h, w, 3, 8, 8).permute(2, 0, 3, 1, 4).reshape(1, 3, 8 * h, 8 * w)
        assert_close(ours, peer(image).last_hidden_state[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3])
def test_slices_do_not_see_each_other(model, size):
    model.config.vision_batch_size, pixels = size, pixels_of(SIZES)
    model.set_attn_implementation("eager")  # which shows its attention
    lengths, collect = SIZES.prod(-1).tolist(), dict(output_hidden_states=True, output_attentions=True)
    together = model.get_image_features(pixels, SIZES, **collect)
    layers = [together.last_hidden_state, *together.hidden_states]
    assert len(layers) == 4 and len(together.attentions) == 2
    for i, patches in enumerate(pixels.split(lengths)):
        alone = model.get_image_features(patches, SIZES[i : i + 1], **collect)
        parts = lambda out, i: [out.pooler_output[i], out.token_attentions[i], *(layer[i] for layer in out.attentions)]
        assert_close(parts(together, i), parts(alone, 0), atol=1e-4, rtol=1e-4)
        found = [layer.split(lengths)[i] for layer in layers]
        assert_close(found, [alone.last_hidden_state, *alone.hidden_states], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_last_layer_can_be_dropped(model):
    config = tiny.config("minicpmv")
    config.drop_vision_last_layer = True
    dropped = MiniCPMV45ForConditionalGeneration(config).eval()
    names = {name for name in model.state_dict() if name.startswith("model.vpm.encoder.layers.1.")}
    assert names and model.state_dict().keys() - dropped.state_dict().keys() == names
    dropped.load_state_dict({name: p for name, p in model.state_dict().items() if name not in names})
    last = model.model.vpm.encoder.layers[1]
    for p in (*last.self_attn.out_proj.parameters(), *last.mlp.fc2.parameters()):
        p.zero_()
    assert_close(*(m.get_image_features(pixels_of(SIZES), SIZES).pooler_output for m in (model, dropped)))


# Images


def test_slice_grids_are_those_of_the_next_version():
    "The library's 4.6 slices alike, but for ties."
    peer, generator = MiniCPMV4_6ImageProcessorPil(), torch.Generator().manual_seed(0)
    for height, width in torch.randint(20, 3000, (2000, 2), generator=generator).tolist():
        assert list(slice_grid((height, width), 448, 9)) == (peer.get_sliced_grid((height, width), 9, 448) or [0, 0])


# Text and images


def test_placeholders(processor, batch):
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "tgt_sizes"}
    texts = [
        processor.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(batch["input_ids"], batch["attention_mask"])
    ]
    seen = 4 * "<unk>"
    number, image, part = lambda i: f"<image_id>{i}</image_id>", f"<image>{seen}</image>", f"<slice>{seen}</slice>"
    assert texts == [
        "what is a total?",
        f"{number(0)}{image}{part}\n{part}read it",
        f"{number(0)}{image}{3 * part}or{number(1)}{image}{part}\n{part}?",
        f"{number(0)}{image}{part}\n{part}",
    ]
    assert len(batch["tgt_sizes"]) == 3 + 4 + 3 + 3
    assert len(batch["pixel_values"]) == batch["tgt_sizes"].prod(-1).sum()
    assert set(batch_of(tiny.samples("minicpmv")[:1], processor)) == {"input_ids", "attention_mask"}
    plain = MiniCPMV45Processor(MiniCPMVImageProcessor(**IMAGES, use_image_id=False), processor.tokenizer)
    ids = plain(text=["<unk>"], images=[page(20, 30)], return_tensors="pt")["input_ids"][0]
    assert plain.tokenizer.decode(ids) == image


def test_chats(processor):
    "The tokenizer's template takes strings; images and texts become its lines."
    samples, text = tiny.samples("minicpmv"), dict(type="text", text="what")
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


def test_what_the_processor_refuses(processor):
    processor(text=["<unk><unk>"], images=[page(80, 4), page(805, 4)])  # any shape, as the checkpoint's own
    assert processor.aspect_limit == 13  # beyond it there is no density
    fails("only images", processor, text=["what"], videos=[np.zeros((2, 8, 8, 3))])
    fails("Found 1 <unk> tokens in the text but no images", processor, text=["<unk>"])
    for name, token in (("image", "<unk>"), ("slice end", "</slice>")):
        words = [w for w in processor.tokenizer.get_vocab() if w != token]
        words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="a"))
        fails(
            f"the tokenizer has no {name} token '{token}'",
            MiniCPMV45Processor,
            processor.image_processor,
            PreTrainedTokenizerFast(tokenizer_object=words),
        )
    fails("max_slice_nums is 0; at least 1", MiniCPMVImageProcessor, max_slice_nums=0)


# The model


@torch.no_grad()
def test_images_stand_where_their_tokens_are(model, processor, batch):
    "Embeddings, with each slice's tokens in the places of its image tokens, through Qwen3 alone."
    embeds = model.get_input_embeddings()(batch["input_ids"])
    tokens = iter(model.get_image_features(batch["pixel_values"], batch["tgt_sizes"]).pooler_output.flatten(0, 1))
    for row, ids in zip(embeds, batch["input_ids"].tolist()):
        for t, token in enumerate(ids):
            if token == processor.image_token_id:
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
def test_generation_with_a_cache_is_generation_without(model, processor, batch, how):
    how = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, **how)
    cached = model.generate(**batch, **how)
    plain = {k: v for k, v in how.items() if k not in ("cache_implementation", "prefill_chunk_size")}
    assert torch.equal(cached, model.generate(**batch, **plain, use_cache=False))
    for row, sample in zip(cached, tiny.samples("minicpmv")):
        assert torch.equal(row[-5:], model.generate(**batch_of([sample], processor), **how)[0, -5:])


def test_gradients_reach_every_part(model, batch):
    loss = model.train()(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    plain = {name: p.grad for name, p in model.named_parameters()}
    key_bias = {
        f"model.vpm.encoder.layers.{i}.self_attn.k_proj.bias" for i in range(2)
    }  # adds the same to all of a row's scores
    assert all(grad is not None and grad.abs().max() > 0 for name, grad in plain.items() if name not in key_bias)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    out = model(**batch, labels=labels)
    assert_close(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    assert all(torch.equal(p.grad, plain[name]) for name, p in model.named_parameters())


def test_what_the_model_refuses(model, batch):
    pixels, none = {name: batch[name] for name in ("pixel_values", "tgt_sizes")}, torch.zeros(1, 2, 64)
    fails("must come together", model, **batch | dict(tgt_sizes=None))
    fails("the images make 52 tokens, but the text has 0 for them", model, inputs_embeds=none, **pixels)
    for given in (dict(), dict(input_ids=batch["input_ids"], inputs_embeds=torch.zeros(4, 2, 64))):
        fails("give either input_ids or inputs_embeds", model, **given)


# Saving and loading


@torch.no_grad()
def test_saves_and_loads_under_the_checkpoints_names(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        names = set(f.keys())
    assert len(names) == len(model.state_dict())
    assert {name.split(".")[0] for name in names} == {"llm", "vpm", "resampler"}
    llm = {"llm.model.layers.0.self_attn.q_proj.weight", "llm.lm_head.weight"}
    assert llm | {"vpm.post_layernorm.weight", "resampler.attn.in_proj_weight", "resampler.query"} <= names
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


@torch.no_grad()
def test_load_teacher_takes_the_public_files(model, processor, batch, tmp_path):
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
    names = [*tiny.TEXT, *TINY.text, "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"]
    change(
        "config.json",
        architectures=["MiniCPMV"],
        model_type="minicpmv",
        version="4.5",
        auto_map=remote(AutoConfig="configuration_minicpm.MiniCPMVConfig", AutoModel="modeling_minicpmv.MiniCPMV"),
        rope_theta=10000,
        rope_scaling=None,
        **{name: text[name] for name in names if name not in ("initializer_range", "rope_parameters")},
        num_hidden_layers=4,
        vision_config=TINY.vision | dict(model_type="siglip"),
        slice_config=dict(max_slice_nums=9, model_type="minicpmv"),
        query_num=4,
        image_token_id=processor.image_token_id,
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
        **IMAGES,
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
    again = batch_of(tiny.samples("minicpmv"), reader)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert_close(loaded(**batch).logits, model(**batch).logits)
    chat = [{"role": "user", "content": [{"type": "image", "image": page(9, 9)}, {"type": "text", "text": "what"}]}]
    assert reader.apply_chat_template(chat) == processor.apply_chat_template(chat)
    loaded.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["text_config"]["hidden_size"] == 64 and "hidden_size" not in written and "auto_map" not in written
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(**batch).logits, loaded(**batch).logits)
    change("config.json", image_token_id=128244)
    fails(f"has image token {processor.image_token_id}, its model 128244", load_teacher, tmp_path)
    change("config.json", version=2.6)
    fails("config.json in .* can't be used: .*MiniCPM-V 2.6 is not supported, only 4.5", load_teacher, tmp_path)
