"The hybrid of every family inside transformers: padding, caches, chunks, disk, training; and what is refused."

import copy
import inspect
import json
import subprocess
import sys
from functools import cache

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, DataCollatorWithFlattening, DynamicCache
from transformers.models.auto import image_processing_auto, modeling_auto, processing_auto, tokenization_auto
from transformers.models.auto.auto_factory import _LazyAutoMapping
from transformers.utils.generic import find_labels

import heed_nb
import tiny
from heed_nb.conditions import CONDITIONS, TrainSettings
from heed_nb.data import Sample, collate
from heed_nb.hybrid import HYBRIDS, hybrid_config, mixer_parameters, to_hybrid, transferred_parameters
from heed_nb.losses import record_outputs
from heed_nb.mixers import MIXERS
from heed_nb.objective import step_loss
from heed_nb.streams import aligned_outputs, pair_with_teacher, replaced_layers, teacher_path
from heed_nb.teachers import family_class, family_of, load_teacher, paper_config
from tiny import fails

FAMILIES = list(tiny.TINY)
CASES = [(family, "mamba2", "paper") for family in FAMILIES] + [
    ("qwen3_vl", "gdn", "identity"),
    ("glm4v", "gdn", "paper"),
]
# no end and no image in the answer
HOW = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, suppress_tokens=[1, 2, 3, 4])
PROCESSORS = {family: tiny.processor(family) for family in FAMILIES}
teacher_of = cache(tiny.teacher)


def hybrid(teacher, **kwargs):
    "A student whose mixers are off their start, so that every part of them matters."
    student, generator = to_hybrid(teacher, **kwargs), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in mixer_parameters(student).values():
            p += (0.15 * torch.randn(p.shape, generator=generator)).to(p.dtype)
    return student


