"""The kernels of mamba-ssm and fla, and the torch form on a GPU, against the recurrence in float64
at the shapes of an 8B model; hybrids of the toy teachers on each kernel against the same on the torch form.

    pytest -n0 -rPs tests/test_kernels_gpu.py

prints every error, and why anything was skipped.
"""

import pytest
import torch
import torch.nn.functional as F

import heed_nb.gated_delta
import heed_nb.ssd
import tiny
from heed_nb.gated_delta import gated_delta, gated_delta_reference
from heed_nb.hybrid import to_hybrid
from heed_nb.ssd import KERNELS, ssd, ssd_reference
from heed_nb.teachers import load_teacher

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

B, T, H, G, WIDTH = 2, 300, 32, 8, 128  # T: no multiple of any chunk
# the largest norm of an error beside the norm of what is right; float32 products run in TF32 in the kernels
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 2e-2}
grads = pytest.mark.parametrize("needs_grad", [True, False], ids=["gradient", "forward"])
states = pytest.mark.parametrize("states", [False, True], ids=["zeros", "states"])
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def inputs(operation, dtype, states):
    "Arguments by name; what is float32 in a mixer stays float32."
    generator = torch.Generator("cuda").manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, device="cuda")
    unit = lambda: F.normalize(normal(B, T, G, WIDTH), dim=-1).to(dtype)
    state = normal(B, H, WIDTH, WIDTH) if states else None
    wide, narrow = normal(B, T, H, WIDTH).to(dtype), normal(B, T, H)
    if operation == "ssd":
        args = dict(x=wide, dt=F.softplus(narrow), A=-normal(H).exp(), B=unit(), C=unit(), D=normal(H))
    else:
        args = dict(q=unit(), k=unit(), v=wide, g=-0.1 * F.softplus(narrow), beta=normal(B, T, H).sigmoid())
    return {**args, "initial_state": state}


def results(f, args, dtype, needs_grad, states, **kwargs):
    "Output, final state where there are states, and gradients, by name."
    leaves = {
        name: None
        if v is None
        else (v.double() if dtype is torch.float64 else v).detach().clone().requires_grad_(needs_grad)
        for name, v in args.items()
    }
    y = f(**leaves, return_final_state=states, **kwargs)
    named = dict(y=y[0], state=y[1]) if states else dict(y=y)
    if needs_grad:
        generator = torch.Generator("cuda").manual_seed(1)
        weights = [
            torch.randn(v.shape, generator=generator, device="cuda").bfloat16() for v in named.values()
        ]  # the same after rounding
        loss = sum((v.double() * weight).sum() for v, weight in zip(named.values(), weights))
        there = {name: v for name, v in leaves.items() if v is not None}
        named |= {f"d{name}": grad for name, grad in zip(there, torch.autograd.grad(loss, there.values()))}
    return {name: v.detach().double() for name, v in named.items()}


def held_against_the_recurrence(operation, backend, dtype, states, needs_grad):
    f, reference = dict(ssd=(ssd, ssd_reference), gated_delta=(gated_delta, gated_delta_reference))[operation]
    args = inputs(operation, dtype, states)
    try:
        ours = results(f, args, dtype, needs_grad, states, backend=backend)
    except ValueError as refusal:
        if f"backend {backend!r} can't run" not in str(refusal):
            raise
        pytest.skip(str(refusal))
    expected = results(reference, args, torch.float64, needs_grad, states)
    errors = {name: ((ours[name] - v).norm() / v.norm()).item() for name, v in expected.items()}
    print(
        f"{operation} {backend} {dtype} states={states}:",
        ", ".join(f"{name} {error:.1e}" for name, error in errors.items()),
    )
    bound = 1e-4 if (backend, dtype) == ("torch", torch.float32) else TOLERANCE[dtype]
    assert ours.keys() == expected.keys() and max(errors.values()) < bound, errors


@grads
@states
@dtypes
@pytest.mark.parametrize("backend", ["auto", "torch", *KERNELS])
def test_ssd(backend, dtype, states, needs_grad):
    held_against_the_recurrence("ssd", backend, dtype, states, needs_grad)


@grads
@states
@dtypes
@pytest.mark.parametrize("backend", ["auto", "torch", "fla"])
def test_gated_delta(backend, dtype, states, needs_grad):
    held_against_the_recurrence("gated_delta", backend, dtype, states, needs_grad)


@pytest.mark.parametrize("operation, kernel", [("ssd", "mamba_ssm"), ("ssd", "fla"), ("gated_delta", "fla")])
def test_a_kernel_by_name_refuses_tensors_on_the_cpu(operation, kernel):
    args = {name: v if v is None else v.cpu() for name, v in inputs(operation, torch.float32, False).items()}
    with pytest.raises(ValueError, match="these are on cpu"):
        dict(ssd=ssd, gated_delta=gated_delta)[operation](**args, backend=kernel)


# Hybrids

TOY = dict(qwen3_vl="toy-qwen3vl", internvl="toy-internvl", glm4v="toy-glm4v", minicpmv="toy-minicpmv")


def hybrid_errors(root, family, mixer, backend, dtype, device, monkeypatch):
    "Of a left-padded batch's logits: kernel beside torch form; prefill by kernel and torch steps beside no cache."
    teacher, processor = load_teacher(root / "outputs/teachers" / TOY[family], dtype=dtype)
    student = to_hybrid(teacher.to(device), mixer=mixer, init="mamba")
    batch = {key: value.to(device) for key, value in tiny.batch_of(tiny.samples(family), processor).items()}
    assert not batch["attention_mask"][:, 0].all()
    choose = heed_nb.ssd.backend_for

    def logits(backend, use_cache):
        for module in (heed_nb.ssd, heed_nb.gated_delta):
            monkeypatch.setattr(module, "backend_for", lambda _, *args: choose(backend, *args))
        out = student.generate(
            **batch,
            use_cache=use_cache,
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            prefix_allowed_tokens_fn=lambda _, ids: [20 + len(ids) % 7],
        )  # the same text whatever the logits
        monkeypatch.undo()
        return torch.stack(out.logits).float()

    expected, plain, cached = logits("torch", False), logits(backend, False), logits(backend, True)
    return {
        name: ((a - b).norm() / b.norm()).item()
        for name, a, b in (("kernel", plain, expected), ("cache", cached, plain))
    }


@dtypes
@pytest.mark.parametrize("mixer, backend", [*(("mamba2", kernel) for kernel in KERNELS), ("gdn", "fla")])
@pytest.mark.parametrize("family", TOY)
@torch.no_grad()
def test_hybrids(family, mixer, backend, dtype, monkeypatch, root):
    try:
        errors = hybrid_errors(root, family, mixer, backend, dtype, "cuda", monkeypatch)
    except ValueError as refusal:
        if f"backend {backend!r} can't run" not in str(refusal):
            raise
        pytest.skip(str(refusal))
    print(f"{family} {mixer} {backend} {dtype}:", ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    assert max(errors.values()) < 3 * TOLERANCE[dtype], errors  # through four layers; not yet measured on a GPU
