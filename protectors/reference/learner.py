"""Weights under training: gradient steps, their running average, and both as plain tensors."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from protectors.reference.checkpoint import Cursor


class Learner:
    """AdamW over some modules with an exponential moving average of the weights.

    Args:
        modules: trained together; the names become prefixes in `state`.
        rate: learning rate before the schedule's factor.
        ema_decay: of the average at the end; it is shorter at the beginning, so that the first steps are forgotten.
    """

    def __init__(self, modules: Mapping[str, nn.Module], *, rate: float, ema_decay: float = 0.999) -> None:
        self.rate = rate
        self.ema_decay = ema_decay
        self.parameters: dict[str, nn.Parameter] = {
            f"{prefix}.{name}": parameter
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
        }
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )

    def update(self, loss: Tensor, *, step: int, factor: float) -> None:
        """Makes one step on `loss`; `factor` scales the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
        self.optimizer.step()
        weight = 1 - min(self.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), weight)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this block the modules hold the averaged weights."""
        raw = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._fill(self.average)
        try:
            yield
        finally:
            self._fill(raw)

    def rewrite(self, change: Callable[[], None]) -> None:
        """Applies `change`, which edits the modules' weights in place, to the raw and to the averaged weights.

        The optimizer forgets what it knew of the tensors that changed.
        """
        before = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        change()
        for name, parameter in self.parameters.items():
            if not torch.equal(before[name], parameter.detach()):
                self.optimizer.state.pop(parameter, None)
        raw = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._fill(self.average)
        change()
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._fill(raw)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"weight/{name}"] = parameter.detach()
            tensors[f"average/{name}"] = self.average[name]
            for moment, value in self.optimizer.state[parameter].items():
                tensors[f"{moment}/{name}"] = value
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Undoes `state`. Raises KeyError if a tensor is missing."""
        self._fill({name: tensors[f"weight/{name}"] for name in self.parameters})
        for name, parameter in self.parameters.items():
            self.average[name].copy_(tensors[f"average/{name}"])
            self.optimizer.state[parameter] = {
                # `step` stays on the processor unless the optimizer is fused on the device; either is float32.
                moment: tensors[f"{moment}/{name}"].to(parameter.device).clone()
                for moment in ("step", "exp_avg", "exp_avg_sq")
            }

    @torch.no_grad()
    def _fill(self, source: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(source[name])


def rate_factor(step: int, steps: int, *, warm_up: int = 100, decay: float = 0.3) -> float:
    """Learning-rate schedule: linear warm-up, constant, linear to zero over the last `decay` share of `steps`.

    The constant middle lets a run be lengthened or shortened (`steps` of its plan) without starting again.
    """
    rising = min(1.0, (step + 1) / warm_up)
    falling = min(1.0, max(0.0, (steps - step) / max(1.0, decay * steps)))
    return min(rising, falling)


def step_generator(cursor: Cursor) -> torch.Generator:
    """Returns a generator for the noise of one step; on the processor, so that every device draws the same."""
    return torch.Generator().manual_seed(cursor.seed * 1_000_003 + cursor.step)
