"Both recurrences: the chunked form and the single step against the definition, forward and every derivative."

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import func
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from heed_nb.gated_delta import gated_delta, gated_delta_reference, gated_delta_step
from heed_nb.ssd import ssd, ssd_reference, ssd_step
from tiny import fails

torch.set_num_threads(1)


@dataclass(frozen=True)
class Operator:
    "A recurrence with its arguments as a list, the state last: `inputs` makes them, `call` hands them over."

    chunked: Callable
    reference: Callable
    step: Callable
    inputs: Callable
    keywords: tuple  # of the arguments after the fifth
    at: tuple  # the places of arguments with a dimension of positions
    groups: tuple  # those of arguments with a dimension of groups in place of heads
    rates: tuple  # those of arguments that, at zero, leave the state as it is
    uneven: Callable  # arguments whose log decays are, at positions of a mask, near one number, elsewhere near another

    def call(self, f, args, **options):
        f = getattr(self, f)
        return f(*args[:5], **dict(zip(self.keywords, args[5:])), return_final_state=True, **options)

    def take(self, args, where):
        "The arguments at some positions."
        return [a[:, where] if i in self.at else a for i, a in enumerate(args)]

    def gradients(self, f, args, **options):
        "Output, final state and the gradients of all arguments."
        leaves = [None if v is None else v.detach().clone().requires_grad_() for v in args]
        y, final = self.call(f, leaves, **options)
        weights = torch.linspace(-1, 1, y.numel()).view_as(y), torch.linspace(1, -1, final.numel()).view_as(final)
        ((y.to(final.dtype) * weights[0]).sum() + (final * weights[1]).sum()).backward()
        return [y, final] + [v.grad for v in leaves if v is not None]


def normal(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def ssd_inputs(T, H, G, P, N, dtype=torch.float32, initial_state=True, seed=0, batch=2):
    n = normal(seed)
    x, dt, A = n(batch, T, H, P), F.softplus(n(batch, T, H)), -n(H).exp()
    B, C, D = n(batch, T, G, N), n(batch, T, G, N), n(H)
    state = n(batch, H, P, N) if initial_state else None
    x, dt, B, C = (v.to(dtype) for v in (x, dt, B, C))
    if dtype == torch.float64:
        A, D, state = (v if v is None else v.double() for v in (A, D, state))
    return [x, dt, A, B, C, D, state]


def delta_inputs(T, H, G, K, V, dtype=torch.float32, initial_state=True, seed=0, batch=2):
    n = normal(seed)
    q, k, v = n(batch, T, G, K), F.normalize(n(batch, T, G, K), dim=-1), n(batch, T, H, V)
    g, beta = -0.3 * F.softplus(n(batch, T, H)), n(batch, T, H).sigmoid()
    state = n(batch, H, K, V) if initial_state else None
    q, k, v, g, beta = (a.to(dtype) for a in (q, k, v, g, beta))
    return [q, k, v, g, beta, state.double() if initial_state and dtype == torch.float64 else state]


def uneven_ssd(args, where, numbers):
    x, dt, A, *others = args
    return [x, dt * torch.where(where, *(-n for n in numbers)), -torch.linspace(0.5, 1.5, len(A)), *others]


SSD = Operator(
    ssd,
    ssd_reference,
    ssd_step,
    ssd_inputs,
    ("D", "initial_state"),
    at=(0, 1, 3, 4),
    groups=(3, 4),
    rates=(1,),
    uneven=uneven_ssd,
)
DELTA = Operator(
    gated_delta,
    gated_delta_reference,
    gated_delta_step,
    delta_inputs,
    ("initial_state",),
    at=(0, 1, 2, 3, 4),
    groups=(0, 1),
    rates=(3, 4),
    uneven=lambda args, where, numbers: [*args[:3], -args[3] * torch.where(where, *numbers), *args[4:]],
)
both = pytest.mark.parametrize("op", [SSD, DELTA], ids=["ssd", "gated delta"])


def close(ours, theirs, tolerance=1e-4):
    "Each of two lists of tensors, to a tolerance of the largest number."
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, atol=tolerance * max(1, b.abs().max().item()), rtol=tolerance)


# T, H, G, the two widths of the state, chunk_size
SHAPES = {
    "one position": (1, 2, 1, 4, 4, None),
    "shorter than a chunk": (5, 2, 2, 4, 6, 8),
    "one chunk": (16, 2, 1, 3, 5, 16),
    "chunks divide": (48, 4, 2, 4, 4, 16),
    "chunks do not divide": (50, 4, 4, 5, 3, 16),
    "chunks of one": (7, 2, 2, 2, 3, 1),
    "default chunk": (37, 6, 3, 4, 4, None),
    "default chunks, long": (300, 2, 1, 4, 4, None),
}


