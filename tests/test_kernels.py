"The choice of a kernel, and the way to it: stand-ins for the packages, which compute on the CPU."

import sys
from types import SimpleNamespace

import pytest
import torch

import heed_nb.gated_delta
import heed_nb.recurrence
import heed_nb.ssd
from heed_nb.gated_delta import gated_delta_reference
from heed_nb.recurrence import choose_backend
from heed_nb.ssd import KERNELS, ssd, ssd_reference
from test_recurrences import DELTA, SSD
from tiny import fails

torch.set_num_threads(1)

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
    assert choose_backend("auto", KERNELS, **HERE | differs) == for_ssd
    assert choose_backend("auto", ("fla",), **HERE | differs) == for_delta
    assert choose_backend("torch", KERNELS, **HERE | differs) == "torch"


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
    fails(message, choose_backend, name, KERNELS, **HERE | differs)


PACKAGES = {  # what a package on the path holds: why it is no kernel
    "broken": (
        {"mamba_ssm/__init__.py": "raise ImportError('selective_scan_cuda.so: undefined\\nsymbol')"},
        r"mamba_ssm can't be imported: ImportError: selective_scan_cuda.so: undefined symbol \(pip install --no-build",
    ),
    "for another torch": (
        {"mamba_ssm/__init__.py": "import torch; torch.amp.custom_forward"},
        "mamba_ssm can't be imported: AttributeError: .*custom_forward",
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
    monkeypatch.setattr(heed_nb.recurrence, "_found", heed_nb.recurrence._found.__wrapped__)
    unusable = heed_nb.recurrence._machine(None)["unusable"] | NO_FLA["unusable"]
    assert choose_backend("auto", KERNELS, **HERE | dict(unusable=unusable)) == "torch"
    fails(message, ssd, *SSD.inputs(6, 4, 2, 4, 4)[:5], backend="mamba_ssm")
    sys.modules.pop("mamba_ssm", None)


# The way to a kernel: stand-ins with the packages' signatures and demands


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, initial_states=None, return_final_states=False):
    assert x.dtype == B.dtype == C.dtype and dt.dtype == A.dtype == torch.float32 and B.shape == C.shape
    assert initial_states is None or initial_states.dtype == torch.float32 and len(initial_states) == len(x)
    return ssd_reference(x, dt, A, B, C, D=D, initial_state=initial_states, return_final_state=return_final_states)


def chunk_simple_gla(q, k, v, g=None, scale=None, initial_state=None, output_final_state=False):
    assert q.shape == k.shape and q.shape[:3] == v.shape[:3]
    assert q.dtype == k.dtype == v.dtype and g.dtype == torch.float32
    shape = (len(v), v.shape[2], q.shape[-1], v.shape[-1])
    state = torch.zeros(shape) if initial_state is None else initial_state
    assert state.shape == shape and state.dtype == torch.float32 and state.is_contiguous()
    ys, scale = [], q.shape[-1] ** -0.5 if scale is None else scale
    for t in range(v.shape[1]):
        state = g[:, t, :, None, None].exp() * state + k[:, t, :, :, None].float() * v[:, t, :, None].float()
        ys.append((scale * q[:, t, :, None].float() @ state)[:, :, 0])
    return torch.stack(ys, 1).to(q.dtype), state if output_final_state else None


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
    assert q.shape == k.shape and q.shape[:3] == v.shape[:3]
    assert q.dtype == k.dtype == v.dtype and g.dtype == beta.dtype == torch.float32
    assert initial_state is None or initial_state.dtype == torch.float32
    options = dict(scale=scale, initial_state=initial_state, return_final_state=True)
    y, state = gated_delta_reference(q, k, v, g, beta, **options)
    return y, state if output_final_state else None


STAND_INS = {
    "mamba_ssm.ops.triton.ssd_combined": mamba_chunk_scan_combined,
    "fla.ops.simple_gla": chunk_simple_gla,
    "fla.ops.gated_delta_rule": chunk_gated_delta_rule,
}


@pytest.fixture(
    params=[(SSD, "mamba_ssm"), (SSD, "fla"), (DELTA, "fla")], ids=["ssd-mamba_ssm", "ssd-fla", "delta-fla"]
)
def op(request, monkeypatch):
    "An operator on a kernel."
    operator, kernel = request.param
    for module, f in STAND_INS.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{f.__name__: f}))
    monkeypatch.setattr(sys.modules[operator.chunked.__module__], "backend_for", lambda *_: kernel)
    return operator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("initial_state", [False, True], ids=["zeros", "initial state"])
def test_kernels_get_what_they_expect(op, dtype, initial_state):
    args, close = op.inputs(12, 4, 2, 4, 6, dtype, initial_state), 1e-5 if dtype == torch.float32 else 1e-2
    options = [{}] if op is SSD else [{}, dict(scale=0.7)]
    for how in options:
        ours, reference = (op.gradients(f, args, **how) for f in ("chunked", "reference"))
        assert ours[0].dtype == dtype and ours[1].dtype == torch.float32 and ours[1].shape == reference[1].shape
        for a, b in zip(ours, reference):
            assert (a.float() - b.float()).norm() <= close * b.float().norm()
    y, expected = (f(*args[:5], initial_state=args[-1]) for f in (op.chunked, op.reference))
    assert torch.is_tensor(y) and (y - expected).norm() <= 1e-2 * y.norm()


@pytest.mark.parametrize("output", [0, 1], ids=["y", "state"])
def test_a_kernel_s_gradient_is_not_differentiated(op, output):
    args = [v.requires_grad_() for v in op.inputs(6, 4, 2, 4, 6)]
    value = op.call("chunked", args)[output].sum()
    torch.autograd.grad(value, args[0], retain_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="backend '(mamba_ssm|fla)' has no second derivatives"):
        torch.autograd.grad(value, args[1], create_graph=True)
