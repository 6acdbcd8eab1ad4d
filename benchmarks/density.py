"""What density costs beside the forward of the vision tower it reads: Qwen3-VL-8B's, random weights, images of 2,500 tokens.

    python benchmarks/density.py [--images 2] [--blocks 1] [--rounds 3]

Prints a Markdown table. The tower has 27 blocks; `--blocks` takes fewer of them, so that a CPU answers in minutes, and the
share is of those alone; all are alike, so the last column is that of the whole. A time is the median over the rounds (CPU time with one thread,
which other processes disturb less, else wall time).
"""

import argparse
import statistics
import time

import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from heed_nb.density import patch_density
from heed_nb.teachers import paper_config

SIDE = 100  # patches; merged 2x2 they make 2,500 tokens


def seconds(f, device):
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    result = f()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start, result


@torch.no_grad()
def main(images, blocks, rounds):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = paper_config("qwen3-vl-8b").vision_config
    config.depth, whole = blocks or config.depth, config.depth
    config.deepstack_visual_indexes = [i for i in config.deepstack_visual_indexes if i < config.depth]
    torch.manual_seed(0)
    tower = (
        Qwen3VLVisionModel._from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
        .to(device)
        .eval()
    )
    pixels = torch.randn(images * SIDE * SIDE, 3 * config.temporal_patch_size * config.patch_size**2, device=device)
    grids = torch.tensor([[1, SIDE, SIDE]] * images, device=device)
    times = []
    for _ in range(rounds + 1):
        forward, out = seconds(lambda: tower(pixels, grids).last_hidden_state, device)
        rasters = out.view(images, SIDE // 2, SIDE // 2, 2, 2, -1).transpose(2, 3).reshape(images, SIDE, SIDE, -1)
        density, _ = seconds(lambda: patch_density(rasters), device)
        times.append((forward, density))
    forward, density = map(statistics.median, zip(*times[1:]))
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; {images} images of {SIDE}x{SIDE} patches\n"
    )
    print(
        "| blocks of the tower | their forward | density | share | of as many blocks as the tower has |\n|---|---|---|---|---|"
    )
    print(
        f"| {config.depth} of {whole} | {forward:.2f} s | {density:.3f} s | {density / forward:.2%} | {density / forward * config.depth / whole:.2%} |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=1, help="of the tower's 27; 0: all")
    parser.add_argument("--rounds", type=int, default=3)
    main(**vars(parser.parse_args()))