def positions_of(batch):
    return (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def batch_of(family, samples=None, side="left"):
    "`inside`: prompts padded on the right, each with the same answer after its padding."
    samples, padded = samples or tiny.samples(family), "right" if side == "inside" else side
    batch = tiny.batch_of(samples, PROCESSORS[family], padded)
    if side == "inside":
        answer = torch.arange(40, 44).expand(len(samples), -1)
        more = dict(
            input_ids=answer, attention_mask=torch.ones_like(answer), mm_token_type_ids=torch.zeros_like(answer)
        )
        batch |= {key: torch.cat([batch[key], value], 1) for key, value in more.items() if key in batch}
        if "image_grid_thw" not in batch:
            batch["position_ids"] = positions_of(batch)
    return batch


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    "A family's name and its student."
    family, mixer, init = request.param
    return family, hybrid(teacher_of(family), mixer=mixer, init=init)


# The conversion


@torch.no_grad()
def test_nothing_replaced_is_the_teacher(family):
    teacher, batch = teacher_of(family), batch_of(family)
    student = to_hybrid(teacher, attention_layers=[0, 1, 2, 3])
    assert type(student) is HYBRIDS[family] and not mixer_parameters(student)
    assert torch.equal(student(**batch).logits, teacher(**batch).logits)
    assert torch.equal(student.generate(**batch, **HOW), teacher.generate(**batch, **HOW))


@pytest.mark.parametrize("mixer", MIXERS)
def test_everything_but_the_mixers_is_the_teachers(family, mixer):
    teacher, random_state = tiny.teacher(family), torch.random.get_rng_state()
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    student = to_hybrid(teacher, mixer=mixer)
    assert torch.equal(random_state, torch.random.get_rng_state())
    mixers, transferred, theirs = mixer_parameters(student), transferred_parameters(student), teacher.state_dict()
    assert before.keys() == theirs.keys() and all(torch.equal(before[name], p) for name, p in theirs.items())
    for name, p in student.state_dict().items():
        if name not in mixers or name in transferred:
            assert torch.equal(p, theirs[name]) and p.dtype == theirs[name].dtype, name
            assert p.data_ptr() != theirs[name].data_ptr(), name
        assert p.isfinite().all(), name
    for (name, a), (_, b) in zip(student.named_buffers(), teacher.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    leaves = lambda names: sorted(name.split("self_attn.")[1] for name in names if ".layers.0." in name)
    kinds = ("bias", "weight") if family == "glm4v" else ("weight",)
    assert leaves(transferred) == sorted(["o_proj.weight", *(f"{p}_proj.{kind}" for p in "qkv" for kind in kinds)])
    rates = dict(mamba2=["D", "dt_proj.weight"], gdn=["a_proj.weight", "b_proj.weight"])[mixer]
    new = ["A_log", "conv_weight", "dt_bias", "g_proj.weight", "norm.weight", *rates]
    assert leaves(mixers.keys() - set(transferred)) == sorted(new)
    norms = {f"model.language_model.layers.{i}.self_attn.{p}_norm.weight" for i in range(3) for p in "qk"}
    assert theirs.keys() - student.state_dict().keys() == (set() if family == "glm4v" else norms)


@pytest.mark.parametrize("mixer", MIXERS)
def test_query_and_key_norms_are_kept_where_there_are_any(family, mixer):
    student = to_hybrid(teacher_of(family), mixer=mixer, init="identity")
    keeps = family != "glm4v"
    assert student.config.text_config.mixer_config["qk_norm"] is keeps
    assert any("q_norm" in name for name in transferred_parameters(student)) is keeps
    if not keeps:
        with pytest.raises(
            ValueError, match="qk_norm is True, but the attention of hybrid_glm4v_text has no q_norm and k_norm to keep"
        ):
            to_hybrid(teacher_of(family), mixer=mixer, qk_norm=True)


class Adapter(nn.Module):
    "A linear layer as PEFT wraps it."

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.lora_A = base_layer, nn.Linear(base_layer.in_features, 2)


def adapt(model, index):
    attention = family_of(model).layers(model)[index].self_attn
    attention.v_proj = Adapter(attention.v_proj)


def compile_decoder(model):
    model.model.language_model = torch.compile(model.model.language_model)


def quantise(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    "change, message",
    [
        (compile_decoder, "the teacher is compiled"),
        (lambda model: adapt(model, 3), "unlike its class; .* unload its adapters"),
        (lambda model: cpu_offload(model, execution_device="cpu"), "is on meta, offloaded or not loaded"),
        (lambda model: model.lm_head.to("meta") and None, "lm_head.weight is on meta"),
        (quantise, "lm_head.weight is a Parameter of torch.int8"),
    ],
    ids=["compiled decoder", "adapter", "offloaded", "meta head", "quantised"],
)
def test_a_teacher_that_is_not_whole_is_refused(family, change, message):
    teacher = copy.deepcopy(teacher_of(family))
    changed = change(teacher)
    fails(message, to_hybrid, teacher if changed is None else changed)


def test_a_hybrid_keeps_attention_somewhere(family):
    config = hybrid_config(tiny.config(family)).to_dict()
    of_text = lambda **fields: config | dict(text_config=config["text_config"] | fields)
    for fields in (dict(layer_types=4 * ["linear_attention"]), dict(num_hidden_layers=3, layer_types=None)):
        fails("none of the [34] layers keeps attention", HYBRIDS[family].config_class, **of_text(**fields))
    for layers in range(4):
        fails(f"{layers} layers can't be split 3:1", hybrid_config, tiny.config(family, layers))


# Inside transformers


@pytest.mark.parametrize("side", ["left", "right", "inside"])
@torch.no_grad()
def test_padding_equals_single_samples(case, side):
    family, student = case
    assert student.get_input_embeddings().weight[0].abs().max() > 0.1  # the padding's embedding is not zero
    batch = batch_of(family, side=side)
    logits = student(**batch).logits
    for row, mask, sample in zip(logits, batch["attention_mask"].bool(), tiny.samples(family)):
        alone = student(**batch_of(family, [sample], "left" if side == "right" else side)).logits[0]
        assert_close(row[mask], alone, atol=5e-4, rtol=1e-3)
    if side == "left":  # where a state that padding wrote to would show
        unmasked = student(**batch | dict(attention_mask=torch.ones_like(batch["attention_mask"]))).logits
        assert (unmasked - logits)[0, -1].abs().max() > 1e-2


@pytest.mark.parametrize("how", [dict(), dict(num_beams=2, cache_implementation="static")], ids=str)
@torch.no_grad()
def test_generation_with_a_cache_is_generation_without(case, how):
    (family, student), how = case, HOW | how | dict(output_scores=True, return_dict_in_generate=True)
    batch = batch_of(family)
    cached = student.generate(**batch, **how)
    how.pop("cache_implementation", None)
    plain = student.generate(**batch, **how, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.scores, plain.scores):
        assert_close(a, b, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "side, how",
    [
        ("left", dict(num_beams=3)),
        ("inside", dict()),
        ("inside", dict(cache_implementation="static")),
        ("inside", dict(prefill_chunk_size=7)),
    ],
    ids=str,
)
@torch.no_grad()
def test_batched_generation_equals_single_samples(case, side, how):
    (family, student), how = case, HOW | how

    def new(samples):
        batch = batch_of(family, samples, side)
        batch.pop("position_ids", None)  # generate makes its own
        return student.generate(**batch, **how)[:, -HOW["max_new_tokens"] :]

    assert torch.equal(new(tiny.samples(family)), torch.cat([new([sample]) for sample in tiny.samples(family)]))


@pytest.mark.parametrize("size", [1, 3])
@torch.no_grad()
def test_chunked_prefill(case, size):
    "Left-padded prompts in pieces, some of which are padding alone for a row."
    family, student = case
    batch = batch_of(family, [("what is a total?", []), ("tax?", [])])
    positions = positions_of(batch)
    cache, pieces = DynamicCache(config=student.config), []
    for start in range(0, 16, size):
        piece = slice(start, start + size)
        out = student(
            input_ids=batch["input_ids"][:, piece],
            attention_mask=batch["attention_mask"][:, : piece.stop],
            position_ids=positions[:, piece],
            past_key_values=cache,
            use_cache=True,
        )
        pieces.append(out.logits)
    real = batch["attention_mask"].bool()
    assert_close(
        torch.cat(pieces, 1)[real], student(**batch, position_ids=positions).logits[real], atol=1e-3, rtol=1e-3
    )
    assert torch.equal(student.generate(**batch, **HOW, prefill_chunk_size=size), student.generate(**batch, **HOW))


TEXTS = ["what is a total?", "tax", "of it, or of them all?", "x"]


def packed(family, texts=TEXTS):
    "Rows of packed texts as a padding-free collator makes them: tokens, positions that start anew, ends."
    rows = [PROCESSORS[family].tokenizer(text).input_ids for text in texts]
    return DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")(
        [dict(input_ids=row) for row in rows]
    )


@pytest.mark.parametrize("how", ["text positions", "ends", "collator", "two rows"])
@torch.no_grad()
def test_packed_texts_equal_single_texts(case, how):
    (family, student), batch = case, packed(case[0])
    ids, positions, ends = batch["input_ids"], batch["position_ids"], batch["cu_seq_lens_q"]
    length, order = ids.shape[1], torch.arange(ids.shape[1])
    if how == "text positions" and family not in ("qwen3_vl", "glm4v"):
        pytest.skip("positions have one axis")
    if how == "two rows":  # the other begins with the second half
        order = order.roll(-int(ends[2]))
        positions = torch.cat([positions[:, order], positions])
    given = {
        "text positions": dict(position_ids=torch.cat([positions[:1, None], torch.arange(length).expand(3, 1, -1)])),
        "ends": dict(cu_seq_lens_q=ends, attention_mask=torch.ones_like(ids)),
        "collator": {k: v for k, v in batch.items() if k not in ("input_ids", "labels")},
        "two rows": dict(position_ids=positions),
    }[how]
    logits = student(input_ids=torch.cat([ids[:, order], ids]) if how == "two rows" else ids, **given).logits
    assert_close(logits[0][order.argsort()], logits[-1], atol=1e-4, rtol=1e-3)
    for text, row in zip(TEXTS, logits[-1].split(ends.diff().tolist())):
        alone = student(**PROCESSORS[family](text=[text], return_tensors="pt")).logits[0]
        assert_close(row, alone, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_packed_pages_equal_single_ones(case):
    "Also where their positions have three axes and go on from one to the next."
    family, student = case
    samples = [tiny.samples(family)[i] for i in (1, 0, 2)]
    alone = [batch_of(family, [sample]) for sample in samples]
    batch = {
        k: torch.cat([b[k] for b in alone if k in b], 1 if k in ("input_ids", "mm_token_type_ids") else 0)
        for k in alone[0]
        if k != "attention_mask"
    }
    ends = torch.tensor([0, *(b["input_ids"].shape[1] for b in alone)]).cumsum(0)
    for row, single in zip(student(**batch, cu_seq_lens_q=ends).logits[0].split(ends.diff().tolist()), alone):
        assert_close(row, student(**single).logits[0], atol=5e-4, rtol=1e-3)


@torch.no_grad()
def test_a_page_is_one_sequence(case):
    "Positions of images, which stand still and go back, are not mistaken for packed sequences."
    family, student = case
    batch = batch_of(family, tiny.samples(family)[2:3])
    inputs = {k: v for k, v in batch.items() if k != "attention_mask"}
    assert torch.equal(student(**inputs, use_cache=False).logits, student(**batch).logits)
    generated = student.generate(**inputs, **HOW)
    assert torch.equal(generated, student.generate(**batch, **HOW)) and torch.equal(
        generated, student.generate(**inputs, **HOW, use_cache=False)
    )


def test_bad_packing(family):
    student, batch = to_hybrid(teacher_of(family)), packed(family)
    ids, ends = batch["input_ids"], batch["cu_seq_lens_q"]
    padded = torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)
    for given in (dict(attention_mask=padded), dict(past_key_values=DynamicCache(config=student.config))):
        refused = "packed sequences .* without padding and without a cache"
        fails(refused, student, input_ids=ids, cu_seq_lens_q=ends, **given)
    ends, message = torch.tensor([0, 16, 19, 43]), r"cu_seq_lens_q rises from 0 to 42, got \[0, 16, 19, 43\]"
    fails(message, student, input_ids=ids, cu_seq_lens_q=ends)


@pytest.mark.parametrize("kind, side", [(torch.bool, "left"), (torch.float32, "inside")], ids=str)
@torch.no_grad()
def test_a_4d_mask_is_read_or_refused(case, kind, side):
    family, student = case
    batch = batch_of(family, [("what is a total?", []), ("tax?", [])], side)
    real, given = batch["attention_mask"].bool(), dict(input_ids=batch["input_ids"], position_ids=positions_of(batch))
    seen = real[:, None, None] & torch.ones(2 * real.shape[1:], dtype=torch.bool).tril()

    def logits(mask):
        if kind != torch.bool and mask.ndim == 4:  # added to the scores
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(kind).min)
        return student(**given, attention_mask=mask).logits[real]

    for mask in (seen, seen & real[:, None, :, None]):
        assert_close(logits(mask), logits(batch["attention_mask"]), atol=1e-4, rtol=1e-3)
    blocks = seen.clone()
    blocks[0, :, 8:, :8] = False  # two sequences
    for mask in (blocks, seen.mT):
        fails("mixers need a 4-D attention mask that is causal apart from padding", logits, mask)