@both
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_chunked_is_the_recurrence(op, shape):
    *shape, chunk = shape
    for initial_state in (False, True):
        args = op.inputs(*shape, initial_state=initial_state)
        close(op.gradients("chunked", args, chunk_size=chunk), op.gradients("reference", args), 2e-4)


@both
@pytest.mark.parametrize("initial_state", [False, True], ids=["zeros", "initial state"])
def test_bfloat16_keeps_a_float32_state(op, initial_state):
    args = op.inputs(50, 4, 2, 4, 4, torch.bfloat16, initial_state)
    ours, reference = op.gradients("chunked", args, chunk_size=16), op.gradients("reference", args)
    assert ours[0].dtype == torch.bfloat16 and ours[1].dtype == torch.float32
    assert_close(ours[1], reference[1], atol=1e-4, rtol=1e-4)  # the state has not seen bfloat16
    assert_close(ours[0], reference[0], atol=1e-2, rtol=8e-3)
    for a, b in zip(ours[2:], reference[2:]):
        assert_close(a.float(), b.float(), atol=2e-2 * b.abs().max().item(), rtol=2e-2)


@both
def test_autocast_reaches_neither_state_nor_gradient(op):
    args = op.inputs(20, 2, 1, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = op.gradients("chunked", args, chunk_size=8)
    assert all(map(torch.equal, mixed, op.gradients("chunked", args, chunk_size=8)))


@both
def test_spans_of_any_length_are_the_same(op, monkeypatch):
    args = op.inputs(50, 2, 1, 4, 4)
    whole = op.gradients("chunked", args, chunk_size=4)
    with torch.no_grad():
        assert torch.equal(op.call("chunked", args, chunk_size=4)[0], whole[0])
    module = sys.modules[op.chunked.__module__]
    monkeypatch.setattr(module, "chunk_spans", lambda x, size, width: [(0, 5), (5, 10), (10, 13)])
    close(op.gradients("chunked", args, chunk_size=4), whole, 1e-5)
    with torch.no_grad():
        assert_close(op.call("chunked", args, chunk_size=4)[0], whole[0])


@both
def test_inputs_stay_as_they_are(op):
    args = op.inputs(8, 1, 1, 3, 3, batch=1)  # one row and head: a chunk is contiguous as it lies
    kept = [v.clone() for v in args]
    op.gradients("chunked", args, chunk_size=8)
    assert all(map(torch.equal, args, kept))


# What a derivative is asked by: each is a function of f and its inputs; f takes them in order and returns two tensors.


def double_backward(f, *args):
    leaves = [a.clone().requires_grad_() for a in args]
    grads = torch.autograd.grad(sum(v.sin().sum() for v in f(*leaves)), leaves, create_graph=True)
    return grads, torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)


def double_backward_of_one(f, *args):
    return [double_backward(lambda v: f(*args[:i], v, *args[i + 1 :]), a) for i, a in enumerate(args)]


def tangents_of_one(f, *args):
    tangents = []
    for i, a in enumerate(args):
        with forward_ad.dual_level():
            for v in f(*args[:i], forward_ad.make_dual(a, a.cos()), *args[i + 1 :]):
                tangent = forward_ad.unpack_dual(v).tangent
                tangents.append(torch.zeros_like(v) if tangent is None else tangent)
    return tangents


def checkpointed(f, *args):
    leaves = [a.clone().requires_grad_() for a in args]
    sum(v.sin().sum() for v in checkpoint(f, *leaves, use_reentrant=False)).backward()
    return [a.grad for a in leaves]


def total(f):
    return lambda *args: sum(v.sin().sum() for v in f(*args))


def every(args):
    return tuple(range(len(args)))


def mapped(f, *args):
    return func.vmap(f)(*(torch.stack([a, 0.9 * a]) for a in args))


DERIVATIVES = {
    "jvp": lambda f, *args: func.jvp(f, args, tuple(a.cos() for a in args))[1],
    "dual numbers": tangents_of_one,
    "grad": lambda f, *args: func.grad(total(f), every(args))(*args),
    "jacrev": lambda f, *args: func.jacrev(f, every(args))(*args),
    "hessian": lambda f, *args: func.hessian(total(f), (1, 2))(*args),
    "vmap": mapped,
    "vmap of grad": lambda f, *args: mapped(func.grad(total(f), every(args)), *args),
    "batched gradients": lambda f, *args: torch.autograd.functional.jacobian(f, args, vectorize=True),
    "double backward": double_backward,
    "double backward of one input": double_backward_of_one,
    "inputs that depend on each other": lambda f, *args: double_backward(
        lambda a: f(*(v + 0.01 * a.mean() * v for v in args)), args[0]
    ),
    "checkpoint": checkpointed,
}


