"""MetaCloak (Liu et al., CVPR 2024, https://arxiv.org/abs/2311.13127)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from protectors.config import require
from protectors.dreambooth import DreamBooth, SurrogateConfig
from protectors.objectives import denoising_loss, draw
from protectors.randomness import streams
from protectors.subject import SubjectProtector
from protectors.surrogate import State
from protectors.transforms import Transforms


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaCloakConfig(SurrogateConfig):
    """Fields of ``SurrogateConfig``, the pool of snapshots, the loop over it and the transforms."""

    # Sign steps per round; an image gets ``passes * snapshots * rounds`` times as many.
    pgd_steps: int = 6
    # DreamBooth steps on the clean images along which the snapshots are taken.
    training_steps: int = 1000
    # States of the surrogate that are kept, evenly spread over the training; the first is the untrained model.
    snapshots: int = 6
    # How often the images go through all snapshots.
    passes: int = 4
    # Turns of attack and training per pass and snapshot.
    rounds: int = 100
    # DreamBooth steps per round on the images as they are.
    unroll_steps: int = 2
    # The transforms between image and loss, drawn anew for every image and step; see ``Transforms``. Blur and flip
    # are published, a change of size and JPEG are not.
    blur_size: int = 7
    flip: bool = True
    resize_low: float = 1.0
    jpeg_low: int | None = None

    def check(self) -> None:
        SurrogateConfig.check(self)
        for field in ("pgd_steps", "training_steps", "snapshots", "passes", "rounds"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "use 1 or more")
        require(self.unroll_steps >= 0, "unroll_steps", self.unroll_steps, "use 0 or more")
        enough = self.snapshots <= self.training_steps
        require(enough, "snapshots", self.snapshots, "use at most training_steps")
        _ = self.transforms  # refuses values that cannot work

    @property
    def transforms(self) -> Transforms:
        """The distribution T of the paper."""
        return Transforms(flip=self.flip, blur_size=self.blur_size, resize_low=self.resize_low, jpeg_low=self.jpeg_low)


class MetaCloak(SubjectProtector[MetaCloakConfig]):
    """Raises the denoising loss over a pool of surrogates of every age, through random transforms of the image.

    "MetaCloak: Preventing Unauthorized Subject-driven Text-to-image Diffusion-based Synthesis via Meta-learning",
    https://arxiv.org/abs/2311.13127. DreamBooth on the images leaves ``snapshots`` states. In every pass each of them
    is loaded and, ``rounds`` times, the images climb J = E over T, t, n of || eps_theta(z_t(T(x)), t, c) - n ||^2 and
    the surrogate learns the images as they are now. One draw of (T, t, n, posterior) per image and step.

    Distance: l_inf, ``config.eps_levels`` 8-bit levels of the saved pixels.

    Args:
        config: ``MetaCloakConfig``. The published 11 and 1.1 are 8-bit levels; 1000 steps and 6 snapshots give the
            published states before steps 0, 199, 399, 599, 799 and 999.
        model: ``DiffusionModel``.

    Shape: images ``(N, 3, H, W)`` float32 in [0, 1] sRGB, any H and W (padded inside to the model's stride);
        the output has the same shape.

    Returns:
        ``ProtectResult``; the objective is the mean loss of the untrained model on the plain image, over
        ``eval_draws`` fixed draws: the surrogates are gone when ``protect`` returns.

    Raises:
        ValueError: bad input or configuration. ModelError: the model is no ``DiffusionModel``, or not in float32 for
        a full surrogate.

    Cost: per step one encoder and one UNet pass, forward and backward: 14,400 of them as published; per round and
        subject ``unroll_steps`` UNet and text encoder passes with weight gradients. A full surrogate takes memory for
        four copies of the UNet and the text encoder on the device (weights, gradients, two moments) and for
        ``snapshots + 1`` beside it, in main memory; low-rank deltas take next to nothing.

    Differs from the paper: the flip is drawn per image, not per batch; the resize and crop to 512 pixels are the
        pipeline's business; the surrogate learns the images without transforms, and nothing after a snapshot's last
        sign step. The inner attacker of the public code has radius 0 there and is left out. The identifier is put into
        a caller's prompt; class images are latents that were never decoded.
    """

    name = "metacloak"
    version = "1"
    config_type = MetaCloakConfig
    presets: ClassVar[Mapping[str, MetaCloakConfig]] = {
        "paper": MetaCloakConfig(
            eps_levels=11.0,
            step_levels=1.1,
            surrogate="full",
            learning_rate=5e-7,
            prior_images=200,
        ),
        "fast": MetaCloakConfig(training_steps=20, snapshots=2, passes=1, rounds=3),
        "strong": MetaCloakConfig(
            eps_levels=16.0,
            step_levels=0.5,
            training_steps=400,
            snapshots=4,
            passes=2,
            rounds=10,
            prior_images=50,
            resize_low=0.5,
            jpeg_low=50,
        ),
    }

    @property
    def steps(self) -> int:
        config = self.config
        return config.passes * config.snapshots * config.rounds * config.pgd_steps

    def _attack(self, school: DreamBooth, tick: Callable[[], None]) -> Tensor:
        config, batch = self.config, school.batch
        generators, transforms = streams(batch.seeds, "metacloak/attack"), config.transforms

        def loss(images: Tensor, embeddings: Tensor) -> Tensor:
            pictures = transforms.draw(images, generators)(images)
            return denoising_loss(self.model, pictures, embeddings, draw(self.model, images, generators))

        snapshots = self._snapshots(school)
        images = self._start(batch)
        for _ in range(config.passes):
            for snapshot in snapshots:
                school.surrogates.load(snapshot)
                for turn in range(config.rounds):
                    if turn > 0:
                        school.train(images, steps=config.unroll_steps)
                    images = self._climb(school, images, loss, tick, steps=config.pgd_steps)
        return images

    def _snapshots(self, school: DreamBooth) -> list[State]:
        """The surrogates' states along their training on the clean images."""
        *ages, oldest = snapshot_ages(self.config.training_steps, self.config.snapshots)
        kept = []

        def keep(step: int) -> None:
            if step in ages:
                kept.append(school.surrogates.state())

        # What comes after the last snapshot is of no use.
        school.train(steps=oldest, before_step=keep)
        return [*kept, school.surrogates.state()]


def snapshot_ages(training_steps: int, snapshots: int) -> list[int]:
    """The steps before which a state is kept, evenly from 0 to the last one; one alone is kept before step 0."""
    return [number * (training_steps - 1) // max(1, snapshots - 1) for number in range(snapshots)]
