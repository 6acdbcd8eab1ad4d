"The losses of the stages: what each condition makes of one batch, and Eq. 7, forcing and matrices in all families."

from dataclasses import replace
from itertools import combinations

import pytest
import torch

import tiny
from heed_nb import losses, objective, streams
from heed_nb.conditions import CONDITIONS, TrainSettings
from heed_nb.density import position_weights
from heed_nb.hybrid import to_hybrid
from heed_nb.objective import step_loss
from heed_nb.samples import Batch
from heed_nb.streams import pair_with_teacher, teacher_path
from heed_nb.teachers import family_of

SETTINGS = TrainSettings(token_budget=1)


def paired(family):
    "A student beside its teacher, its kind, its replaced layers, a batch and what its decoder reads of it."
    teacher, inputs = tiny.teacher(family), tiny.batch_of(tiny.samples(family), tiny.processor(family))
    model = pair_with_teacher(to_hybrid(teacher), teacher).train().requires_grad_(False)
    kind = family_of(model)
    language = kind.language_inputs(model, inputs)
    labels = inputs["input_ids"].masked_fill(language.visual_mask, -100)
    labels[:, :-3] = -100
    return model, kind, streams.replaced_layers(model), Batch(inputs, labels, list("abcd")), language


@pytest.fixture(scope="module")
def pair():
    return paired("qwen3_vl")


def stage_2(pair, condition, **changes):
    model, kind, _, batch, _ = pair
    return step_loss(2, model, kind, batch, CONDITIONS[condition], replace(SETTINGS, **changes))["loss"].item()


def test_conditions_differ_in_the_alignment_stages(pair):
    names = "C2 C3 C4 C4-shuffled -Density -Residual C5 +LD +SL mask-25 random-25 C3-forced MaTVLM mmMamba".split()
    assert len({stage_2(pair, name) for name in names}) == len(names)


def test_weights_without_contrast_are_uniform(pair):
    "C5 and +LD tempered away, and C4 at an endless temperature, have C3's loss."
    uniform = pytest.approx(stage_2(pair, "C3"), rel=1e-5)
    flat = stage_2(pair, "C5", temper=0.0), stage_2(pair, "+LD", temper=0.0), stage_2(pair, "C4", tau=1e9)
    assert flat == (uniform,) * 3 and stage_2(pair, "C5") != pytest.approx(uniform.expected, rel=1e-2)


def aligned(monkeypatch, pair, conditions, settings=SETTINGS):
    "The targets and weights of each condition's alignment loss."
    model, kind, _, batch, _ = pair
    seen = []
    monkeypatch.setattr(objective, "residual_alignment", lambda found, targets, w, distance: seen.append((targets, w)))
    for condition in conditions:
        step_loss(2, model, kind, batch, CONDITIONS[condition], settings)
    return seen


@pytest.mark.parametrize("family", tiny.TINY)
def test_gradient_weights_of_a_step_are_eq_7(family, monkeypatch):
    "The risk differentiated with a hook on each aligned layer of the teacher; residuals of a pass without it."
    pair, teacher = paired(family), tiny.teacher(family)
    _, kind, _, batch, _ = pair
    (plain, _), *found = aligned(monkeypatch, pair, ("C3", "C5", "+LD", "+SL"))
    with losses.record_outputs(kind.layers(teacher)[:3]) as outputs:
        hidden = kind.decoder(teacher)(**kind.language_inputs(teacher, batch.model_inputs).kwargs).last_hidden_state
    logits = kind.lm_head(teacher)(hidden)[:, :-1]
    risk = sum(torch.nn.functional.cross_entropy(rows, labels) for rows, labels in zip(logits, batch.labels[:, 1:]))
    s = torch.stack([g.square().sum(-1) for g in torch.autograd.grad(risk, outputs)])
    for (targets, weights), expected in zip(found, (s.sum(0), s, s[1]), strict=True):
        expected = expected * (batch["attention_mask"].sum(-1) / expected.sum(-1))[..., None]
        torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(targets, plain)


