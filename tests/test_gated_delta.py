"The chunked form and the single step against the recurrence, forward and gradient, and against transformers; the way to the kernel."

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

import heed_nb.gated_delta
from heed_nb.gated_delta import gated_delta, gated_delta_reference, gated_delta_step
from heed_nb.ssd import ssd_reference
from test_ssd import CUTS, DERIVATIVES, LOG_DECAYS, SHAPES, exports_at_any_length, same_derivatives

torch.set_num_threads(1)


def inputs(T, H, G, K, V, dtype=torch.float32, initial_state=True, seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    q, k, v = normal(batch, T, G, K), F.normalize(normal(batch, T, G, K), dim=-1), normal(batch, T, H, V)
    g, beta = -0.3 * F.softplus(normal(batch, T, H)), normal(batch, T, H).sigmoid()
    state = normal(batch, H, K, V) if initial_state else None
    q, k, v, g, beta = (a.to(dtype) for a in (q, k, v, g, beta))
    return q, k, v, g, beta, state.double() if initial_state and dtype == torch.float64 else state


def outputs_and_gradients(f, args, **kwargs):
    leaves = [None if v is None else v.detach().clone().requires_grad_() for v in args]
    y, final = f(*leaves[:5], initial_state=leaves[5], return_final_state=True, **kwargs)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y), torch.linspace(1, -1, final.numel()).view_as(final)
    ((y.to(final.dtype) * weights[0]).sum() + (final * weights[1]).sum()).backward()
    return [y, final] + [v.grad for v in leaves if v is not None]