@both
@pytest.mark.parametrize("ask", DERIVATIVES.values(), ids=DERIVATIVES)
def test_every_derivative(op, ask):
    args = op.inputs(7, 2, 1, 2, 3, torch.float64, batch=1)
    ours = tree_leaves(ask(lambda *args: op.call("chunked", args, chunk_size=3), *args))
    theirs = tree_leaves(ask(lambda *args: op.call("reference", args), *args))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)
    assert any(b.any() for b in theirs)


# The state


@both
def test_nothing_of_the_future_is_seen(op):
    args = op.inputs(40, 2, 1, 4, 4)
    changed = [a.clone() for a in args]
    for i in op.at:
        changed[i][:, 20:] = -changed[i][:, 20:] if i in op.rates else 5
    y, other = (op.call("chunked", given, chunk_size=16)[0] for given in (args, changed))
    assert torch.equal(y[:, :20], other[:, :20]) and not torch.equal(y[:, 20:], other[:, 20:])


@both
def test_no_positions_leave_the_state(op):
    args = op.inputs(0, 4, 2, 4, 6)
    for f in ("chunked", "reference"):
        y, final = op.call(f, args)
        assert y.shape[:3] == (2, 0, 4) and torch.equal(final, args[-1])
        assert op.call(f, [*args[:-1], None])[1].eq(0).all()