def test_a_conditions_own_tau_and_beta_are_those_of_its_weights(pair, monkeypatch):
    "Each row of the sweep is Algorithm 1 with its number; what it leaves open is the settings', as all of C4's is."
    _, kind, _, batch, inputs = pair
    own = {"C4": {}, "tau-0.25": {"tau": 0.25}, "tau-1": {"tau": 1.0}}
    own |= {"beta-1": {"text_boost": 1.0}, "beta-4": {"text_boost": 4.0}}
    given, mask = dict(tau=0.7, text_boost=1.5), batch["attention_mask"]
    density, visual = kind.density(inputs, reduce=SETTINGS.reduce), inputs.visual_mask
    expected = [position_weights(density, visual, attention_mask=mask, **given | changed) for changed in own.values()]
    used = [weights for _, weights in aligned(monkeypatch, pair, own, replace(SETTINGS, **given))]
    torch.testing.assert_close(used, expected, rtol=0, atol=0)
    assert not any(one.allclose(other) for one, other in combinations(used, 2))


@pytest.mark.parametrize("family", tiny.TINY)
@pytest.mark.parametrize("alignment", ["residual", "attention_output", "head_output"])
@torch.no_grad()
def test_a_forced_student_reads_the_teachers_stream_in_each_layer(family, alignment):
    "Each replaced layer by itself, given what the teacher's layer was given."
    model, kind, layers, batch, inputs = paired(family)
    decoder, mask, given = kind.decoder(model), batch["attention_mask"], []
    keep = lambda module, args, kwargs: given.append((args, kwargs))
    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    with teacher_path(model), losses.record_inputs(layers) as stream:
        streams.aligned_outputs(decoder, inputs, layers, "residual")
    for hook in hooks:
        hook.remove()
    with streams.forced(layers, stream):
        found = streams.aligned_outputs(decoder, inputs, layers, alignment)
    for layer, (args, kwargs), ours in zip(layers, given, found):
        block = layer.self_attn
        module = {"residual": layer, "attention_output": block, "head_output": block.o_proj}[alignment]
        read = losses.record_inputs if alignment == "head_output" else losses.record_outputs
        with read([module]) as expected:
            layer(*args, **kwargs | {"linear_attention_mask": mask})
        torch.testing.assert_close(ours[mask.bool()], expected[0][mask.bool()])
    assert model.config.get_text_config().layer_types[:3] == ["linear_attention"] * 3
    free = streams.aligned_outputs(decoder, inputs, layers, alignment)
    torch.testing.assert_close(free[0], found[0])
    assert not torch.allclose(free[2][mask.bool()], found[2][mask.bool()], rtol=1e-2)


@pytest.mark.parametrize("family", tiny.TINY)
@torch.no_grad()
def test_the_matrix_of_each_familys_attention(family):
    "The library's own of an eager run, from a teacher that runs otherwise and stays as it was; 0 distance to itself."
    student, kind, layers, batch, inputs = paired(family)
    model, mask = tiny.teacher(family), batch["attention_mask"]
    with teacher_path(student):
        given = streams.attention_inputs(kind.decoder(student), inputs, layers)
    matrices = [streams.attention_matrix(layer.teacher_attn, g, mask) for layer, g in zip(layers, given)]
    assert layers[0].teacher_attn.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    expected = model(**batch.model_inputs, output_attentions=True).attentions[:3]
    for ours, theirs in zip(matrices, expected):
        assert ours.shape == (4, 4, mask.shape[1], mask.shape[1])
        for a, b, real in zip(ours, theirs, mask.bool()):
            torch.testing.assert_close(a[:, real][..., real], b[:, real][..., real])
    for layer, matrix in zip(layers, matrices):
        layer.self_attn.mixing_matrix = lambda *_, matrix=matrix: matrix
    assert streams.orientation_loss(layers, given, mask) == 0
