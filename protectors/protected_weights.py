"""The weights that a model protector trains: float32 masters, their optimizer, their history, their checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from protectors.reference.checkpoint import Binding, Cursor, load_checkpoint, save_checkpoint

_MOMENTS = ("exp_avg", "exp_avg_sq")


class NotFiniteError(RuntimeError):
    """A loss, a gradient or a weight is NaN or infinite; the message names the update. Earlier checkpoints are good."""


class ProtectedWeights:
    """theta and its persistent AdamW (betas 0.9 and 0.999, weight decay 0.01).

    Args:
        start: the weights by name; copied.
        rate: learning rate by the number of updates that are done.
        trained: names of those that change; None is all. The others do not even decay.
        clip: largest L2 norm of the gradient of all of them; None leaves it.
        memory: what else goes on from update to update; checkpoints hold it, and ``resume`` fills it.
    """

    def __init__(
        self,
        start: Mapping[str, Tensor],
        *,
        rate: Callable[[int], float],
        trained: Collection[str] | None = None,
        clip: float | None = None,
        memory: dict[str, Tensor] | None = None,
    ) -> None:
        self.names = tuple(start)
        self.weights = tuple(nn.Parameter(weight.detach().clone()) for weight in start.values())
        self.curves: dict[str, list[float]] = {}
        self.done = 0
        self._rate, self._clip = rate, clip
        self._memory = {} if memory is None else memory
        named = zip(self.names, self.weights, strict=True)
        self._trained = {name: weight for name, weight in named if trained is None or name in trained}
        chosen = list(self._trained.values())
        self._optimizer = torch.optim.AdamW(chosen, lr=rate(0), betas=(0.9, 0.999), weight_decay=1e-2)

    def update(self, gradient: Sequence[Tensor], values: Mapping[str, float]) -> None:
        """One AdamW step.

        Args:
            gradient: one tensor per weight, applied as if it were the weight's own gradient; clipped in place.
            values: what to log; the same names every time.

        Raises:
            NotFiniteError: one of them is not finite, or a weight after the step.
        """
        self._guard("gradient", gradient)
        self._guard(", ".join(values), [torch.tensor(list(values.values()))])
        for name, part in zip(self.names, gradient, strict=True):
            if name in self._trained:
                self._trained[name].grad = part
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self._trained.values(), self._clip)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(self.done)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._guard("weights", self.weights)
        for name, value in values.items():
            self.curves.setdefault(name, []).append(value)
        self.done += 1

    def save(self, folder: Path, binding: Binding) -> None:
        """Writes weights, moments and curves; a kill at any moment leaves the earlier checkpoint or this one.

        Args:
            folder: of this run alone.
            binding: what the run depends on; see ``resume``.
        """
        tensors = {f"weights/{name}": weight.detach() for name, weight in zip(self.names, self.weights, strict=True)}
        for name, weight in self._trained.items():
            tensors |= {f"{moment}/{name}": self._optimizer.state[weight][moment] for moment in _MOMENTS}
        tensors |= {f"curves/{name}": torch.tensor(curve, dtype=torch.float64) for name, curve in self.curves.items()}
        tensors |= {f"memory/{name}": tensor for name, tensor in self._memory.items()}
        save_checkpoint(folder, Cursor(seed=0, step=self.done), tensors, binding)

    def resume(self, folder: Path, binding: Binding) -> None:
        """Goes on where the last checkpoint in the folder is, if there is one; ValueError if its binding differs."""
        found = load_checkpoint(folder, 0, binding)
        if found is None:
            return
        cursor, tensors = found
        self.done = cursor.step
        with torch.no_grad():
            for name, weight in zip(self.names, self.weights, strict=True):
                weight.copy_(tensors[f"weights/{name}"])
            for name, weight in self._trained.items():
                moments = {moment: tensors[f"{moment}/{name}"].to(weight.device) for moment in _MOMENTS}
                self._optimizer.state[weight] = {"step": torch.tensor(float(self.done)), **moments}
        self.curves = {name: tensor.tolist() for name, tensor in _part(tensors, "curves/").items()}
        self._memory.update(_part(tensors, "memory/"))

    def _guard(self, what: str, tensors: Sequence[Tensor]) -> None:
        # Norms, not values: one number per tensor goes to the CPU.
        if not torch.stack([tensor.detach().norm() for tensor in tensors]).isfinite().all():
            raise NotFiniteError(
                f"update {self.done + 1}: {what} not finite at rate {self._rate(self.done):g}; lower the rate"
            )


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
