"""The time of density beside the vision tower that it reads: Qwen3-VL-8B's, random weights, images of 2,500 tokens.

    python benchmarks/density.py [--images 2] [--blocks 1] [--rounds 3]

Prints a Markdown table. The tower has 27 equal blocks. `--blocks` runs fewer, so that a CPU answers in minutes, and the
last column extends the share to all. A time is the median over the rounds: CPU time with one thread, which other
processes disturb less, else wall time.
"""

import argparse
import statistics
import time

import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from heed_nb.teachers import family_of, paper_config

SIDE = 100  # patches; merged 2x2 they make 2,500 tokens


def seconds(f, device):
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start, result = clock(), f()
    wait()
    return clock() - start, result


@torch.no_grad()
def main(images, blocks, rounds):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    family, config = family_of(paper_config("qwen3-vl-8b")), paper_config("qwen3-vl-8b").vision_config
    config.depth, whole = blocks or config.depth, config.depth
    config.deepstack_visual_indexes = [i for i in config.deepstack_visual_indexes if i < config.depth]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tower = Qwen3VLVisionModel._from_config(config, dtype=dtype).to(device).eval()
    pixels = torch.randn(images * SIDE**2, 3 * config.temporal_patch_size * config.patch_size**2, device=device)
    grids = torch.tensor([[1, SIDE, SIDE]] * images, device=device)
    times = {"features": [], "mean": []}
    forwards = []
    for _ in range(rounds + 1):
        forward, out = seconds(lambda: tower(pixels, grids).last_hidden_state, device)
        forwards.append(forward)
        rasters = torch.stack(family.rasters(out, grids))
        for reduce in times:
            times[reduce].append(seconds(lambda: family.token_density(rasters, reduce=reduce), device)[0])
    middle = lambda rounds: statistics.median(rounds[1:])  # the first warms up
    forward = middle(forwards)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{images} images of {SIDE}x{SIDE} patches; {config.depth} of {whole} blocks take {forward:.2f} s\n")
    print("| density | seconds | of these blocks | of the tower |\n|---|---|---|---|")
    for reduce, rounds in times.items():
        share = middle(rounds) / forward
        print(f"| `{reduce}` | {middle(rounds):.3f} | {share:.2%} | {share * config.depth / whole:.3%} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=1, help="of the tower's 27; 0: all")
    parser.add_argument("--rounds", type=int, default=3)
    main(**vars(parser.parse_args()))