@pytest.mark.parametrize("who", ["teacher", "student"])
@torch.no_grad()
def test_what_trainers_and_offloading_ask_for(family, who):
    teacher, batch = teacher_of(family), batch_of(family)
    model = teacher if who == "teacher" else hybrid(teacher)
    assert find_labels(type(model)) == ["labels"]
    logits = model(**batch).logits
    hidden = model.base_model(**batch)
    assert model.base_model is not model
    assert model.get_decoder() is family_of(model).decoder(model) is model.base_model.get_decoder()
    assert torch.equal(model.get_output_embeddings()(hidden.last_hidden_state), logits) and torch.equal(
        model(**batch, return_dict=False)[0], logits
    )
    if family == "glm4v":
        return  # its tower, the library's own, reads a weight past its module
    model = copy.deepcopy(model)
    offloaded = cpu_offload(model, execution_device="cpu")
    assert any(p.is_meta for p in model.parameters()) and torch.equal(offloaded(**batch).logits, logits)


AUTO = {
    modeling_auto: {"MODEL_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_MULTIMODAL_LM_MAPPING"},
    processing_auto: {"PROCESSOR_MAPPING"},
    tokenization_auto: {"TOKENIZER_MAPPING"},
    image_processing_auto: {"IMAGE_PROCESSOR_MAPPING"},
}


