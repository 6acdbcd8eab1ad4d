"Eq. 7 on every family: one backward pass against a pass for each sample and autograd's own Jacobian."

import pytest
import torch
from torch.testing import assert_close

import tiny
from heed_nb.losses import answer_risk, record_outputs
from heed_nb.sensitivity import gradient_weights, residual_sensitivity
from heed_nb.teachers import family_of


def labelled(family, side, samples):
    batch = tiny.batch_of(samples, tiny.processor(family), side)
    labels, real = batch["input_ids"].clone(), batch["attention_mask"].bool()
    answer = real & (real.flip(1).cumsum(1).flip(1) <= 3)  # the last three tokens
    return batch, labels.masked_fill(~answer, -100)


def sensitivity_of(model, batch, labels, layers, **options):
    family = family_of(model)
    inputs = family.language_inputs(model, batch)
    risk = lambda: answer_risk(
        family.decoder(model)(**inputs.kwargs).last_hidden_state, family.lm_head(model), labels, **options
    )
    return residual_sensitivity([family.layers(model)[i] for i in layers], risk)


@pytest.mark.parametrize("family", tiny.TINY)
def test_a_batch_gives_what_each_sample_gives_alone(family):
    "Samples of four lengths, padded on either side, chunked or not: the library's loss of each, differentiated alone."
    model, layers, samples = tiny.teacher(family), (0, 1, 2), tiny.samples(family)
    rows = {}
    for side in ("left", "right"):
        batch, labels = labelled(family, side, samples)
        for chunk_size in (2, 1024):
            residuals, s = sensitivity_of(model, batch, labels, layers, chunk_size=chunk_size)
            assert s.shape == (3, *labels.shape) and not any(r.requires_grad for r in residuals)
            real = batch["attention_mask"].bool()
            assert s[:, ~real].abs().max() == 0
            rows[side, chunk_size] = [s[:, b, row] for b, row in enumerate(real)]
    for b, sample in enumerate(samples):
        batch, labels = labelled(family, "left", [sample])
        with record_outputs(family_of(model).layers(model)[i] for i in layers) as outputs:
            loss = model(**batch, labels=labels).loss
        expected = torch.stack([g[0].square().sum(-1) for g in torch.autograd.grad(loss, outputs)])
        for row in rows.values():
            assert_close(row[b], expected, rtol=1e-3, atol=1e-6 * expected.max().item())
    assert all(p.grad is None for p in model.parameters())


def test_the_residuals_are_those_of_a_pass_without_gradients_and_hooks_are_gone():
    model = tiny.teacher("qwen3_vl")
    batch, labels = labelled("qwen3_vl", "left", tiny.samples("qwen3_vl"))
    layers, family = family_of(model).layers(model), family_of(model)
    before = [dict(layer._forward_hooks) for layer in layers]
    residuals, _ = sensitivity_of(model, batch, labels, (1, 2))
    with torch.no_grad(), record_outputs(layers[1:3]) as outputs:
        family.decoder(model)(**family.language_inputs(model, batch).kwargs)
    assert all(r.equal(o) for r, o in zip(residuals, outputs))
    with pytest.raises(RuntimeError, match="no risk"):
        residual_sensitivity(layers[1:3], lambda: (_ for _ in ()).throw(RuntimeError("no risk")))
    assert [dict(layer._forward_hooks) for layer in layers] == before


def test_the_jacobian_of_the_risk():
    "The decoder run on from a residual that autograd's own Jacobian takes as its input."
    model = tiny.teacher("qwen3_vl")
    batch, labels = labelled("qwen3_vl", "left", tiny.samples("qwen3_vl")[1:2])
    family = family_of(model)
    inputs, layer = family.language_inputs(model, batch), family.layers(model)[1]
    run = lambda: answer_risk(family.decoder(model)(**inputs.kwargs).last_hidden_state, family.lm_head(model), labels)
    (residual,), s = residual_sensitivity([layer], run)

    def risk(moved):
        handle = layer.register_forward_hook(lambda *_: moved)
        try:
            return run().sum()
        finally:
            handle.remove()

    assert_close(s[0], torch.autograd.functional.jacobian(risk, residual).square().sum(-1))


def test_a_sample_without_an_answer_has_uniform_weights_and_leaves_the_others_alone():
    model, samples = tiny.teacher("qwen3_vl"), tiny.samples("qwen3_vl")[:2]
    batch, labels = labelled("qwen3_vl", "left", samples)
    whole = sensitivity_of(model, batch, labels, (0, 2))[1].sum(0)
    labels[0] = -100
    partial = sensitivity_of(model, batch, labels, (0, 2))[1].sum(0)
    assert partial[0].abs().max() == 0
    assert_close(partial[1], whole[1])
    mask = batch["attention_mask"]
    weights = gradient_weights(partial, mask)
    assert weights[0].equal(mask[0].float())
    assert_close(weights.sum(-1), mask.sum(-1).float())
    labels[1] = -100
    assert gradient_weights(sensitivity_of(model, batch, labels, (0, 2))[1].sum(0), mask).equal(mask.float())
