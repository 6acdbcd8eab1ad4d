"The chunked form and the single step against the recurrence, forward and gradient; the choice of a kernel and the way to it."

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import func
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

import heed_nb.ssd
from heed_nb.ssd import KERNELS, choose_backend, ssd, ssd_reference, ssd_step

torch.set_num_threads(1)

# name: T, H, G, the two widths of the state, chunk_size
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


def inputs(T, H, G, P, N, dtype=torch.float32, initial_state=True, seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    x, dt, A = normal(batch, T, H, P), F.softplus(normal(batch, T, H)), -normal(H).exp()
    B, C, D = normal(batch, T, G, N), normal(batch, T, G, N), normal(H)
    state = normal(batch, H, P, N) if initial_state else None
    x, dt, B, C = (v.to(dtype) for v in (x, dt, B, C))
    if dtype == torch.float64:
        A, D, state = (v if v is None else v.double() for v in (A, D, state))
    return x, dt, A, B, C, D, state


def outputs_and_gradients(f, args, **kwargs):
    leaves = [None if v is None else v.detach().clone().requires_grad_() for v in args]
    x, dt, A, B, C, D, state = leaves
    y, final = f(x, dt, A, B, C, D=D, initial_state=state, return_final_state=True, **kwargs)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y), torch.linspace(1, -1, final.numel()).view_as(final)
    ((y.to(final.dtype) * weights[0]).sum() + (final * weights[1]).sum()).backward()
    return [y, final] + [v.grad for v in leaves if v is not None]


