"Eq. 1, 4 and 5 against loops written from the paper, and the memory that the chunked KL holds."

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from heed_nb.losses import kd_terms, matrix_orientation, next_is_text, record_inputs, record_outputs, residual_alignment

MASK = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("kind", ["none", "mask", "positions", "layers"])
def test_alignment_is_eq_5_and_eq_4(layers, kind):
    torch.manual_seed(layers)
    student, teacher = torch.randn(2, layers, 2, 6, 3, dtype=torch.float64)
    drawn = torch.rand(layers, 2, 6, dtype=torch.float64) * MASK
    weights = {"none": None, "mask": MASK.double(), "positions": drawn[0], "layers": drawn}[kind]
    w = torch.ones(2, 6) if weights is None else weights
    w = w.expand(layers, 2, 6)
    at = product(range(layers), range(2), range(6))
    total = sum(w[i].item() * (student[i] - teacher[i]).norm().item() ** 2 for i in at)
    loss = residual_alignment(list(student), list(teacher), weights)
    assert loss.item() == pytest.approx(total / w.sum().item(), rel=1e-12)


def test_weights_of_another_number_of_layers_are_refused():
    residuals = list(torch.zeros(3, 2, 6, 4))
    with pytest.raises(ValueError, match=r"weights are \(2, 2, 6\); 3 residuals of \(2, 6, 4\) need \(2, 6\)"):
        residual_alignment(residuals, residuals, torch.ones(2, 2, 6))


def test_prior_recipes_take_norms():
    "MOHAWK the mean over unpadded positions of the norm at each; MaTVLM one norm of all that a layer is off."
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 2, 6, 4, dtype=torch.float64)
    off = (student - teacher)[:, MASK.bool()]  # [layers, 10, D]
    expected = {"norm": off.norm(dim=-1).mean(), "frobenius": off.flatten(1).norm(dim=-1).mean()}
    for distance, value in expected.items():
        loss = residual_alignment(list(student), list(teacher), MASK, distance=distance)
        assert loss.item() == pytest.approx(value.item(), rel=1e-12)


def test_bf16_residuals_are_compared_in_float32():
    student, teacher = torch.full((1, 4, 256), 1.0), torch.full((1, 4, 256), 1.0 + 2**-7)
    loss = residual_alignment([student.bfloat16()], [teacher.bfloat16()])
    assert loss.dtype == torch.float32 and loss.item() == 256 * 2**-14


def test_orientation_is_the_mean_frobenius_norm_over_unpadded_pairs():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 5, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0]])
    whole, cut = (student - teacher)[0], (student - teacher)[1, :, 2:4, 2:4]
    norms = torch.cat([whole, F.pad(cut, (0, 3, 0, 3))]).flatten(1).norm(dim=-1)
    loss = matrix_orientation(student.requires_grad_(), teacher, mask)
    assert loss.item() == pytest.approx(norms.mean().item(), rel=1e-12)
    loss.backward()
    assert student.grad[1, :, [0, 1, 4]].abs().max() == 0 and student.grad[1, :, :, [0, 1, 4]].abs().max() == 0
    assert_close(student.grad[0], whole / norms[:3, None, None] / 6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_kd_is_eq_1(dtype):
    torch.manual_seed(0)
    B, T, D, V = 2, 6, 4, 9
    head = nn.Linear(D, V, bias=False, dtype=dtype)
    student, teacher = torch.randn(2, B, T, D, dtype=dtype)
    labels = torch.tensor([[-100, -100, 3, 4, -100, 8], [-100, -100, -100, 0, 1, -100]])
    attention = torch.tensor([[1] * 6, [0, 1, 1, 1, 1, 1]])
    text = torch.tensor([[1, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]])
    kl, ce, n_kl, n_ce = 0.0, 0.0, 0, 0
    for b in range(B):
        for t in range(T - 1):
            p, q = head(teacher[b, t]).double().softmax(0).tolist(), head(student[b, t]).double().softmax(0).tolist()
            if attention[b, t] and text[b, t + 1]:
                n_kl, kl = n_kl + 1, kl + sum(x * math.log(x / y) for x, y in zip(p, q))
            if labels[b, t + 1] != -100:
                n_ce, ce = n_ce + 1, ce - math.log(q[labels[b, t + 1]])
    for chunk_size in (2, 100):
        terms = kd_terms(student, teacher, head, labels, next_is_text(text, attention), chunk_size=chunk_size)
        tolerance = 1e-9 if dtype == torch.float64 else 1e-4
        assert [x.item() for x in terms] == pytest.approx([kl / n_kl, ce / n_ce], rel=tolerance)


def test_without_a_token_to_ask_for_the_terms_are_0_and_have_a_gradient():
    student = torch.randn(2, 5, 4, requires_grad=True)
    nowhere = torch.zeros(2, 5, dtype=torch.bool)
    for teacher in (None, torch.randn(2, 5, 4)):
        kl, ce = kd_terms(student, teacher, nn.Linear(4, 9), torch.full((2, 5), -100), nowhere)
        (kl + ce).backward()
        assert (kl, ce) == (0, 0) and student.grad.eq(0).all()


def test_chunks_bound_the_logits_that_are_held():
    T, D, V, chunk = 96, 4, 500, 16
    rows, saved = [], []

    class Head(nn.Linear):
        def forward(self, x):
            rows.append(len(x))
            return super().forward(x)

    head = Head(D, V)
    student, teacher = torch.randn(2, 1, T, D)
    student.requires_grad_()
    labels = torch.randint(0, V, (1, T))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        kl, ce = kd_terms(student, teacher, head, labels, torch.ones(1, T, dtype=torch.bool), chunk_size=chunk)
    (kl + ce).backward()
    assert max(rows) <= chunk
    assert max(saved) <= D * V  # the head itself, and no logits
    assert student.grad.abs().sum() > 0 and head.weight.grad.abs().sum() > 0


def test_outputs_are_recorded_with_their_graph_and_hooks_removed():
    net = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(RuntimeError):
        with record_outputs(net) as outputs:
            net[1](net[0](torch.ones(1, 2)))
            raise RuntimeError
    with record_inputs([net[1]]) as inputs:
        net[1](outputs[0])
    assert inputs[0] is outputs[0] and not any(m._forward_hooks or m._forward_pre_hooks for m in net)
    outputs[1].sum().backward()
    assert net[0].weight.grad is not None
