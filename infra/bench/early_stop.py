"""Compares early stop and restarts with one full run of a method, side by side: steps, time and gain as ratios.

The gain is that of the method's own objective, over six squares of three photos, at draws that no run has seen.

Example: python infra/bench/early_stop.py --method mist --preset paper --patience 10 20 --restarts 3
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from skimage import data
from torch import Tensor

from protectors.base import ImageProtector
from protectors.loading import load_for, model_source
from protectors.reference import reference_path
from protectors.registry import protector_class

JUDGE_DRAWS = 32
OTHER_SEEDS = 1000


def photos(side: int) -> Tensor:
    """``(6, 3, side, side)`` in [0, 1]."""
    squares = []
    for photo in (data.astronaut(), data.chelsea(), data.coffee()):
        pixels = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
        edge = min(pixels.shape[-2:])
        for square in (pixels[..., :edge, :edge], pixels[..., -edge:, -edge:]):
            squares.append(torch.nn.functional.interpolate(square, (side, side), mode="bilinear", antialias=True))
    return torch.cat(squares).clamp(0, 1)


def gain(judge: ImageProtector[Any, Any], images: Tensor, originals: Tensor) -> Tensor:
    """How far the objective rose, per image."""
    seeds = [OTHER_SEEDS + place for place in range(len(images))]
    after, before = (judge.objective(each, originals=originals, seeds=seeds) for each in (images, originals))
    return after - before


def main() -> None:
    """Prints one line per variant; the first is the full run that the others are divided by."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="mist")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--model", default=str(reference_path()), help="diffusers folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--patience", type=int, nargs="*", default=[20])
    parser.add_argument("--restarts", type=int, nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = protector_class(options.method)
    model = load_for(chosen, options.model, device=options.device, dtype=torch.float32)
    config = chosen.presets[options.preset]
    originals = (photos(model_source(chosen).scale * model.base_size) * 255).round() / 255
    judge = chosen(config.replace(eval_draws=JUDGE_DRAWS), model)
    variants: list[dict[str, Any]] = [{}]
    variants += [{"patience": steps} for steps in options.patience]
    variants += [{"restarts": count, "random_start": True} for count in options.restarts]
    full: tuple[float, float, Tensor] | None = None
    for changes in variants:
        started = time.perf_counter()
        result = chosen(config.replace(**changes), model).protect(originals, seeds=range(len(originals)))
        seconds = time.perf_counter() - started
        steps = [facts.steps for facts in result.facts]
        gains = gain(judge, result.images, originals)
        full = full or (sum(steps), seconds, gains)
        print(
            f"{options.method} {options.preset} {changes or 'full'}: steps {steps}, {sum(steps) / full[0]:.2f} x; "
            f"time {seconds / full[1]:.2f} x; gain {float(gains.mean() / full[2].mean()):.3f} x, "
            f"worst image {float((gains / full[2]).min()):.3f} x"
        )


if __name__ == "__main__":
    main()