@both
def test_groups_are_consecutive_heads(op):
    *args, state = op.inputs(12, 4, 2, 4, 4)
    y, _ = op.call("chunked", [*args, state])
    for head in range(4):
        place = lambda i: [head // 2] if i in op.groups else [head]
        alone = [a[place(i)] if a.ndim == 1 else a[:, :, place(i)] for i, a in enumerate(args)]
        assert_close(y[:, :, [head]], op.call("chunked", [*alone, state[:, [head]]])[0])


# Beside other operators


def test_ssd_is_gated_linear_attention():
    x, dt, A, B, C, D, state = ssd_inputs(40, 2, 2, 4, 6, torch.float64)
    decay = (dt * A).cumsum(1).transpose(1, 2)  # q = C, k = B, v = x dt, log decay dt A
    weights = (decay[..., :, None] - decay[..., None, :]).exp().tril() * (C.transpose(1, 2) @ B.transpose(1, 2).mT)
    y = weights @ (x * dt[..., None]).transpose(1, 2) + decay.exp()[..., None] * (C.transpose(1, 2) @ state.mT)
    assert_close(ssd(x, dt, A, B, C, initial_state=state, chunk_size=16), y.transpose(1, 2))


def test_the_scale_is_of_what_is_read():
    *args, state = delta_inputs(20, 4, 2, 4, 6)
    y, final = DELTA.call("chunked", [*args, state], chunk_size=8)
    for f in (gated_delta, gated_delta_reference):
        close(f(*args, initial_state=state, return_final_state=True, scale=3.0), [3 * 4**0.5 * y, final])
    step, _ = gated_delta_step(*(a[:, 0] for a in args), state, 3.0)
    assert_close(step, 3 * 4**0.5 * y[:, 0], atol=1e-4, rtol=1e-4)


def test_without_decay_it_is_the_plain_delta_rule():
    q, k, v, g, beta, _ = delta_inputs(30, 2, 2, 4, 4, torch.float64)
    y = gated_delta(q, k, v, 0 * g, beta, chunk_size=8, scale=1)
    eye = torch.eye(4, dtype=torch.float64)
    state = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    for t in range(30):  # DeltaNet as a product of generalised Householder matrices
        forget = eye - torch.einsum("bh,bhi,bhj->bhij", beta[:, t], k[:, t], k[:, t])
        state = forget @ state + torch.einsum("bh,bhi,bhj->bhij", beta[:, t], k[:, t], v[:, t])
        assert_close(y[:, t], torch.einsum("bhkv,bhk->bhv", state, q[:, t]))


def test_orthogonal_keys_make_it_gated_linear_attention():
    _, _, v, g, beta, _ = delta_inputs(12, 2, 2, 12, 3, torch.float64)
    keys = torch.randn(2, 2, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k = torch.linalg.qr(keys)[0].transpose(1, 2)
    q = k.roll(1, 1) + k
    y = gated_delta(q, k, v, g.mean((0, 1), keepdim=True).expand_as(g), beta, chunk_size=5, scale=1)
    # nothing stands under a key that has not been written, so that every correction is the value itself
    assert_close(y, ssd_reference(v * beta[..., None], torch.ones_like(g), g.mean((0, 1)), k, q))


PEERS = {  # the library's form of the same arguments, and the groups of heads
    "mamba2": (SSD, mamba2_chunk_scan, 2),
    "gated delta": (DELTA, torch_recurrent_gated_delta_rule, 2),
    "gated delta, ungrouped": (DELTA, torch_recurrent_gated_delta_rule, 4),
}


@pytest.mark.parametrize("op, peer, groups", PEERS.values(), ids=PEERS)
def test_transformers_computes_the_same(op, peer, groups):
    args = op.inputs(70, 4, groups, 8, 6)
    if op is SSD:
        how = dict(chunk_size=16, D=args[5], initial_states=args[6], return_final_states=True)
    else:
        how = dict(initial_state=args[5], output_final_state=True)
    close(op.call("chunked", args), inspect.unwrap(peer)(*args[:5], **how))


@both
def test_bad_input(op):
    *args, state = op.inputs(6, 4, 2, 4, 4)
    grouped = [torch.ones(2, 6, 3, 4) if i in op.groups else a for i, a in enumerate(args)]
    for message, given, options in (
        ("unknown backend 'cuda'; one of auto, torch, (mamba_ssm, )?fla", args, dict(backend="cuda")),
        ("chunk_size is 0", args, dict(chunk_size=0)),
        ("3 groups do not divide 4 heads", grouped, {}),
        ("initial_state has shape", args, dict(initial_state=state[:1])),
    ):
        fails(message, op.chunked, *given[:5], **options)
    fails("initial_state has shape", op.reference, *args[:5], initial_state=state[:1])


# Accuracy


LOG_DECAYS = {  # of half the positions, and of the others
    "minute": (-1e-6, -1e-6),
    "all small": (-0.01, -0.01),
    "usual": (-1.0, -1.0),
    "large": (-50.0, -50.0),
    "some padding": (-10.0, 0.0),
    "large, padding": (-100.0, 0.0),
    "large and small": (-1000.0, -0.01),
    "large and minute": (-1000.0, -1e-6),
    "huge": (-1e6, -0.1),
    "all huge": (-1e4, -1e4),
}


@both
@pytest.mark.parametrize("numbers", LOG_DECAYS.values(), ids=LOG_DECAYS)
def test_accuracy_does_not_depend_on_the_decays(op, numbers):
    "Outputs and gradients in float32 against the reference in float64; what is below 1e-25 counts as 0."
    where = torch.rand(2, 130, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    args = op.uneven(op.inputs(130, 4, 2, 8, 8), where, numbers)
    exact = op.gradients("reference", [a.double() for a in args])
    for a, b in zip(op.gradients("chunked", args), exact):
        assert (a.double() - b).norm() < 3e-6 * (b.norm() + 1e-25)


# Compiled, exported, declared


@both
def test_compiles_as_one_graph(op):
    torch._dynamo.reset()
    compiled = Operator(**vars(op) | dict(chunked=torch.compile(op.chunked, backend="aot_eager", fullgraph=True)))
    for length in (50, 70):
        args = op.inputs(length, 2, 1, 4, 4)
        close(compiled.gradients("chunked", args), op.gradients("chunked", args))


class Module(torch.nn.Module):
    "What `torch.export` takes."

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *args):
        return self.f(*args, return_final_state=True)


@both
def test_exports_at_any_length(op):
    sizes = {0: torch.export.Dim("batch", min=1, max=9), 1: torch.export.Dim("length", min=1, max=300)}
    inputs = lambda length, batch: tuple(op.inputs(length, 4, 2, 4, 6, batch=batch)[:5])
    example = inputs(40, 2)
    shapes = (tuple({} if v.ndim == 1 else sizes for v in example),)
    program = torch.export.export(Module(op.chunked), example, dynamic_shapes=shapes).module()
    for length, batch in ((1, 2), (5, 1), (32, 2), (33, 3), (200, 2)):
        args = inputs(length, batch)
        close(program(*args), op.reference(*args, return_final_state=True))


def test_operators_are_what_they_declare():
    x, dt, A, B, C, D, state = (v.requires_grad_() for v in ssd_inputs(12, 4, 2, 4, 6))
    torch.library.opcheck(torch.ops.heed_nb.ssd_chunks, (x, dt, A, B, C, state, 4, True))
    delta = [v.requires_grad_() for v in delta_inputs(12, 4, 2, 4, 6)]
    torch.library.opcheck(torch.ops.heed_nb.gated_delta_chunks, (*delta, 4, True))
