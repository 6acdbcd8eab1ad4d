"The gated delta rule beside other operators; the way to the kernel (against its recurrence: test_recurrences)."

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

import heed_nb.gated_delta
from heed_nb.gated_delta import gated_delta, gated_delta_reference, gated_delta_step
from heed_nb.ssd import ssd_reference
from test_recurrences import DELTA, close

torch.set_num_threads(1)


inputs = DELTA.inputs


def test_the_scale_is_of_what_is_read():
    *args, state = inputs(20, 4, 2, 4, 6)
    y, final = DELTA.call("chunked", [*args, state], chunk_size=8)
    for f in (gated_delta, gated_delta_reference):
        close(f(*args, initial_state=state, return_final_state=True, scale=3.0), [3 * 4**0.5 * y, final])
    step, _ = gated_delta_step(*(a[:, 0] for a in args), state, 3.0)
    assert_close(step, 3 * 4**0.5 * y[:, 0], atol=1e-4, rtol=1e-4)


def test_without_decay_it_is_the_plain_delta_rule():
    q, k, v, g, beta, _ = inputs(30, 2, 2, 4, 4, torch.float64)
    y = gated_delta(q, k, v, 0 * g, beta, chunk_size=8, scale=1)
    eye = torch.eye(4, dtype=torch.float64)
    state = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    for t in range(30):  # DeltaNet as a product of generalised Householder matrices
        forget = eye - torch.einsum("bh,bhi,bhj->bhij", beta[:, t], k[:, t], k[:, t])
        state = forget @ state + torch.einsum("bh,bhi,bhj->bhij", beta[:, t], k[:, t], v[:, t])
        assert_close(y[:, t], torch.einsum("bhkv,bhk->bhv", state, q[:, t]))


def test_orthogonal_keys_make_it_gated_linear_attention():
    _, _, v, g, beta, _ = inputs(12, 2, 2, 12, 3, torch.float64)
    keys = torch.randn(2, 2, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k = torch.linalg.qr(keys)[0].transpose(1, 2)
    q = k.roll(1, 1) + k
    y = gated_delta(q, k, v, g.mean((0, 1), keepdim=True).expand_as(g), beta, chunk_size=5, scale=1)
    # nothing stands under a key that has not been written, so that every correction is the value itself
    assert_close(y, ssd_reference(v * beta[..., None], torch.ones_like(g), g.mean((0, 1)), k, q))


@pytest.mark.parametrize("groups", [2, 4])
def test_transformers_computes_the_same(groups):
    *args, state = inputs(70, 4, groups, 8, 6)
    peer = inspect.unwrap(torch_recurrent_gated_delta_rule)
    close(DELTA.call("chunked", [*args, state]), peer(*args, initial_state=state, output_final_state=True))


# The way to the kernel: a stand-in with fla's signature and demands, which computes on the CPU


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
    assert q.shape == k.shape and q.shape[:3] == v.shape[:3]
    assert q.dtype == k.dtype == v.dtype and g.dtype == beta.dtype == torch.float32
    assert initial_state is None or initial_state.dtype == torch.float32
    options = dict(scale=scale, initial_state=initial_state, return_final_state=True)
    y, state = gated_delta_reference(q, k, v, g, beta, **options)
    return y, state if output_final_state else None


@pytest.fixture
def fla(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "fla.ops.gated_delta_rule", SimpleNamespace(chunk_gated_delta_rule=chunk_gated_delta_rule)
    )
    monkeypatch.setattr(heed_nb.gated_delta, "backend_for", lambda backend, *_: "fla")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("initial_state", [False, True], ids=["zeros", "initial state"])
def test_fla_gets_what_it_expects(fla, dtype, initial_state):
    *args, state = inputs(12, 4, 2, 4, 6, dtype, initial_state)
    ours, reference = (DELTA.gradients(f, [*args, state], scale=0.7) for f in ("chunked", "reference"))
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    for a, b in zip(ours, reference):
        assert (a.float() - b.float()).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * b.float().norm()
    assert_close(gated_delta(*args, initial_state=state), gated_delta_reference(*args, initial_state=state))


def test_fla_s_gradient_is_not_differentiated(fla):
    *args, state = (v.requires_grad_() for v in inputs(6, 4, 2, 4, 6))
    y = gated_delta(*args, initial_state=state).sum()
    torch.autograd.grad(y, args[0], retain_graph=True)
    with pytest.raises(RuntimeError, match="backend 'fla' has no second derivatives"):
        torch.autograd.grad(y, args[0], create_graph=True)


def test_bad_input():
    q, k, v, g, beta, state = inputs(6, 4, 2, 4, 4)
    for message, given, options in (
        ("unknown backend 'cuda'; one of auto, torch, fla", (q, k, v, g, beta), dict(backend="cuda")),
        ("unknown backend 'mamba_ssm'; one of auto, torch, fla", (q, k, v, g, beta), dict(backend="mamba_ssm")),
        ("chunk_size is 0", (q, k, v, g, beta), dict(chunk_size=0)),
        ("3 groups do not divide 4 heads", (torch.ones(2, 6, 3, 4), torch.ones(2, 6, 3, 4), v, g, beta), {}),
        ("initial_state has shape", (q, k, v, g, beta), dict(initial_state=state[:1])),
    ):
        with pytest.raises(ValueError, match=message):
            gated_delta(*given, **options)