@pytest.mark.parametrize("initial_state", [False, True], ids=["zeros", "initial state"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_chunked_is_the_recurrence(shape, initial_state):
    *shape, chunk = shape
    args = inputs(*shape, initial_state=initial_state)
    for ours, reference in zip(
        outputs_and_gradients(ssd, args, chunk_size=chunk), outputs_and_gradients(ssd_reference, args)
    ):
        assert_close(ours, reference, atol=2e-4 * max(1, reference.abs().max().item()), rtol=1e-4)


@pytest.mark.parametrize("initial_state", [False, True], ids=["zeros", "initial state"])
def test_bfloat16_keeps_a_float32_state(initial_state):
    args = inputs(50, 4, 2, 4, 4, torch.bfloat16, initial_state)
    ours, reference = outputs_and_gradients(ssd, args, chunk_size=16), outputs_and_gradients(ssd_reference, args)
    assert ours[0].dtype == torch.bfloat16 and ours[1].dtype == torch.float32
    assert_close(ours[1], reference[1], atol=1e-4, rtol=1e-4)  # the state has not seen bfloat16
    assert_close(ours[0], reference[0], atol=1e-2, rtol=8e-3)
    for a, b in zip(ours[2:], reference[2:]):
        assert_close(a.float(), b.float(), atol=2e-2 * b.abs().max().item(), rtol=2e-2)


def test_autocast_reaches_neither_state_nor_gradient():
    args = inputs(20, 2, 1, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = outputs_and_gradients(ssd, args, chunk_size=8)
    for a, b in zip(mixed, outputs_and_gradients(ssd, args, chunk_size=8)):
        assert torch.equal(a, b)


def test_spans_of_any_length_are_the_same(monkeypatch):
    args = inputs(50, 2, 1, 4, 4)
    whole = outputs_and_gradients(ssd, args, chunk_size=4)
    with torch.no_grad():
        assert torch.equal(ssd(*args[:5], D=args[5], initial_state=args[6], chunk_size=4), whole[0])
    monkeypatch.setattr(heed_nb.ssd, "_spans", lambda x, size, width: [(0, 5), (5, 10), (10, 13)])
    for a, b in zip(outputs_and_gradients(ssd, args, chunk_size=4), whole):
        assert_close(a, b, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert_close(ssd(*args[:5], D=args[5], initial_state=args[6], chunk_size=4), whole[0])


def test_inputs_stay_as_they_are():
    args = inputs(8, 1, 1, 3, 3, batch=1)  # one row and head: a chunk is contiguous as it lies
    kept = [v.clone() for v in args]
    outputs_and_gradients(ssd, args, chunk_size=8)
    for a, b in zip(args, kept):
        assert torch.equal(a, b)


@pytest.mark.parametrize("chunk", [None, 3])
def test_gradient_in_float64(chunk):
    args = [v.requires_grad_() for v in inputs(7, 2, 1, 2, 3, torch.float64, batch=1)]
    f = lambda x, dt, A, B, C, D, state: ssd(
        x, dt, A, B, C, D=D, initial_state=state, return_final_state=True, chunk_size=chunk
    )
    assert torch.autograd.gradcheck(f, args)


# What a derivative is asked by: each is a function of f and its inputs, which f takes in order and returns two tensors for.


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
            outputs = f(*args[:i], forward_ad.make_dual(a, a.cos()), *args[i + 1 :])
            tangents += [
                forward_ad.unpack_dual(v).tangent
                if forward_ad.unpack_dual(v).tangent is not None
                else torch.zeros_like(v)
                for v in outputs
            ]
    return tangents


def checkpointed(f, *args):
    leaves = [a.clone().requires_grad_() for a in args]
    sum(v.sin().sum() for v in checkpoint(f, *leaves, use_reentrant=False)).backward()
    return [a.grad for a in leaves]


def total(f):
    return lambda *args: sum(v.sin().sum() for v in f(*args))


def every(args):
    return tuple(range(len(args)))


DERIVATIVES = {
    "jvp": lambda f, *args: func.jvp(f, args, tuple(a.cos() for a in args))[1],
    "dual numbers": tangents_of_one,
    "grad": lambda f, *args: func.grad(total(f), every(args))(*args),
    "jacrev": lambda f, *args: func.jacrev(f, every(args))(*args),
    "hessian": lambda f, *args: func.hessian(total(f), (1, 2))(*args),
    "vmap": lambda f, *args: func.vmap(f)(*(torch.stack([a, 0.9 * a]) for a in args)),
    "vmap of grad": lambda f, *args: func.vmap(func.grad(total(f), every(args)))(
        *(torch.stack([a, 0.9 * a]) for a in args)
    ),
    "batched gradients": lambda f, *args: torch.autograd.functional.jacobian(f, args, vectorize=True),
    "double backward": double_backward,
    "double backward of one input": double_backward_of_one,
    "inputs that depend on each other": lambda f, *args: double_backward(
        lambda a: f(*(v + 0.01 * a.mean() * v for v in args)), args[0]
    ),
    "checkpoint": checkpointed,
}


def same_derivatives(ask, chunked, reference, args):
    ours, theirs = (tree_leaves(ask(f, *args)) for f in (chunked, reference))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)
    assert any(b.any() for b in theirs)


@pytest.mark.parametrize("ask", DERIVATIVES.values(), ids=DERIVATIVES)
def test_every_derivative(ask):
    def alone(f, **kwargs):
        return lambda x, dt, A, B, C, D, state: f(
            x, dt, A, B, C, D=D, initial_state=state, return_final_state=True, **kwargs
        )

    same_derivatives(ask, alone(ssd, chunk_size=3), alone(ssd_reference), inputs(7, 2, 1, 2, 3, torch.float64, batch=1))


def test_steps_are_the_chunked_form():
    x, dt, A, B, C, D, state = inputs(20, 4, 2, 4, 4)
    y, final = ssd(x, dt, A, B, C, D=D, initial_state=state, return_final_state=True, chunk_size=8)
    for t in range(20):
        step, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state, D)
        assert_close(step, y[:, t], atol=1e-4, rtol=1e-4)
    assert_close(state, final, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cut", [1, 13, 16, 29])
def test_state_carries_a_sequence_over_calls(cut):
    x, dt, A, B, C, D, _ = inputs(30, 4, 2, 4, 4)
    whole, final = ssd(x, dt, A, B, C, return_final_state=True, chunk_size=8)
    first, state = ssd(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], return_final_state=True, chunk_size=8)
    second, state = ssd(
        x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], initial_state=state, return_final_state=True, chunk_size=8
    )
    assert_close(torch.cat([first, second], 1), whole, atol=1e-4, rtol=1e-4)
    assert_close(state, final, atol=1e-4, rtol=1e-4)


def test_causal_linear_attention():
    x, dt, A, B, C, D, _ = inputs(40, 4, 4, 4, 6, torch.float64)
    q, k, v = (a.transpose(1, 2) for a in (C, B, x))
    attention = ((q @ k.mT).tril() @ v).transpose(1, 2)
    assert_close(ssd(x, torch.ones_like(dt), torch.zeros_like(A), B, C, chunk_size=16), attention)


def test_gated_linear_attention():
    x, dt, A, B, C, D, state = inputs(40, 2, 2, 4, 6, torch.float64)
    decay = (dt * A).cumsum(1).transpose(1, 2)  # q = C, k = B, v = x dt, log decay dt A
    weights = (decay[..., :, None] - decay[..., None, :]).exp().tril() * (C.transpose(1, 2) @ B.transpose(1, 2).mT)
    y = weights @ (x * dt[..., None]).transpose(1, 2) + decay.exp()[..., None] * (C.transpose(1, 2) @ state.mT)
    assert_close(ssd(x, dt, A, B, C, initial_state=state, chunk_size=16), y.transpose(1, 2))


def test_transformers_computes_the_same():
    args = inputs(70, 4, 2, 8, 6)

    def peer(x, dt, A, B, C, *, D, initial_state, return_final_state):
        return inspect.unwrap(mamba2_chunk_scan)(
            x, dt, A, B, C, chunk_size=16, D=D, initial_states=initial_state, return_final_states=return_final_state
        )

    for ours, theirs in zip(outputs_and_gradients(ssd, args), outputs_and_gradients(peer, args)):
        assert_close(ours, theirs, atol=1e-4 * max(1, theirs.abs().max().item()), rtol=1e-4)


def test_nothing_of_the_future_is_seen():
    x, dt, A, B, C, D, _ = inputs(40, 2, 1, 4, 4)
    y = ssd(x, dt, A, B, C, chunk_size=16)
    x2, B2, C2, dt2 = (v.clone() for v in (x, B, C, dt))
    for v in (x2, B2, C2, dt2):
        v[:, 20:] = 5
    assert torch.equal(ssd(x2, dt2, A, B2, C2, chunk_size=16)[:, :20], y[:, :20])


@pytest.mark.parametrize("chunk", [None, 8])
def test_positions_with_dt_zero_are_not_there(chunk):
    x, dt, A, B, C, D, state = inputs(30, 2, 1, 4, 4)
    keep = torch.ones(30, dtype=torch.bool)
    keep[[0, 1, 2, 11, 12, 28, 29]] = False
    y, final = ssd(x, dt * keep[:, None], A, B, C, initial_state=state, return_final_state=True, chunk_size=chunk)
    short, short_final = ssd(
        x[:, keep], dt[:, keep], A, B[:, keep], C[:, keep], initial_state=state, return_final_state=True
    )
    assert_close(y[:, keep], short, atol=1e-4, rtol=1e-4)
    assert_close(final, short_final, atol=1e-4, rtol=1e-4)
    empty = ssd(x, torch.zeros_like(dt), A, B, C, initial_state=state, return_final_state=True, chunk_size=chunk)[1]
    assert torch.equal(empty, state)


def test_no_positions_leave_the_state():
    x, dt, A, B, C, D, state = inputs(0, 4, 2, 4, 6)
    for f in (ssd, ssd_reference):
        y, final = f(x, dt, A, B, C, D=D, initial_state=state, return_final_state=True)
        assert y.shape == (2, 0, 4, 4) and torch.equal(final, state)
        assert f(x, dt, A, B, C, return_final_state=True)[1].eq(0).all()


def test_groups_are_consecutive_heads():
    x, dt, A, B, C, D, _ = inputs(12, 4, 2, 4, 4)
    y = ssd(x, dt, A, B, C)
    for head in range(4):
        alone = ssd(x[:, :, [head]], dt[:, :, [head]], A[[head]], B[:, :, [head // 2]], C[:, :, [head // 2]])
        assert_close(y[:, :, [head]], alone)


@pytest.mark.parametrize("decay", [-1e-6, -50.0, -1e4])
def test_extreme_decays_stay_finite(decay):
    x, dt, _, B, C, _, _ = inputs(100, 2, 1, 4, 4)
    A = torch.full((2,), decay)
    for ours, reference in zip(
        outputs_and_gradients(ssd, (x, dt, A, B, C, None, None), chunk_size=32),
        outputs_and_gradients(ssd_reference, (x, dt, A, B, C, None, None)),
    ):
        assert ours.isfinite().all()
        assert_close(ours, reference, atol=1e-3 * max(1, reference.abs().max().item()), rtol=1e-3)


# what the log decay of half the positions is, and of the others
LOG_DECAYS = {
    "all small": (-0.01, -0.01),
    "usual": (-1.0, -1.0),
    "some padding": (-10.0, 0.0),
    "large, padding": (-100.0, 0.0),
    "large and small": (-1000.0, -0.01),
    "large and minute": (-1000.0, -1e-6),
    "huge": (-1e6, -0.1),
}


def relative_errors(f, reference, args):
    "Of outputs and gradients in float32 against the reference in float64; what is below 1e-25 counts as 0."
    exact = outputs_and_gradients(reference, [v if v is None else v.double() for v in args])
    return [
        ((a.double() - b).norm() / (b.norm() + 1e-25)).item() for a, b in zip(outputs_and_gradients(f, args), exact)
    ]


@pytest.mark.parametrize("steps", LOG_DECAYS.values(), ids=LOG_DECAYS)
def test_accuracy_does_not_depend_on_the_steps(steps):
    x, dt, A, B, C, D, state = inputs(130, 4, 2, 8, 8)
    large = torch.rand(dt.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    dt, A = dt * torch.where(large, *(-s for s in steps)), -torch.linspace(0.5, 1.5, 4)
    assert max(relative_errors(ssd, ssd_reference, (x, dt, A, B, C, D, state))) < 3e-6


CUTS = {"several": [0, 5, 24, 25, 60], "an empty one": [0, 16, 16, 30, 60], "one": [0, 60]}


def each_alone(ends):
    "The reference of every sequence by itself, with the signature of `ssd`."

    def f(x, dt, A, B, C, *, D, initial_state=None, return_final_state=False):
        states = [None] * (len(ends) - 1) if initial_state is None else [s[None] for s in initial_state]
        results = [
            ssd_reference(
                *(v[:, i:j] for v in (x, dt)),
                A,
                *(v[:, i:j] for v in (B, C)),
                D=D,
                initial_state=s,
                return_final_state=True,
            )
            for i, j, s in zip(ends, ends[1:], states)
        ]
        y, state = (torch.cat(parts, dim) for parts, dim in zip(zip(*results), (1, 0)))
        return (y, state) if return_final_state else y

    return f


def packed_inputs(ends, dtype=torch.float32, states=True):
    *args, _ = inputs(ends[-1], 4, 2, 4, 6, dtype, batch=1)
    return [*args, torch.randn(len(ends) - 1, 4, 4, 6, generator=torch.Generator().manual_seed(1)) if states else None]


@pytest.mark.parametrize("f", [ssd, ssd_reference])
@pytest.mark.parametrize("ends", CUTS.values(), ids=CUTS)
def test_packed_sequences_do_not_see_each_other(f, ends):
    args = packed_inputs(ends)
    packed = outputs_and_gradients(f, args, cu_seqlens=torch.tensor(ends), **(dict(chunk_size=16) if f is ssd else {}))
    for ours, reference in zip(packed, outputs_and_gradients(each_alone(ends), args)):
        assert_close(ours, reference, atol=1e-4 * max(1, reference.abs().max().item()), rtol=1e-4)


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(ssd, backend="aot_eager", fullgraph=True)
    for length in (50, 70):
        args = inputs(length, 2, 1, 4, 4)
        for ours, eager in zip(outputs_and_gradients(compiled, args), outputs_and_gradients(ssd, args)):
            assert_close(ours, eager, atol=1e-4, rtol=1e-4)


class Module(torch.nn.Module):
    "What `torch.export` takes."

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *args):
        return self.f(*args, return_final_state=True)


def exports_at_any_length(f, reference, inputs):
    "inputs(length, batch) are f's, all but the tensors of one dimension with the two in front."
    sizes = {0: torch.export.Dim("batch", min=1, max=9), 1: torch.export.Dim("length", min=1, max=300)}
    example = inputs(40, 2)
    program = torch.export.export(
        Module(f), example, dynamic_shapes=(tuple({} if v.ndim == 1 else sizes for v in example),)
    ).module()
    for length, batch in ((1, 2), (5, 1), (32, 2), (33, 3), (200, 2)):
        args = inputs(length, batch)
        for ours, theirs in zip(program(*args), reference(*args, return_final_state=True)):
            assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_exports_at_any_length():
    exports_at_any_length(ssd, ssd_reference, lambda length, batch: inputs(length, 4, 2, 4, 6, batch=batch)[:5])


def test_operators_are_what_they_declare():
    x, dt, A, B, C, D, state = inputs(12, 4, 2, 4, 6)
    torch.library.opcheck(
        torch.ops.heed_nb.ssd_chunks, (*(v.requires_grad_() for v in (x, dt, A, B, C, state)), 4, True)
    )


# The choice of a backend

HERE = dict(device="cuda", dtype=torch.bfloat16, needs_grad=True, unusable={}, capability=(9, 0), triton="3.7.1")
NO_MAMBA_SSM = dict(unusable=dict(mamba_ssm="is not installed"))
NO_FLA = dict(unusable=dict(fla="is not installed"))
CHOICES = {  # what differs from HERE: the choice among ssd's kernels and among gated_delta's
    "both installed": ({}, "mamba_ssm", "fla"),
    "no mamba-ssm": (NO_MAMBA_SSM, "fla", "fla"),
    "nothing installed": (dict(unusable=dict.fromkeys(KERNELS, "is not installed")), "torch", "torch"),
    "on the CPU": (dict(device="cpu", capability=None), "torch", "torch"),
    "on Apple's GPU": (dict(device="mps", capability=None), "torch", "torch"),
    "float64": (dict(dtype=torch.float64), "torch", "torch"),
    "Hopper, a Triton with a wrong gradient": (dict(triton="3.6.0"), "mamba_ssm", "torch"),
    "the same without mamba-ssm": (dict(triton="3.7.0", **NO_MAMBA_SSM), "torch", "torch"),
    "the same without a gradient": (dict(triton="3.4.0", **NO_MAMBA_SSM, needs_grad=False), "fla", "fla"),
    "a transform": (dict(transformed=True), "torch", "torch"),
    "an older Triton": (dict(triton="3.3.1", **NO_MAMBA_SSM), "fla", "fla"),
    "a later Triton": (dict(triton="3.10.0", **NO_MAMBA_SSM), "fla", "fla"),
    "a GPU that is not Hopper": (dict(triton="3.6.0", **NO_MAMBA_SSM, capability=(8, 0)), "fla", "fla"),
}


@pytest.mark.parametrize("differs, for_ssd, for_delta", CHOICES.values(), ids=CHOICES)
def test_auto_is_the_first_that_runs(differs, for_ssd, for_delta):
    assert choose_backend("auto", KERNELS, **{**HERE, **differs}) == for_ssd
    assert choose_backend("auto", ("fla",), **{**HERE, **differs}) == for_delta
    assert choose_backend("torch", KERNELS, **{**HERE, **differs}) == "torch"


REFUSALS = {
    "missing": (
        "mamba_ssm",
        NO_MAMBA_SSM,
        r"mamba_ssm is not installed \(pip install --no-build-isolation mamba-ssm\)",
    ),
    "missing fla": ("fla", NO_FLA, r"fla is not installed \(pip install flash-linear-attention\)"),
    "on the CPU": ("fla", dict(device="cpu", capability=None), "needs tensors on a GPU, these are on cpu"),
    "float64": ("mamba_ssm", dict(dtype=torch.float64), "has no torch.float64"),
    "wrong gradient": ("fla", dict(triton="3.6.0"), "gradient is wrong on Hopper GPUs with Triton 3.6.0"),
    "forward mode": ("fla", dict(transformed=True), "no forward-mode derivatives and no transforms of torch.func"),
    "unknown": ("cuda", {}, "unknown backend 'cuda'; one of auto, torch, mamba_ssm, fla"),
}


@pytest.mark.parametrize("name, differs, message", REFUSALS.values(), ids=REFUSALS)
def test_a_backend_by_name_runs_or_says_why_not(name, differs, message):
    with pytest.raises(ValueError, match=message) as error:
        choose_backend(name, KERNELS, **{**HERE, **differs})
    assert "\n" not in str(error.value)


def test_a_kernel_by_name_refuses_tensors_on_the_cpu():
    x, dt, A, B, C, D, state = inputs(6, 4, 2, 4, 4)
    for kernel in KERNELS:
        with pytest.raises(
            ValueError, match=f"backend '{kernel}' can't run: .*needs tensors on a GPU, these are on cpu"
        ):
            ssd(x, dt, A, B, C, backend=kernel)


PACKAGES = {  # what a package on the path holds: why it is no kernel
    "broken": (
        {"mamba_ssm/__init__.py": "raise ImportError('selective_scan_cuda.so: undefined\\nsymbol')"},
        r"mamba_ssm can't be imported: ImportError: selective_scan_cuda.so: undefined symbol \(pip install --no-build-isolation mamba-ssm\)",
    ),
    "for another torch": (
        {"mamba_ssm/__init__.py": "import torch; torch.amp.custom_forward"},
        "mamba_ssm can't be imported: AttributeError: .*custom_forward",
    ),
    "a folder of that name": (
        {"mamba_ssm/notes.txt": ""},
        "mamba_ssm can't be imported: ModuleNotFoundError: No module named 'mamba_ssm.ops'",
    ),
}


@pytest.mark.parametrize("files, message", PACKAGES.values(), ids=PACKAGES)
def test_a_package_that_cannot_be_imported_is_no_kernel(files, message, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for name in list(sys.modules):
        if name.partition(".")[0] == "mamba_ssm":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(heed_nb.ssd, "_found", heed_nb.ssd._found.__wrapped__)
    assert (
        choose_backend(
            "auto", KERNELS, **{**HERE, "unusable": heed_nb.ssd._machine(None)["unusable"] | NO_FLA["unusable"]}
        )
        == "torch"
    )
    x, dt, A, B, C, D, state = inputs(6, 4, 2, 4, 4)
    with pytest.raises(ValueError, match=message) as error:
        ssd(x, dt, A, B, C, backend="mamba_ssm")
    assert "\n" not in str(error.value)
    sys.modules.pop("mamba_ssm", None)


# The way to a kernel: stand-ins with the packages' signatures and demands, which compute on the CPU


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
):
    assert x.dtype == B.dtype == C.dtype and dt.dtype == A.dtype == torch.float32 and B.shape == C.shape
    assert z is dt_bias is cu_seqlens is None and not dt_softplus
    assert initial_states is None or initial_states.dtype == torch.float32 and len(initial_states) == len(x)
    if seq_idx is None:
        y, state = ssd_reference(x, dt, A, B, C, D=D, initial_state=initial_states, return_final_state=True)
    else:
        assert (
            seq_idx.shape == x.shape[:2]
            and seq_idx.dtype == torch.int32
            and initial_states is None
            and not return_final_states
        )
        y = torch.cat(
            [
                ssd_reference(
                    *(v[:, seq_idx[0] == i] for v in (x, dt)), A, *(v[:, seq_idx[0] == i] for v in (B, C)), D=D
                )
                for i in seq_idx[0].unique()
            ],
            1,
        )
    return (y, state) if return_final_states else y


def chunk_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, **kwargs
):
    assert (
        q.shape == k.shape
        and q.shape[:3] == v.shape[:3]
        and q.dtype == k.dtype == v.dtype
        and g.dtype == torch.float32
        and not kwargs
    )
    ends = [0, v.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    assert cu_seqlens is None or len(v) == 1 and cu_seqlens.dtype == torch.int64
    shape = (len(v) if cu_seqlens is None else len(ends) - 1, v.shape[2], q.shape[-1], v.shape[-1])
    initial_state = torch.zeros(shape) if initial_state is None else initial_state
    assert initial_state.shape == shape and initial_state.dtype == torch.float32 and initial_state.is_contiguous()
    ys, states, scale = [], [], q.shape[-1] ** -0.5 if scale is None else scale
    for sequence, (i, j) in enumerate(zip(ends, ends[1:])):
        state = initial_state if cu_seqlens is None else initial_state[[sequence]]
        for t in range(i, j):
            state = g[:, t, :, None, None].exp() * state + k[:, t, :, :, None].float() * v[:, t, :, None].float()
            ys.append((scale * q[:, t, :, None].float() @ state)[:, :, 0])
        states.append(state)
    return torch.stack(ys, 1).to(q.dtype), torch.cat(states) if output_final_state else None


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    monkeypatch.setitem(
        sys.modules,
        "mamba_ssm.ops.triton.ssd_combined",
        SimpleNamespace(mamba_chunk_scan_combined=mamba_chunk_scan_combined),
    )
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", SimpleNamespace(chunk_simple_gla=chunk_simple_gla))
    monkeypatch.setattr(heed_nb.ssd, "_backend", lambda backend, *_: request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("initial_state", [False, True], ids=["zeros", "initial state"])
def test_kernels_get_what_they_expect(kernel, dtype, initial_state):
    args = inputs(12, 4, 2, 4, 6, dtype, initial_state)
    ours, reference = outputs_and_gradients(ssd, args), outputs_and_gradients(ssd_reference, args)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32 and ours[1].shape == reference[1].shape
    for a, b in zip(ours, reference):
        assert (a.float() - b.float()).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * b.float().norm()
    x, dt, A, B, C, D, state = args
    y = ssd(x, dt, A, B, C, initial_state=state)
    assert torch.is_tensor(y) and (y - ssd_reference(x, dt, A, B, C, initial_state=state)).norm() <= 1e-2 * y.norm()


@pytest.mark.parametrize("output", [0, 1], ids=["y", "state"])
def test_a_kernel_s_gradient_is_not_differentiated(kernel, output):
    *args, state = (v.requires_grad_() for v in inputs(6, 4, 2, 4, 6))
    value = ssd(*args[:5], D=args[5], initial_state=state, return_final_state=True)[output].sum()
    torch.autograd.grad(value, args[0], retain_graph=True)
    with pytest.raises(RuntimeError, match=f"backend '{kernel}' has no second derivatives"):
        torch.autograd.grad(value, args[0], create_graph=True)


@pytest.mark.parametrize("states", [False, True], ids=["no states", "states"])
@pytest.mark.parametrize("ends", CUTS.values(), ids=CUTS)
def test_kernels_keep_packed_sequences_apart(kernel, ends, states):
    args, cu_seqlens = packed_inputs(ends, states=states), torch.tensor(ends, dtype=torch.int32)
    if states:
        pair = outputs_and_gradients(ssd, args, cu_seqlens=cu_seqlens), outputs_and_gradients(each_alone(ends), args)
    else:
        pair = []
        for f in (lambda *args, D: ssd(*args, D=D, cu_seqlens=cu_seqlens), each_alone(ends)):
            leaves = [v.detach().clone().requires_grad_() for v in args[:6]]
            y = f(*leaves[:5], D=leaves[5])
            pair.append([y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), leaves)])
    for a, b in zip(*pair):
        assert_close(a, b, atol=1e-4 * max(1, b.abs().max().item()), rtol=1e-4)


def test_bad_input():
    x, dt, A, B, C, D, state = inputs(6, 4, 2, 4, 4)
    with pytest.raises(ValueError, match="unknown backend 'cuda'; one of auto, torch, mamba_ssm, fla"):
        ssd(x, dt, A, B, C, backend="cuda")
    with pytest.raises(ValueError, match="chunk_size is 0"):
        ssd(x, dt, A, B, C, chunk_size=0)
    with pytest.raises(ValueError, match=r"dt has shape \[2, 5, 4\], expected \[2, 6, 4\]"):
        ssd(x, dt[:, 1:], A, B, C)
    with pytest.raises(ValueError, match="3 groups do not divide 4 heads"):
        ssd(x, dt, A, torch.ones(2, 6, 3, 4), torch.ones(2, 6, 3, 4))
    with pytest.raises(ValueError, match="initial_state has shape"):
        ssd_reference(x, dt, A, B, C, initial_state=state[:1])
    with pytest.raises(ValueError, match="packs sequences in one row, got a batch of 2"):
        ssd(x, dt, A, B, C, cu_seqlens=torch.tensor([0, 6]))
    one = [v if v.ndim == 1 else v[:1] for v in (x, dt, A, B, C)]
    with pytest.raises(ValueError, match=r"cu_seqlens is a tensor of two integers or more, got a list"):
        ssd(*one, cu_seqlens=[0, 6])
    with pytest.raises(ValueError, match=r"cu_seqlens rises from 0 to 6, got \[0, 4, 3, 6\]"):
        ssd(*one, cu_seqlens=torch.tensor([0, 4, 3, 6]))
    with pytest.raises(ValueError, match=r"initial_state has shape \[2, 4, 4, 4\], expected \[3, 4, 4, 4\]"):
        ssd(*one, cu_seqlens=torch.tensor([0, 2, 3, 6]), initial_state=state)