@pytest.mark.parametrize("initial_state", [False, True], ids=["zeros", "initial state"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_chunked_is_the_recurrence(shape, initial_state):
    *shape, chunk = shape
    args = inputs(*shape, initial_state=initial_state)
    for ours, reference in zip(
        outputs_and_gradients(gated_delta, args, chunk_size=chunk), outputs_and_gradients(gated_delta_reference, args)
    ):
        assert_close(ours, reference, atol=2e-4 * max(1, reference.abs().max().item()), rtol=1e-4)


@pytest.mark.parametrize("initial_state", [False, True], ids=["zeros", "initial state"])
def test_bfloat16_keeps_a_float32_state(initial_state):
    args = inputs(50, 4, 2, 4, 4, torch.bfloat16, initial_state)
    ours, reference = (
        outputs_and_gradients(gated_delta, args, chunk_size=16),
        outputs_and_gradients(gated_delta_reference, args),
    )
    assert ours[0].dtype == torch.bfloat16 and ours[1].dtype == torch.float32
    assert_close(ours[1], reference[1], atol=1e-4, rtol=1e-4)  # the state has not seen bfloat16
    assert_close(ours[0], reference[0], atol=1e-2, rtol=8e-3)
    for a, b in zip(ours[2:], reference[2:]):
        assert_close(a.float(), b.float(), atol=2e-2 * b.abs().max().item(), rtol=2e-2)


def test_autocast_reaches_neither_state_nor_gradient():
    args = inputs(20, 2, 1, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = outputs_and_gradients(gated_delta, args, chunk_size=8)
    for a, b in zip(mixed, outputs_and_gradients(gated_delta, args, chunk_size=8)):
        assert torch.equal(a, b)


def test_spans_of_any_length_are_the_same(monkeypatch):
    *args, state = inputs(50, 2, 1, 4, 4)
    whole = outputs_and_gradients(gated_delta, [*args, state], chunk_size=4)
    with torch.no_grad():
        assert torch.equal(gated_delta(*args, initial_state=state, chunk_size=4), whole[0])
    monkeypatch.setattr(heed_nb.gated_delta, "_spans", lambda x, size, width: [(0, 5), (5, 10), (10, 13)])
    for a, b in zip(outputs_and_gradients(gated_delta, [*args, state], chunk_size=4), whole):
        assert_close(a, b, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert_close(gated_delta(*args, initial_state=state, chunk_size=4), whole[0])


def test_inputs_stay_as_they_are():
    args = inputs(8, 1, 1, 3, 3, batch=1)  # one row and head: a chunk is contiguous as it lies
    kept = [v.clone() for v in args]
    outputs_and_gradients(gated_delta, args, chunk_size=8)
    for a, b in zip(args, kept):
        assert torch.equal(a, b)


@pytest.mark.parametrize("chunk", [None, 3])
def test_gradient_in_float64(chunk):
    args = [v.requires_grad_() for v in inputs(7, 2, 1, 3, 2, torch.float64, batch=1)]
    f = lambda q, k, v, g, beta, state: gated_delta(
        q, k, v, g, beta, initial_state=state, return_final_state=True, chunk_size=chunk
    )
    assert torch.autograd.gradcheck(f, args)


@pytest.mark.parametrize("ask", DERIVATIVES.values(), ids=DERIVATIVES)
def test_every_derivative(ask):
    def alone(f, **kwargs):
        return lambda q, k, v, g, beta, state: f(
            q, k, v, g, beta, initial_state=state, return_final_state=True, **kwargs
        )

    same_derivatives(
        ask,
        alone(gated_delta, chunk_size=3),
        alone(gated_delta_reference),
        inputs(7, 2, 1, 3, 2, torch.float64, batch=1),
    )


def test_steps_are_the_chunked_form():
    *args, state = inputs(20, 4, 2, 4, 6)
    y, final = gated_delta(*args, initial_state=state, return_final_state=True, chunk_size=8, scale=0.7)
    for t in range(20):
        step, state = gated_delta_step(*(a[:, t] for a in args), state, 0.7)
        assert_close(step, y[:, t], atol=1e-4, rtol=1e-4)
    assert_close(state, final, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cut", [1, 13, 16, 29])
def test_state_carries_a_sequence_over_calls(cut):
    args = inputs(30, 4, 2, 4, 6)[:5]
    whole, final = gated_delta(*args, return_final_state=True, chunk_size=8)
    first, state = gated_delta(*(a[:, :cut] for a in args), return_final_state=True, chunk_size=8)
    second, state = gated_delta(*(a[:, cut:] for a in args), initial_state=state, return_final_state=True, chunk_size=8)
    assert_close(torch.cat([first, second], 1), whole, atol=1e-4, rtol=1e-4)
    assert_close(state, final, atol=1e-4, rtol=1e-4)


def test_without_decay_it_is_the_plain_delta_rule():
    q, k, v, g, beta, _ = inputs(30, 2, 2, 4, 4, torch.float64)
    y = gated_delta(q, k, v, 0 * g, beta, chunk_size=8, scale=1)
    eye = torch.eye(4, dtype=torch.float64)
    state = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    for t in range(30):  # DeltaNet as a product of generalised Householder matrices
        forget = eye - torch.einsum("bh,bhi,bhj->bhij", beta[:, t], k[:, t], k[:, t])
        state = forget @ state + torch.einsum("bh,bhi,bhj->bhij", beta[:, t], k[:, t], v[:, t])
        assert_close(y[:, t], torch.einsum("bhkv,bhk->bhv", state, q[:, t]))


def test_a_key_of_its_own_holds_its_last_value():
    T, K = 40, 8
    slots = torch.randint(K, (T,), generator=torch.Generator().manual_seed(0))
    keys, ones = torch.eye(K, dtype=torch.float64)[slots].view(1, T, 1, K), torch.ones(1, T, 1, dtype=torch.float64)
    values = torch.arange(T, dtype=torch.float64).view(1, T, 1, 1)
    _, state = gated_delta(keys, keys, values, 0 * ones, ones, return_final_state=True, chunk_size=16)
    last = {slot: t for t, slot in enumerate(slots.tolist())}
    assert_close(state.flatten(), torch.tensor([float(last[slot]) for slot in range(K)], dtype=torch.float64))


def test_orthogonal_keys_make_it_gated_linear_attention():
    _, _, v, g, beta, _ = inputs(12, 2, 2, 12, 3, torch.float64)
    k = torch.linalg.qr(torch.randn(2, 2, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[
        0
    ].transpose(1, 2)
    q = k.roll(1, 1) + k
    y = gated_delta(q, k, v, g.mean((0, 1), keepdim=True).expand_as(g), beta, chunk_size=5, scale=1)
    # nothing stands under a key that has not been written, so that every correction is the value itself
    assert_close(y, ssd_reference(v * beta[..., None], torch.ones_like(g), g.mean((0, 1)), k, q))


@pytest.mark.parametrize("groups", [2, 4])
def test_transformers_computes_the_same(groups):
    args = inputs(70, 4, groups, 8, 6)

    def peer(q, k, v, g, beta, *, initial_state, return_final_state):
        return inspect.unwrap(torch_recurrent_gated_delta_rule)(
            q, k, v, g, beta, initial_state=initial_state, output_final_state=return_final_state
        )

    for ours, theirs in zip(outputs_and_gradients(gated_delta, args), outputs_and_gradients(peer, args)):
        assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_nothing_of_the_future_is_seen():
    args = inputs(40, 2, 1, 4, 4, initial_state=False)[:5]
    y = gated_delta(*args, chunk_size=16)
    changed = [a.clone() for a in args]
    for a, value in zip(changed, (5, 0.5, 5, -2, 0.9)):
        a[:, 20:] = value
    assert torch.equal(gated_delta(*changed, chunk_size=16)[:, :20], y[:, :20])


@pytest.mark.parametrize("chunk", [None, 8])
def test_positions_without_write_and_decay_are_not_there(chunk):
    q, k, v, g, beta, state = inputs(30, 2, 1, 4, 4)
    keep = torch.ones(30, dtype=torch.bool)
    keep[[0, 1, 2, 11, 12, 28, 29]] = False
    y, final = gated_delta(
        q, k, v, g * keep[:, None], beta * keep[:, None], initial_state=state, return_final_state=True, chunk_size=chunk
    )
    short, short_final = gated_delta(
        *(a[:, keep] for a in (q, k, v, g, beta)), initial_state=state, return_final_state=True
    )
    assert_close(y[:, keep], short, atol=1e-4, rtol=1e-4)
    assert_close(final, short_final, atol=1e-4, rtol=1e-4)
    untouched = gated_delta(q, k, v, 0 * g, 0 * beta, initial_state=state, return_final_state=True, chunk_size=chunk)[1]
    assert torch.equal(untouched, state)


def test_no_positions_leave_the_state():
    *args, state = inputs(0, 4, 2, 4, 6)
    for f in (gated_delta, gated_delta_reference):
        y, final = f(*args, initial_state=state, return_final_state=True)
        assert y.shape == (2, 0, 4, 6) and torch.equal(final, state)
        assert f(*args, return_final_state=True)[1].eq(0).all()


def test_groups_are_consecutive_heads():
    q, k, v, g, beta, _ = inputs(12, 4, 2, 4, 4)
    y = gated_delta(q, k, v, g, beta)
    for head in range(4):
        alone = gated_delta(
            q[:, :, [head // 2]], k[:, :, [head // 2]], v[:, :, [head]], g[:, :, [head]], beta[:, :, [head]]
        )
        assert_close(y[:, :, [head]], alone)


@pytest.mark.parametrize("decay", [0.0, -1e-6, -50.0, -1e4])
def test_extreme_decays_stay_finite(decay):
    q, k, v, g, beta, state = inputs(100, 2, 1, 4, 4)
    args = q, k, v, torch.full_like(g, decay), torch.ones_like(beta), state
    for ours, reference in zip(
        outputs_and_gradients(gated_delta, args, chunk_size=32), outputs_and_gradients(gated_delta_reference, args)
    ):
        assert ours.isfinite().all()
        assert_close(ours, reference, atol=1e-3 * max(1, reference.abs().max().item()), rtol=1e-3)


@pytest.mark.parametrize("steps", LOG_DECAYS.values(), ids=LOG_DECAYS)
def test_accuracy_does_not_depend_on_the_steps(steps):
    q, k, v, g, beta, state = inputs(130, 4, 2, 8, 8)
    large = torch.rand(g.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    args = q, k, v, -g * torch.where(large, *steps), beta, state
    exact = outputs_and_gradients(gated_delta_reference, [a.double() for a in args])
    for a, b in zip(outputs_and_gradients(gated_delta, args), exact):
        assert (a.double() - b).norm() < 3e-6 * b.norm()


@pytest.mark.parametrize("f", [gated_delta, gated_delta_reference])
@pytest.mark.parametrize("ends", CUTS.values(), ids=CUTS)
def test_packed_sequences_do_not_see_each_other(f, ends):
    *args, _ = inputs(60, 4, 2, 4, 6, batch=1)
    state = torch.randn(len(ends) - 1, 4, 4, 6, generator=torch.Generator().manual_seed(1))

    def alone(*args, initial_state, return_final_state):
        results = [
            gated_delta_reference(*(a[:, i:j] for a in args), initial_state=s[None], return_final_state=True)
            for i, j, s in zip(ends, ends[1:], initial_state)
        ]
        return tuple(torch.cat(parts, dim) for parts, dim in zip(zip(*results), (1, 0)))

    options = dict(chunk_size=16) if f is gated_delta else {}
    packed = outputs_and_gradients(f, [*args, state], cu_seqlens=torch.tensor(ends), **options)
    for ours, reference in zip(packed, outputs_and_gradients(alone, [*args, state])):
        assert_close(ours, reference, atol=1e-4, rtol=1e-4)


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    args = inputs(50, 2, 1, 4, 4)
    compiled = torch.compile(gated_delta, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(
        outputs_and_gradients(compiled, args, chunk_size=16), outputs_and_gradients(gated_delta, args, chunk_size=16)
    ):
        assert_close(ours, eager, atol=1e-5, rtol=1e-4)


def test_exports_at_any_length():
    exports_at_any_length(
        gated_delta, gated_delta_reference, lambda length, batch: inputs(length, 4, 2, 4, 6, batch=batch)[:5]
    )


def test_operators_are_what_they_declare():
    torch.library.opcheck(
        torch.ops.heed_nb.gated_delta_chunks, (*(v.requires_grad_() for v in inputs(12, 4, 2, 4, 6)), 4, True)
    )


# The way to the kernel: a stand-in with fla's signature and demands, which computes on the CPU


def chunk_gated_delta_rule(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
    **kwargs,
):
    assert (
        q.shape == k.shape
        and q.shape[:3] == v.shape[:3]
        and q.dtype == k.dtype == v.dtype
        and g.dtype == beta.dtype == torch.float32
    )
    assert (
        not use_qk_l2norm_in_kernel and not kwargs and (initial_state is None or initial_state.dtype == torch.float32)
    )
    assert cu_seqlens is None or cu_seqlens.dtype == torch.int64 and len(v) == 1 and cu_seqlens.diff().min() > 0
    y, state = gated_delta_reference(
        q, k, v, g, beta, scale=scale, initial_state=initial_state, return_final_state=True, cu_seqlens=cu_seqlens
    )
    return y, state if output_final_state else None


@pytest.fixture
def fla(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "fla.ops.gated_delta_rule", SimpleNamespace(chunk_gated_delta_rule=chunk_gated_delta_rule)
    )
    monkeypatch.setattr(heed_nb.gated_delta, "_backend", lambda backend, *_: "fla")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("initial_state", [False, True], ids=["zeros", "initial state"])
def test_fla_gets_what_it_expects(fla, dtype, initial_state):
    *args, state = inputs(12, 4, 2, 4, 6, dtype, initial_state)
    ours, reference = (
        outputs_and_gradients(f, [*args, state], scale=0.7) for f in (gated_delta, gated_delta_reference)
    )
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


@pytest.mark.parametrize("ends", CUTS.values(), ids=CUTS)
def test_fla_keeps_packed_sequences_apart(fla, ends):
    args = inputs(60, 4, 2, 4, 6, batch=1)[:5] + (
        torch.randn(len(ends) - 1, 4, 4, 6, generator=torch.Generator().manual_seed(1)),
    )
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    for a, b in zip(
        *(outputs_and_gradients(f, args, cu_seqlens=cu_seqlens) for f in (gated_delta, gated_delta_reference))
    ):
        assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_bad_input():
    q, k, v, g, beta, state = inputs(6, 4, 2, 4, 4)
    with pytest.raises(ValueError, match="unknown backend 'cuda'; one of auto, torch, fla"):
        gated_delta(q, k, v, g, beta, backend="cuda")
    with pytest.raises(ValueError, match="chunk_size is 0"):
        gated_delta(q, k, v, g, beta, chunk_size=0)
    with pytest.raises(ValueError, match=r"g has shape \[2, 5, 4\], expected \[2, 6, 4\]"):
        gated_delta(q, k, v, g[:, 1:], beta)
    with pytest.raises(ValueError, match="3 groups do not divide 4 heads"):
        gated_delta(torch.ones(2, 6, 3, 4), torch.ones(2, 6, 3, 4), v, g, beta)
    with pytest.raises(ValueError, match="initial_state has shape"):
        gated_delta_reference(q, k, v, g, beta, initial_state=state[:1])
    with pytest.raises(ValueError, match="packs sequences in one row, got a batch of 2"):
        gated_delta(q, k, v, g, beta, cu_seqlens=torch.tensor([0, 6]))
    one = [a[:1] for a in (q, k, v, g, beta)]
    with pytest.raises(ValueError, match=r"cu_seqlens rises from 0 to 6, got \[0, 5\]"):
        gated_delta(*one, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="cu_seqlens is a tensor of two integers or more"):
        gated_delta(*one, cu_seqlens=torch.tensor([0.0, 6.0]))
    with pytest.raises(ValueError, match=r"initial_state has shape \[2, 4, 4, 4\], expected \[3, 4, 4, 4\]"):
        gated_delta(*one, cu_seqlens=torch.tensor([0, 2, 3, 6]), initial_state=state)
    with pytest.raises(ValueError, match="backend 'fla' can't run: .*needs tensors on a GPU, these are on cpu"):
        gated_delta(q, k, v, g, beta, backend="fla")
    with pytest.raises(ValueError, match="unknown backend 'mamba_ssm'; one of auto, torch, fla"):
        gated_delta(q, k, v, g, beta, backend="mamba_ssm")
