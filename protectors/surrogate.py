"""Trainable stand-ins for the model that an attacker will tune: one per subject, over one set of frozen weights."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn

from protectors.base import Batch
from protectors.diffusion import DiffusionModel
from protectors.model_files import ModelError
from protectors.pgd import Progress
from protectors.randomness import normal, streams

SurrogateKind = Literal["lora", "full"]
Tick = Callable[[], None]
"""To be called after each step."""
State = tuple[Tensor, ...]
"""Weights of all surrogates at one moment, on the CPU: methods keep several, and a device has room for few."""

_RANK = 4
# What AdamW keeps of each parameter.
_STATE = ("step", "exp_avg", "exp_avg_sq")
# Attention projections, as diffusers names them in UNets and transformers in CLIP's text encoder.
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


class Surrogates(ABC):
    """S trainable versions of a model's UNet, and of its text encoder if wanted.

    Use it as a context: outside of it the model is what it was before, weights and hooks, also after an exception.
    Between calls of ``fit`` no weight takes a gradient.

    Args:
        model: its frozen networks are used in place, never copied.
        count: S; surrogates never feel each other.
        train_text_encoder: whether prompts are embedded by a trained text encoder as well.
    """

    def __init__(self, model: DiffusionModel, count: int, *, train_text_encoder: bool) -> None:
        self.model, self.count = model, count
        self.networks: list[Any] = [model.unet, model.text_encoder] if train_text_encoder else [model.unet]
        self.trains_text = train_text_encoder

    @abstractmethod
    def __enter__(self) -> Surrogates: ...

    @abstractmethod
    def __exit__(self, *raised: object) -> None: ...

    @property
    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """What is trained."""

    @contextmanager
    @abstractmethod
    def owned(self, owners: Sequence[int]) -> Iterator[None]:
        """Within it the model takes batches whose row i belongs to surrogate ``owners[i]``."""

    @abstractmethod
    def _clip(self, limit: float) -> None:
        """Shortens every surrogate's own gradient to this L2 norm."""

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Prompt embeddings ``(B, L, D)`` by the surrogates that own the rows; with a graph where they are trained."""
        return self.model.encode_prompts(prompts) if self.trains_text else self.model.embed_prompts(prompts)

    def state(self) -> State:
        """A copy of the weights."""
        return tuple(parameter.detach().to("cpu", copy=True) for parameter in self.parameters)

    def load(self, state: State) -> None:
        """Goes back to a copy."""
        with torch.no_grad():
            for parameter, kept in zip(self.parameters, state, strict=True):
                parameter.copy_(kept)

    def fit(
        self,
        loss: Callable[[int], Tensor],
        *,
        steps: int,
        rate: float,
        clip: float | None = None,
        moments: dict[str, Tensor] | None = None,
    ) -> None:
        """AdamW steps (betas 0.9 and 0.999, weight decay 0.01) on one loss per surrogate.

        Args:
            loss: step number -> ``(S,)``, inside ``owned``.
            steps: how many.
            rate: learning rate.
            clip: largest L2 norm of a surrogate's gradient; None leaves it.
            moments: AdamW goes on with these and leaves its own there; empty or None begins with new ones.
        """
        parameters = self.parameters
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.999), weight_decay=1e-2)
        if moments:
            for number, parameter in enumerate(parameters):
                kept = {name: moments[f"{name}/{number}"] for name in _STATE}
                # AdamW has its count of steps on the CPU.
                optimizer.state[parameter] = {
                    name: value if name == "step" else value.to(parameter.device) for name, value in kept.items()
                }
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            for step in range(steps):
                optimizer.zero_grad(set_to_none=True)
                loss(step).sum().backward()  # type: ignore[no-untyped-call]
                if clip is not None:
                    self._clip(clip)
                optimizer.step()
            if moments is not None:
                for number, parameter in enumerate(parameters):
                    moments |= {f"{name}/{number}": value for name, value in optimizer.state[parameter].items()}
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False).grad = None


class LoraSurrogates(Surrogates):
    """Low-rank deltas on the attention projections (Hu et al., https://arxiv.org/abs/2106.09685), all S at once.

    Row i of a batch passes y = W x + B_o A_o x with its owner's A and B, so one pass serves many surrogates. B starts
    at zero. peft keeps one adapter per training pass, hence this small one.

    Args:
        seeds: S numbers that A is drawn from.
    """

    def __init__(self, model: DiffusionModel, seeds: Sequence[int], *, train_text_encoder: bool = False) -> None:
        super().__init__(model, len(seeds), train_text_encoder=train_text_encoder)
        generators = streams(seeds, "surrogate")
        self._deltas: list[tuple[nn.Linear, Tensor, Tensor]] = []
        for network in self.networks:
            for name, module in network.named_modules():
                if isinstance(module, nn.Linear) and name.endswith(_PROJECTIONS):
                    down = normal(generators, (_RANK, module.in_features)) / _RANK
                    up = torch.zeros(self.count, module.out_features, _RANK)
                    self._deltas.append((module, down.to(model.device), up.to(model.device)))
        self._handles: list[Any] = []
        self._owners: Tensor | None = None

    def __enter__(self) -> LoraSurrogates:
        self._handles = [module.register_forward_hook(self._hook(down, up)) for module, down, up in self._deltas]
        return self

    def __exit__(self, *raised: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def parameters(self) -> list[Tensor]:
        return [factor for _, down, up in self._deltas for factor in (down, up)]

    @contextmanager
    def owned(self, owners: Sequence[int]) -> Iterator[None]:
        before, self._owners = self._owners, torch.tensor(list(owners), device=self.model.device)
        try:
            yield
        finally:
            self._owners = before

    def _hook(self, down: Tensor, up: Tensor) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
        def add_delta(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._owners is None:
                raise RuntimeError("whose surrogate is it? call the model inside `owned`")
            low = inputs[0].float() @ down[self._owners].mT
            return output + (low @ up[self._owners].mT).to(output.dtype)

        return add_delta

    def _clip(self, limit: float) -> None:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        squares = torch.stack([gradient.square().flatten(1).sum(1) for gradient in gradients])
        factor = (limit / squares.sum(0).sqrt().clamp(min=limit)).view(-1, 1, 1)
        for gradient in gradients:
            gradient.mul_(factor)


class FullSurrogate(Surrogates):
    """All weights of the one surrogate; they are put back at the end. See ``check_surrogate`` for the model."""

    def __init__(self, model: DiffusionModel, *, train_text_encoder: bool = False) -> None:
        super().__init__(model, 1, train_text_encoder=train_text_encoder)
        self._before: State = ()

    def __enter__(self) -> FullSurrogate:
        self._before = self.state()
        return self

    def __exit__(self, *raised: object) -> None:
        self.load(self._before)

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for network in self.networks for parameter in network.parameters()]

    @contextmanager
    def owned(self, owners: Sequence[int]) -> Iterator[None]:
        if any(owners):
            raise ValueError("a full surrogate is the only one: protect one subject at a time")
        yield

    def _clip(self, limit: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, limit)


def check_surrogate(kind: SurrogateKind, model: DiffusionModel) -> None:
    """Raises ModelError if the model cannot be trained so: half precision would lose a rate of 5e-7."""
    if kind == "full" and model.dtype != torch.float32:
        raise ModelError("a full surrogate trains the model's own weights: use precision float32, or the lora kind")


def make_surrogates(
    kind: SurrogateKind, model: DiffusionModel, seeds: Sequence[int], *, train_text_encoder: bool = False
) -> Surrogates:
    """Surrogates of one kind, one per seed; the full kind takes exactly one."""
    if kind == "lora":
        return LoraSurrogates(model, seeds, train_text_encoder=train_text_encoder)
    if len(seeds) != 1:
        raise ValueError("a full surrogate is the only one: protect one subject at a time")
    return FullSurrogate(model, train_text_encoder=train_text_encoder)


def perturb_parts(
    perturb: Callable[[Batch, Tick], Tensor], batch: Batch, kind: SurrogateKind, steps: int, progress: Progress | None
) -> Tensor:
    """The perturbed images of a batch: of all subjects together with low-rank surrogates, else one after the other.

    Args:
        perturb: (part of the batch, tick) -> its perturbed images; calls ``tick`` after each of its steps.
        batch: whole.
        kind: of the surrogates.
        steps: how many ``perturb`` takes for one part.
        progress: hears of the steps of all parts.
    """
    parts = [tuple(range(len(batch.seeds)))] if kind == "lora" else batch.groups
    done = count(1)

    def tick() -> None:
        if progress is not None:
            progress(next(done), steps * len(parts))

    perturbed = torch.empty_like(batch.originals)
    for places in parts:
        perturbed[list(places)] = perturb(batch.part(places), tick)
    return perturbed


def subject_seeds(batch: Batch) -> list[int]:
    """One number per group that its own draws follow from."""
    return [group_seed([batch.seeds[place] for place in group]) for group in batch.groups]


def group_seed(seeds: Sequence[int]) -> int:
    """The number that a group's own draws follow from: the same for the same images in any order."""
    digest = hashlib.sha256(",".join(map(str, sorted(seeds))).encode()).digest()
    return int.from_bytes(digest[:8], "big")