def test_the_auto_classes_know_a_hybrid_where_they_know_its_teacher(family):
    "Of the decoder alone: without a head and with the language model's."
    config = tiny.config(family)
    student = hybrid_config(config)
    pairs = [(config, student), (config.text_config, student.text_config)]
    for module, expected in AUTO.items():
        mappings = {name: m for name, m in vars(module).items() if isinstance(m, _LazyAutoMapping)}
        found = set()
        for name, mapping in mappings.items():
            decoders = name in ("MODEL_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING", "TOKENIZER_MAPPING")
            for theirs, ours in pairs[: 1 + decoders]:
                if type(theirs) in mapping:
                    assert type(ours) in mapping, name
                    found.add(name)
        assert found >= expected


# Saving and loading

LOAD = """
import sys, torch, heed_nb
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers import AutoTokenizer, pipeline
how = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, suppress_tokens=[1, 2, 3, 4])
for folder in sys.argv[1:]:
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    texts, images = torch.load(folder + "/samples.pt", weights_only=False)
    batch = processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad(): out = dict(logits=model(**batch).logits, generated=model.generate(**batch, **how))
    autos = AutoImageProcessor, AutoModelForMultimodalLM, AutoTokenizer
    out.update(state=model.state_dict(), types=model.config.text_config.layer_types)
    out.update(names=[type(model).__name__, type(processor).__name__],
               others=[type(auto.from_pretrained(folder)).__name__ for auto in autos])
    chat = [dict(role="user", content=[dict(type="image", image=images[0]), dict(type="text", text="read it")])]
    answer = pipeline("image-text-to-text", model=folder)
    (said,) = answer(text=chat, return_full_text=False, max_new_tokens=2, do_sample=False)
    assert isinstance(said["generated_text"], str), said
    torch.save(out, folder + "/out.pt")
"""


