"""What the weights of C4 and C5 add to a training step of C3, computed at each step or read from a cache.

    python benchmarks/training_step.py [--teacher outputs/teachers/toy-qwen3vl] [--documents 4] [--steps 40]

Prints a Markdown table. A step is what Stage 2 does with a batch of toy documents: tower, teacher, weights, student,
loss and backward. The optimiser, the same for all, is left out. Every batch goes through all rows in turn. A time is
the median over the batches: CPU time with one thread, which other processes disturb less, else wall time. A ratio is
the median of the batches' ratios.
"""

import argparse
import statistics
import time
from functools import partial

import torch

from heed_nb.cached_weights import record_values, with_cache_keys
from heed_nb.conditions import CONDITIONS, TrainSettings
from heed_nb.data import collate
from heed_nb.files import root
from heed_nb.hybrid import mixer_parameters, to_hybrid
from heed_nb.objective import step_loss
from heed_nb.streams import pair_with_teacher
from heed_nb.teachers import family_of, load_teacher
from heed_nb.toyworld import Documents
from heed_nb.weight_cache import quantize

WARM_UP = 3  # batches that are not counted


def main(teacher, documents, steps):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    teacher, processor = load_teacher(root() / teacher)
    student, dataset, to_batch = to_hybrid(teacher.to(device)), Documents(seed=0), partial(collate, processor=processor)
    settings = TrainSettings(token_budget=1_000_000, batch_size=documents)
    pair_with_teacher(student, teacher)
    student.to(device).train().requires_grad_(False)
    for parameter in mixer_parameters(student).values():
        parameter.requires_grad_(True)

    def seconds(condition, cached, samples):
        "Of a step; reading the records is part of it, their keys are made where batches are."
        batch, records = with_cache_keys(to_batch, condition, samples).to(device), None
        if cached:
            values = record_values(student, batch, condition, settings)
            records = {key: quantize(of.cpu().numpy()) for key, of in zip(batch.cache_keys, values)}
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = clock()
        step_loss(2, student, family_of(student), batch, condition, settings, records)["loss"].backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent = clock() - start
        student.zero_grad()
        return spent

    rows = {
        "C3": ("C3", False),
        "C4": ("C4", False),
        "C4, from a density cache": ("C4", True),
        "C5": ("C5", False),
        "C5, from a gradient cache": ("C5", True),
    }
    times = {name: [] for name in rows}
    for step in range(WARM_UP + steps):
        samples = [dataset[i] for i in range(step * documents, (step + 1) * documents)]
        for name in list(rows)[:: 1 if step % 2 else -1]:
            times[name].append(seconds(CONDITIONS[rows[name][0]], rows[name][1], samples))
    where = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{where}; {steps} batches of {documents} documents\n")
    print("| weights | a step | over C3 |\n|---|---|---|")
    for name in rows:
        ratios = [own / base for own, base in zip(times[name][WARM_UP:], times["C3"][WARM_UP:])]
        step = statistics.median(times[name][WARM_UP:])
        print(f"| {name} | {1000 * step:.0f} ms | {statistics.median(ratios) - 1:+.1%} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--teacher", default="outputs/teachers/toy-qwen3vl", help="its folder, relative to the repository"
    )
    parser.add_argument("--documents", type=int, default=4, help="a batch")
    parser.add_argument("--steps", type=int, default=40, help="batches that are counted")
    main(**vars(parser.parse_args()))
