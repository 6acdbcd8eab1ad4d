"The hybrid: its conversion, gradients, weights on disk, the pair with its teacher (the rest: test_families)."

import copy

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, DynamicCache

import tiny
from heed_nb.hybrid import mixer_parameters, to_hybrid, transferred_parameters
from heed_nb.mixers import MIXERS, Mamba2Mixer
from heed_nb.streams import pair_with_teacher, teacher_path, unpair
from test_families import hybrid
from tiny import fails

torch.set_num_threads(1)
kinds = pytest.mark.parametrize("kind", MIXERS)


@pytest.fixture(scope="module")
def teacher():
    return tiny.teacher("qwen3_vl")


@pytest.fixture(scope="module")
def batch():
    return tiny.batch_of(tiny.samples("qwen3_vl"), tiny.processor("qwen3_vl"))


def in_bfloat16(model):
    "As from_pretrained makes it: parameters alone, rotary frequencies stay in float32."
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16)
    return model


@pytest.fixture(scope="module")
def paper_student(teacher):
    return hybrid(teacher)


# The conversion


def test_conversion_is_deterministic(teacher):
    a, b, c = (mixer_parameters(to_hybrid(teacher, seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)
    layers = [a[f"model.language_model.layers.{i}.self_attn.g_proj.weight"] for i in range(3)]
    assert not torch.equal(layers[0], layers[1])


@kinds
def test_without_weight_transfer_the_mixers_alone_are_random(kind, teacher):
    inherited, student = (
        to_hybrid(teacher, mixer=kind, init="identity", seed=1, weight_transfer=transfer) for transfer in (True, False)
    )
    mixers, transferred, theirs = mixer_parameters(student), transferred_parameters(student), teacher.state_dict()
    for name, p in student.state_dict().items():
        if name not in transferred:
            assert p.equal(inherited.state_dict()[name]), name
        elif "norm" in name:
            assert torch.equal(p, torch.ones_like(p))
        else:
            assert 0 < p.abs().max() <= 0.04 and 0.015 < p.std() < 0.02 and not p.equal(theirs[name]), name
    again = to_hybrid(teacher, mixer=kind, init="identity", seed=1, weight_transfer=False)
    assert all(p.equal(mixer_parameters(again)[name]) for name, p in mixers.items())


def test_layers_by_index_keep_attention():
    student = to_hybrid(tiny.teacher("qwen3_vl", layers=8), attention_layers=[7, 1])
    layers = student.model.language_model.layers
    assert [i for i, layer in enumerate(layers) if not isinstance(layer.self_attn, Mamba2Mixer)] == [1, 7]
    types = student.config.text_config.layer_types
    assert [i for i, kind in enumerate(types) if kind == "full_attention"] == [1, 7]


def test_bad_conversions(teacher, paper_student):
    refused = lambda message, model=teacher, **kwargs: fails(message, to_hybrid, model, **kwargs)
    refused("unknown init 'zeros'; one of paper, mamba, identity", init="zeros")
    refused("Field 'mixer' expected str, got NoneType", mixer=None)
    refused("Field 'mixer_init' expected str, got int", init=7)
    refused("attention_layers is 'middle'; 'last', 'first' or a list", attention_layers="middle")
    refused("attention_layers is 3; 'last', 'first' or a list", attention_layers=3)
    for layers in ([-1], [1, 1], []):
        refused("attention_layers is .*; one or more different indices from 0 to 3", attention_layers=layers)
    refused("unsupported teacher 'hybrid_qwen3_vl'; one of qwen3_vl", paper_student)
    refused("unsupported teacher 'Linear'; one of qwen3_vl", torch.nn.Linear(2, 2))


# Inside transformers


def gradients(student, batch):
    student.zero_grad()
    student(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@kinds
def test_gradient_checkpointing_gives_the_same_gradients(teacher, batch, kind):
    student, batch = hybrid(teacher, mixer=kind).train(), dict(batch, use_cache=False)
    plain = gradients(student, batch)
    student.activation_checkpointing_enable()
    checkpointed = gradients(student, batch)
    assert plain.keys() == checkpointed.keys() >= mixer_parameters(student).keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@kinds
def test_compiles_as_one_graph(kind):
    torch._dynamo.reset()
    decoder = hybrid(tiny.teacher("qwen3_vl", layers=2), mixer=kind, attention_layers=[1]).model.language_model
    embeds = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 3 + [0] * 4 + [1] * 2])

    def run(f):
        x = embeds.clone().requires_grad_()
        y = f(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
        (y * mask[..., None]).square().sum().backward()
        return y.detach()[mask.bool()], x.grad

    for a, b in zip(run(torch.compile(decoder, backend="aot_eager", fullgraph=True)), run(decoder)):
        assert_close(a, b, atol=1e-4, rtol=1e-3)


@torch.no_grad()
@kinds
def test_bfloat16(batch, kind):
    student = hybrid(in_bfloat16(tiny.teacher("qwen3_vl")), mixer=kind)
    kept = {name.split(".", 3)[3] for name, p in student.named_parameters() if p.dtype == torch.float32}
    assert kept == {f"{i}.self_attn.{p}" for i in range(3) for p in ("A_log", "dt_bias", *["D"] * (kind == "mamba2"))}
    cache = DynamicCache(config=student.config)
    logits = student(**batch, past_key_values=cache, use_cache=True).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert cache.get_recurrent_state(0).dtype == torch.float32 and cache.get_conv_state(0).dtype == torch.bfloat16
    float32 = copy.deepcopy(student).float()
    real = batch["attention_mask"].bool()
    expected = float32(**batch).logits[real]
    assert (logits.float()[real] - expected).norm() < dict(mamba2=0.1, gdn=0.15)[kind] * expected.norm()


# Saving and loading


@pytest.mark.parametrize("family", ["qwen3_vl", "minicpmv"])
def test_tied_embeddings_stay_tied(family, tmp_path):
    teacher = tiny.teacher(family)
    teacher.config.tie_word_embeddings = True
    teacher.tie_weights()
    for model in (teacher, to_hybrid(teacher)):
        assert model.lm_head.weight is model.get_input_embeddings().weight
        model.save_pretrained(tmp_path)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_missing_tensor_is_an_error(paper_student, tmp_path):
    "Where its caller asks for the list of missing tensors instead, that one starts and the others are loaded."
    paper_student.save_pretrained(
        tmp_path,
        state_dict={k: v for k, v in paper_student.state_dict().items() if not k.endswith("0.self_attn.A_log")},
    )
    message = "do not fit its config.json: 1 tensors are missing or of another shape, first .*layers.0.self_attn.A_log"
    with pytest.raises(ValueError, match=message):
        AutoModelForImageTextToText.from_pretrained(tmp_path)
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"model.language_model.layers.0.self_attn.A_log"}
    for name, p in mixer_parameters(paper_student).items():
        assert torch.equal(p, loaded.state_dict()[name]) != name.endswith("0.self_attn.A_log"), name


# Teacher and student in one


@pytest.fixture
def pair():
    teacher = tiny.teacher("qwen3_vl")
    return hybrid(teacher), teacher


def test_teacher_path_leaves_the_students_graph_alone(pair, batch):
    student, teacher = pair
    loss = lambda: student(**batch, labels=batch["input_ids"]).loss
    loss().backward()
    expected = {name: p.grad.clone() for name, p in mixer_parameters(student).items()}
    student.zero_grad()
    pair_with_teacher(student, teacher)
    alive = loss()
    with teacher_path(student), torch.no_grad():
        student(**batch)
    alive.backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in mixer_parameters(student).items())
    assert all(p.grad is None for p in teacher.parameters())