def test_loads_in_a_new_process(tmp_path):
    students = {}
    for family, mixer, dtype in [
        *((family, mixer, torch.float32) for family, mixer in zip(FAMILIES, 2 * [*MIXERS])),
        ("glm4v", "mamba2", torch.bfloat16),
    ]:
        folder = tmp_path / f"{family}-{mixer}-{dtype}"
        teacher = tiny.teacher(family)
        for p in teacher.parameters():
            p.data = p.data.to(dtype)  # as from_pretrained makes it: rotary frequencies stay in float32
        students[folder] = (
            family,
            hybrid(teacher, mixer=mixer, attention_layers=[1, 2], norm="gate_then_norm", conv_kernel=3),
        )
        students[folder][1].save_pretrained(folder)
        PROCESSORS[family].save_pretrained(folder)
        samples = tiny.samples(family)
        torch.save(
            ([text for text, _ in samples], [image for _, images in samples for image in images]), folder / "samples.pt"
        )
    subprocess.run([sys.executable, "-c", LOAD, *map(str, students)], check=True)
    for folder, (family, student) in students.items():
        loaded, batch = torch.load(folder / "out.pt"), batch_of(family)
        assert loaded["names"] == [type(student).__name__, family_class(family).processor_class.__name__]
        assert loaded["others"] == [
            type(PROCESSORS[family].image_processor).__name__,
            type(student).__name__,
            "TokenizersBackend",
        ]
        assert loaded["types"] == student.config.text_config.layer_types
        assert loaded["state"].keys() == student.state_dict().keys()
        for name, p in student.state_dict().items():
            assert torch.equal(p, loaded["state"][name]) and p.dtype == loaded["state"][name].dtype, name
        with torch.no_grad():
            assert torch.equal(student(**batch).logits, loaded["logits"])
            assert torch.equal(student.generate(**batch, **HOW), loaded["generated"])


IMPORTS = """
import sys, {module}, heed_nb
assert ("transformers" in sys.modules) == {heavy}, "transformers"
assert ("heed_nb.hybrid" in sys.modules) == {heavy}, "registered too early"
from transformers import AutoConfig
assert AutoConfig.for_model("hybrid_qwen3_vl").text_config.layer_types
assert heed_nb.hybrid is sys.modules["heed_nb.hybrid"]
assert not any(type(finder).__module__ == "heed_nb" for finder in sys.meta_path)
"""


