"""The chunked recurrences on a CPU beside the torch fallbacks of transformers: time and memory of forward and backward.

    python benchmarks/recurrences.py [--threads 1] [--rounds 3]

Prints a Markdown table. Both sides get the same inputs, and their outputs and gradients are compared. Rounds alternate
between them. A time is the median over the rounds: CPU time with one thread, which other processes disturb less, else
wall time. `faster` is the median of the rounds' ratios. Memory is the peak of a fresh process above what it held with
the inputs made. transformers takes SSD's chunk size from a model's configuration: most have 256, while 64 and 32 suit a
CPU. Its gated delta rule has 64 by default.
"""

import argparse
import inspect
import multiprocessing
import resource
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from heed_nb.gated_delta import gated_delta
from heed_nb.ssd import ssd

SHAPES = (2, 1024, 8, 32), (1, 4096, 8, 64)  # B, T, H, head dimension
# unwrapped, so that no kernel that happens to be installed is called instead
scan, delta = inspect.unwrap(mamba2_chunk_scan), inspect.unwrap(torch_chunk_gated_delta_rule)
OPERATIONS = {  # ours, theirs with their chunk size, the chunk sizes
    "SSD": (ssd, lambda *args, size: scan(*args, chunk_size=size), (256, 64, 32)),
    "gated delta rule": (gated_delta, lambda *args, size: delta(*args, chunk_size=size)[0], (64, 32)),
}
COLUMNS = (
    "",
    "B, T, H, D",
    "transformers' chunk",
    *"ms, transformers|ms, ours|faster|MiB, transformers|MiB, ours".split("|"),
)


def inputs(operation, B, T, H, D):
    "Leaves for the operation and a gradient for its output."
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    unit = lambda: F.normalize(normal(B, T, H, D), dim=-1)
    if operation == "SSD":
        args = normal(B, T, H, D), F.softplus(normal(B, T, H)), -normal(H).exp(), unit(), unit()
    else:
        args = unit(), unit(), normal(B, T, H, D), -F.softplus(normal(B, T, H)), normal(B, T, H).sigmoid()
    return [a.requires_grad_() for a in args], normal(B, T, H, D)


def run(f, args, dy):
    "Output and gradients of one forward and backward."
    y = f(*args)
    return y.detach(), *torch.autograd.grad(y, args, dy)


def seconds(f, args, dy):
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run(f, args, dy)
    return clock() - start


def peak(f, operation, shape):
    "MiB that one forward and backward needs on top of its inputs, in a process of its own."

    def child(pipe):
        args, dy = inputs(operation, *shape)
        held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        run(f, args, dy)
        pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held) / 2**20)

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender,))
    process.start()
    process.join()
    return receiver.recv()


def rivals(operation):
    "By chunk size, 0 for ours: functions of the same arguments."
    ours, theirs, sizes = OPERATIONS[operation]
    return {0: ours} | {size: lambda *args, size=size: theirs(*args, size=size) for size in sizes}


def compared(operation, shape, memory, rounds):
    "The rows of the table for an operation at a shape."
    args, dy = inputs(operation, *shape)
    (_, ours), *others = rivals(operation).items()
    expected = run(ours, args, dy)
    for size, theirs in others:
        for a, b in zip(run(theirs, args, dy), expected, strict=True):
            assert (a - b).norm() < 1e-4 * b.norm(), (operation, shape, size)
        pairs = [(seconds(theirs, args, dy), seconds(ours, args, dy)) for _ in range(rounds)]
        times = [f"{1e3 * statistics.median(side):.0f}" for side in zip(*pairs)]
        faster = f"{statistics.median(a / b for a, b in pairs):.1f} x"
        yield operation, ", ".join(map(str, shape)), size, *times, faster, f"{memory[size]:.0f}", f"{memory[0]:.0f}"


def main(threads, rounds):
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    cases = [(operation, shape) for operation in OPERATIONS for shape in SHAPES]
    memory = [
        {size: peak(f, *case) for size, f in rivals(case[0]).items()} for case in cases
    ]  # before this process grows
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, {threads} thread(s), float32, forward + backward\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{len(COLUMNS) * '---|'}")
    for case, held in zip(cases, memory):
        for row in compared(*case, held, rounds):
            print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    main(**vars(parser.parse_args()))
