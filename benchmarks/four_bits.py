"""The cost of four bits: runs of C4 or C5 with weights from a cache beside runs that compute them at each step.

    python benchmarks/four_bits.py [--scale toy] [--condition C4] [--seeds 0 1 2]

For each seed it builds the cache that the run reads, distils and evaluates with it, and prints a Markdown table. The
runs that compute their weights are those of `make all`, and must be there.
"""

import argparse
import os
import statistics
from functools import partial
from pathlib import Path

from heed_nb.batch import run_notebook
from heed_nb.cached_weights import build_density_cache, build_gradient_cache
from heed_nb.conditions import get_condition
from heed_nb.data import collate
from heed_nb.files import root
from heed_nb.hybrid import to_hybrid
from heed_nb.runs import read_run, run_name
from heed_nb.scales import load_scale
from heed_nb.schedule import batch_indices
from heed_nb.statistics import AVERAGES, TITLES
from heed_nb.streams import replaced_indices
from heed_nb.tables import markdown_table
from heed_nb.teachers import load_teacher
from heed_nb.toyworld import Documents

ROWS = ("fine_grained", "reasoning")


def averages(folder):
    scores = read_run(folder / "evaluate.json")["numbers"]["scores"]
    return [statistics.fmean(scores[key] for key in AVERAGES[row]) for row in ROWS]


def with_cache(condition, seed, plan, teacher, processor, budget):
    "The folder of the run that reads a cache, made if it is not there."
    gradient = "gradient" in condition.weights
    setting = "gradient_cache" if gradient else "density_cache"
    folder = Path(f"outputs/{plan.name}/runs") / run_name(f"{condition.name}-{setting}=4bit", seed, budget)
    if (folder / "evaluate.json").exists():
        return folder
    settings, path, to_batch = (
        plan.settings(token_budget=budget, seed=seed),
        folder / "weights.cache",
        partial(collate, processor=processor),
    )
    steps = read_run(folder.with_name(run_name(condition.name, seed, budget)) / "distill.json")["numbers"]["steps"]
    folder.mkdir(parents=True, exist_ok=True)
    options = dict(
        indices=[i for step in range(steps) for i in batch_indices(None, settings.batch_size, seed, step)],
        batch_size=32,
    )
    if gradient:
        build_gradient_cache(
            path,
            teacher,
            Documents(seed),
            to_batch,
            processor,
            condition,
            replaced_indices(to_hybrid(teacher)),
            **options,
        )
    else:
        build_density_cache(path, teacher, Documents(seed), to_batch, processor, settings, **options)
    given = dict(
        scale=plan.name,
        condition=condition.name,
        seed=seed,
        token_budget=budget,
        out=str(folder),
        overrides={f"train.{setting}": str(path)},
    )
    for name in ("distill", "evaluate"):
        run_notebook(f"nbs/runs/{name}.ipynb", given, log=folder / f"{name}.ipynb")
    return folder


def main(scale, condition, seeds):
    os.chdir(root())
    plan, condition = load_scale(scale), get_condition(condition)
    teacher, processor = load_teacher(plan.teacher)
    rows = []
    for seed in seeds:
        cached = with_cache(condition, seed, plan, teacher, processor, plan.token_budget)
        computed = cached.with_name(run_name(condition.name, seed, plan.token_budget))
        rows.append(
            [str(seed), *(f"{score:.2f}" for pair in zip(averages(computed), averages(cached)) for score in pair)]
        )
    print(
        markdown_table(
            [f"{condition.name}, seed", *(text for row in ROWS for text in (TITLES[row], "four bits"))], rows
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="toy")
    parser.add_argument("--condition", default="C4")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    main(**vars(parser.parse_args()))