@pytest.mark.parametrize("module, heavy", [("heed_nb.conditions", False), ("transformers", True)])
def test_any_import_of_the_package_registers_its_models(module, heavy):
    "At the cost of transformers only where that is imported anyway."
    subprocess.run([sys.executable, "-c", IMPORTS.format(module=module, heavy=heavy)], check=True)


def test_the_packages_names():
    promised = "to_hybrid distill evaluate CONDITIONS patch_density position_weights load_teacher Sample collate"
    assert set(heed_nb.__all__) >= {*promised.split(), "TrainSettings"}
    assert set(heed_nb.__all__) < set(dir(heed_nb))
    assert heed_nb.to_hybrid is to_hybrid and heed_nb.CONDITIONS is CONDITIONS and heed_nb.load_teacher is load_teacher
    for name in heed_nb.__all__:
        assert name == "CONDITIONS" or callable(getattr(heed_nb, name)), name
    from heed_nb import evaluate  # the module, whoever imported it first, and its function

    fails("unknown suite 'all'", evaluate, "a folder", suite="all")
    assert "suite" in inspect.signature(evaluate).parameters and evaluate.anls
    with pytest.raises(AttributeError, match="module 'heed_nb' has no attribute 'nothing'"):
        heed_nb.nothing


# Training


@torch.no_grad()
def test_teacher_path_is_the_teacher(family):
    teacher = tiny.teacher(family)
    student, batch = hybrid(teacher), batch_of(family)
    logits, generated = student(**batch).logits, teacher.generate(**batch, **HOW)
    pair_with_teacher(student, teacher)
    with teacher_path(student):
        assert torch.equal(student(**batch).logits, teacher(**batch).logits)
        assert torch.equal(student.generate(**batch, **HOW), generated)
        assert torch.equal(student.generate(**batch, **HOW, cache_implementation="static"), generated)
    assert torch.equal(student(**batch).logits, logits)


@torch.no_grad()
def test_hooks_read_residuals_and_attention_outputs(case):
    "Hidden state i + 1 is layer i's output, but where DeepStack adds; attention's target is W_O's, before any norm."
    name, student = case
    family = family_of(student)
    inputs = family.language_inputs(student, batch_of(name))
    decoder = family.decoder(student)
    layers = family.layers(student)
    with (
        record_outputs(layers) as residuals,
        record_outputs(layer.self_attn for layer in layers) as attention,
        record_outputs(layer.self_attn.o_proj for layer in layers) as projected,
    ):
        out = decoder(**inputs.kwargs, output_hidden_states=True)
    for i in range(1 if name == "qwen3_vl" else 0, 3):
        assert torch.equal(out.hidden_states[i + 1], residuals[i])
    assert torch.equal(decoder.norm(residuals[3]), out.last_hidden_state)
    for a, b in zip(attention, projected):
        assert torch.equal(a, b)
    replaced = replaced_layers(student)
    assert all(torch.equal(a, b) for a, b in zip(aligned_outputs(decoder, inputs, replaced, "residual"), residuals))
    assert all(
        torch.equal(a, b) for a, b in zip(aligned_outputs(decoder, inputs, replaced, "attention_output"), attention)
    )


def conversation(family):
    "Two pages under two questions, a page, text alone."
    pages = [image for _, images in tiny.samples(family) for image in images]
    return [
        Sample("two", pages[1:3], [("which?", "the first"), ("why?", "é1")]),
        Sample("one", pages[:1], [("total?", "417")]),
        Sample("none", [], [("rose", "a rose")]),
    ]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_reaches_every_mixer_and_nothing_else(family, mixer, stage):
    teacher = tiny.teacher(family)
    student, batch = to_hybrid(teacher, mixer=mixer), collate(conversation(family), PROCESSORS[family])
    with torch.no_grad():
        before = teacher(**batch.model_inputs).logits
    pair_with_teacher(student, teacher)
    settings = TrainSettings(token_budget=1000)
    loss = step_loss(stage, student, family_of(student), batch, CONDITIONS["C4"], settings)["loss"]
    loss.backward()
    assert loss.isfinite() and loss > 0
    mixers = mixer_parameters(student)
    assert {name for name, p in student.named_parameters() if p.grad is not None} == mixers.keys()
    assert all(p.grad.any() for p in mixers.values())
    with torch.no_grad(), teacher_path(student):
        assert torch.equal(student(**batch.model_inputs).logits, before)


