"""Rows a second that one CPU core prepares, and reads and collates, beside what training takes.

    python benchmarks/corpora.py [--rows 64] [--side 1000]

Prints a Markdown table. A row has a JPEG page and a question; the image processor is Qwen3-VL's with its real patches,
the tokenizer that of the toy teacher. A time is CPU time with one thread, which other processes disturb less.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image, ImageDraw
from transformers import Qwen2VLImageProcessorPil

from heed_nb.corpora import load_corpus, prepare
from heed_nb.data import collate
from heed_nb.files import root
from heed_nb.sources import HeldOut, own_source
from heed_nb.teachers import ImageOnlyQwen3VLProcessor, check_checkpoint

TOKENS = 2_000_000_000 / 1_340_000  # of a mean sample, Tab. 11 and 12
HOURS = {"the paper's 165": 165, "a goal of 70": 70}  # GPU-hours of a run


def page(folder, i, side):
    "A page of lines, as a file."
    image = Image.effect_noise((side, side), 12).convert("RGB")
    for line in range(0, side, 24):
        ImageDraw.Draw(image).text((8, line), f"line {line} of page {i} " * 6, "black")
    image.save(folder / f"{i}.jpg", quality=90)
    return dict(images=[str(folder / f"{i}.jpg")], question="How many lines are there?", answer=str(side // 24))


def timed(function):
    began = time.process_time()
    result = function()
    return result, time.process_time() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--side", type=int, default=1000, help="pixels of a page's side")
    given = parser.parse_args()
    torch.set_num_threads(1)
    toy = check_checkpoint(root() / "outputs/teachers/toy-qwen3vl")[2]
    images = Qwen2VLImageProcessorPil(
        patch_size=16, temporal_patch_size=2, merge_size=2, size=dict(shortest_edge=65536, longest_edge=16777216)
    )
    processor = ImageOnlyQwen3VLProcessor(images, toy.tokenizer, chat_template=toy.chat_template)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows = [page(folder, i, given.side) for i in range(given.rows)]
        Dataset.from_list(rows).save_to_disk(folder / "own")
        own = own_source(folder / "own")
        wanted, sources = {"own": given.rows}, {"own": own}
        made, preparing = timed(
            lambda: prepare(wanted, processor, folder / "corpus", HeldOut(), sources=sources, progress=False)
        )
        corpus = load_corpus(folder / "corpus")
        _, reading = timed(lambda: [corpus[i] for i in range(given.rows)])
        _, collating = timed(lambda: [collate([corpus[i]], processor) for i in range(given.rows)])
    print(f"\n{given.rows} pages of {given.side} x {given.side} pixels, {made['tokens'] // given.rows} tokens each\n")
    print("| | samples a second |\n|---|---|")
    for name, seconds in {"prepared": preparing, "read by index": reading, "read and collated": collating}.items():
        print(f"| {name}, by one core | {given.rows / seconds:.1f} |")
    for name, hours in HOURS.items():
        print(f"| trained on by one GPU at {name} GPU-hours for 2B tokens | {2e9 / TOKENS / hours / 3600:.1f} |")


if __name__ == "__main__":
    main()