def test_teacher_path_ends_on_an_error_and_nests(pair):
    student, teacher = pair
    pair_with_teacher(student, teacher)
    types, mixers = student.config.text_config.layer_types, mixer_parameters(student)
    with pytest.raises(ZeroDivisionError):
        with teacher_path(student), teacher_path(student):
            1 / 0
    assert student.config.text_config.layer_types == types and mixer_parameters(student).keys() == mixers.keys()
    assert isinstance(student.model.language_model.layers[0].self_attn, Mamba2Mixer)


@pytest.mark.parametrize("how", ["paired", "unpaired"])
def test_a_saved_student_carries_no_teacher(pair, batch, tmp_path, how):
    student, teacher = pair
    names = set(student.state_dict())
    pair_with_teacher(student, teacher)
    with torch.no_grad():
        logits = student(**batch).logits
    if how == "unpaired":
        assert unpair(student) is student and set(student.state_dict()) == names
        with pytest.raises(ValueError, match="the student has no teacher"):
            with teacher_path(student):
                pass
    student.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        assert set(f.keys()) == names
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, logits)
    pair_with_teacher(loaded, teacher)
    with torch.no_grad(), teacher_path(loaded):
        assert torch.equal(loaded(**batch).logits, teacher(**batch).logits)


def test_a_different_teacher_is_refused(pair):
    student, teacher = pair
    with torch.no_grad():
        teacher.model.language_model.layers[2].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(
        ValueError, match=r"model\.language_model\.layers\.2\.mlp\.up_proj\.weight differs from the teacher's"
    ):
        pair_with_teacher(student, teacher)
    assert not hasattr(student.model.language_model.layers[0], "teacher_attn") and all(
        p.requires_grad for p in teacher.parameters()
    )