# The paper's size


@pytest.mark.parametrize(
    "name, teacher_billions",
    [("qwen3-vl-8b", 8.767), ("internvl-3.5-8b", 8.528), ("glm-4.6v-flash", 10.293), ("minicpm-v-4.5", 8.696)],
)
def test_the_papers_teachers_and_their_hybrids_have_their_size(name, teacher_billions):
    config = paper_config(name)
    with torch.device("meta"):
        teacher = AutoModelForImageTextToText.from_config(config)
    hybrids = {}
    for mixer in MIXERS:
        with torch.device("meta"):
            hybrids[mixer] = HYBRIDS[config.model_type]._from_config(hybrid_config(config, mixer=mixer))
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert round(count(teacher) / 1e9, 3) == teacher_billions
    text = config.text_config
    layers, h, d = text.num_hidden_layers * 3 // 4, text.num_attention_heads, 4096
    conv = 4 * 128 * (h + 2 * text.num_key_value_heads)
    qk_norm = 2 * 128 if config.model_type != "glm4v" else 0
    gate_and_dt = d * d + d * h
    assert count(hybrids["mamba2"]) - count(teacher) == layers * (gate_and_dt + conv + 3 * h + 128 - qk_norm)
    assert count(hybrids["gdn"]) - count(teacher) == layers * (gate_and_dt + d * h + conv + 2 * h + 128 - qk_norm)
    assert {"qwen3_vl": 457, "internvl": 457, "glm4v": 507, "minicpmv": 457}[config.model_type] == round(
        layers * gate_and_dt / 1e6
    )
    theirs = {name: p.shape for name, p in teacher.named_parameters()}
    kept = {name: p.shape for name, p in hybrids["mamba2"].named_parameters()}
    assert all(kept[name] == shape for name, shape in theirs.items() if name in kept)


# Faults. One line each, before anything is computed.


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_unknown_layer_types_are_named(family, tmp_path):
    student = to_hybrid(teacher_of(family))
    student.save_pretrained(tmp_path / "student")
    PROCESSORS[family].save_pretrained(tmp_path / "student")
    config = tmp_path / "student" / "config.json"
    for types, message in (
        (
            ["linear_attention"] * 3 + ["sparse_attention"],
            "unknown layer type 'sparse_attention'; one of linear_attention, full_attention",
        ),
        (["full_attention"] * 3, "layer_types names 3 layers, num_hidden_layers is 4"),
    ):
        change(config, text_config=json.loads(config.read_text())["text_config"] | dict(layer_types=types))
        fails(message, load_teacher, tmp_path / "student")
        fails(message, AutoModelForImageTextToText.from_pretrained, tmp_path / "student")


def test_decoders_that_are_not_supported_are_named(tmp_path):
    config = tiny.config("internvl")
    config.text_config.layer_types = ["full_attention"] * 3 + ["sliding_attention"]
    fails("unsupported teacher with layers of sliding_attention; only full_attention", hybrid_config, config)
    config.text_config.layer_types[3] = "unheard_of"
    teacher_of("internvl").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    fails(
        "config.json in .* can't be used: .*unheard_of|config.json in .* can't be used: .*layer_types",
        load_teacher,
        tmp_path,
    )
    change(tmp_path / "config.json", text_config=dict(model_type="qwen2"))
    fails(
        "config.json in .* can't be used: unsupported decoder 'qwen2' of internvl; only qwen3", load_teacher, tmp_path
    )
    change(tmp_path / "config.json", model_type="llava")
    fails("unsupported model type 'llava'; one of qwen3_vl, ", load_teacher, tmp_path)
    config = tiny.config("glm4v")
    config.model_type = "glm4v_moe"
    fails("unsupported teacher 'glm4v_moe'; one of qwen3_vl, internvl, glm4v", hybrid_config, config)
