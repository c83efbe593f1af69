"""Compares batch sizes of the optimizer side by side: throughput as a ratio to one image per batch.

Example: python infra/bench/batch_size.py --method advdm --threads 1
"""

from __future__ import annotations

import argparse
import time

import torch

from protectors.diffusion import load_model
from protectors.reference import reference_path
from protectors.registry import protector_class


def main() -> None:
    """Prints one line per batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="photoguard")
    parser.add_argument("--model", default=str(reference_path()), help="diffusers folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved repetitions; the best counts")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(options.model, device=options.device)
    chosen = protector_class(options.method)
    protector = chosen(chosen.presets["fast"].replace(steps=options.steps), model)
    images = torch.rand(max(options.sizes), 3, model.base_size, model.base_size)
    best: dict[int, float] = {}
    for _ in range(options.rounds):
        for size in options.sizes:
            started = time.perf_counter()
            protector.protect(images[:size], seeds=list(range(size)))
            rate = size / (time.perf_counter() - started)
            best[size] = max(best.get(size, 0.0), rate)
    for size, rate in best.items():
        print(f"batch {size}: {rate / best[options.sizes[0]]:.2f} x the throughput of batch {options.sizes[0]}")


if __name__ == "__main__":
    main()
