"""What four bits cost: whole runs of C4 or C5 with cached weights, beside runs that compute them at each step.

    python benchmarks/four_bits.py [--scale toy] [--condition C4] [--seeds 0 1 2]

Prints a Markdown table. The runs that compute their weights are those of `make all`, and must be there.
"""

import argparse
import os
import statistics
from pathlib import Path

from heed_nb.batch import run_notebook
from heed_nb.conditions import CACHED, get_condition
from heed_nb.files import root
from heed_nb.runs import read_run, run_name
from heed_nb.scales import load_scale
from heed_nb.statistics import AVERAGES, TITLES
from heed_nb.tables import markdown_table


def averages(folder):
    scores = read_run(folder / "evaluate.json")["numbers"]["scores"]
    return [statistics.fmean(scores[key] for key in AVERAGES[row]) for row in ("fine_grained", "reasoning")]


def main(scale, condition, seeds):
    os.chdir(root())
    setting, rows = CACHED[get_condition(condition).weights], []
    for seed in seeds:
        computed = Path(f"outputs/{scale}/runs") / run_name(condition, seed, load_scale(scale).token_budget)
        cached = computed.with_name(f"{computed.name}-{setting}")
        given = dict(scale=scale, condition=condition, seed=seed, out=str(cached), overrides={setting: True})
        for name in () if (cached / "evaluate.json").exists() else ("distill", "evaluate"):
            run_notebook(f"nbs/runs/{name}.ipynb", given, log=cached / f"{name}.ipynb")
        rows.append([str(seed), *(f"{x:.2f}" for pair in zip(averages(computed), averages(cached)) for x in pair)])
    titles = (text for row in ("fine_grained", "reasoning") for text in (TITLES[row], "four bits"))
    print(markdown_table([f"{condition}, seed", *titles], rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="toy")
    parser.add_argument("--condition", default="C4")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    main(**vars(parser.parse_args()))
