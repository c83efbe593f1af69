"""ASPL of Anti-DreamBooth (Van Le et al., ICCV 2023, https://arxiv.org/abs/2303.15433)."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ASPLConfig(SurrogateConfig):
    """Fields of ``SurrogateConfig`` and the turns of training and attack."""

    # Sign steps per round; an image gets ``rounds`` times as many.
    pgd_steps: int = 6
    # Turns of the alternation. Time grows in proportion.
    rounds: int = 50
    # DreamBooth steps per round of the throw-away copy on the clean images, and of the surrogate on the perturbed.
    clean_steps: int = 3
    perturbed_steps: int = 3

    def check(self) -> None:
        SurrogateConfig.check(self)
        require(self.pgd_steps >= 1, "pgd_steps", self.pgd_steps, "use 1 or more")
        require(self.rounds >= 1, "rounds", self.rounds, "use 1 or more")
        require(self.clean_steps >= 0, "clean_steps", self.clean_steps, "use 0 or more")
        require(self.perturbed_steps >= 0, "perturbed_steps", self.perturbed_steps, "use 0 or more")


class ASPL(SubjectProtector[ASPLConfig]):
    """Alternating surrogate and perturbation learning: the surrogate is trained on what the attacker will get.

    "Anti-DreamBooth: Protecting users from personalized text-to-image synthesis",
    https://arxiv.org/abs/2303.15433, section 4.2. In turns: a copy of the surrogate learns the clean images; the
    images climb J = E over t, n of || eps_theta'(z_t, t, c) - n ||^2 under that copy, one draw of (t, n, posterior)
    per image and step, c = "a photo of sks person"; the surrogate itself learns the images as they are now.

    Distance: l_inf, ``config.eps_levels`` 8-bit levels of the saved pixels.

    Args:
        config: ``ASPLConfig``. The published 0.05 and 0.005 on [-1, 1] are 6.375 and 0.6375 levels (times 127.5).
        model: ``DiffusionModel``.

    Shape: images ``(N, 3, H, W)`` float32 in [0, 1] sRGB, any H and W (padded inside to the model's stride);
        the output has the same shape.

    Returns:
        ``ProtectResult``; the objective is the mean loss of the untrained model over ``eval_draws`` fixed draws: the
        surrogate is gone when ``protect`` returns.

    Raises:
        ValueError: bad input or configuration. ModelError: the model is no ``DiffusionModel``, or not in float32 for
        a full surrogate.

    Cost: per step one encoder and one UNet pass, forward and backward; per round and subject ``clean_steps`` and
        ``perturbed_steps`` UNet and text encoder passes with weight gradients. A full surrogate takes memory for four
        copies of the UNet and the text encoder on the device (weights, gradients, two moments) and two beside it, in
        main memory; low-rank deltas take next to nothing.

    Differs from the paper: the copy learns clean versions of the very images that are protected, where the paper has
        other clean photos of the person: an archive has none. The identifier is put into a caller's prompt; class
        images are latents that were never decoded. The public code begins each block of training at the first image
        again and clips no gradient; here all images have their turn and clipping works, and no switch ("compat") goes
        back to that. Nothing is trained after the last sign step.
    """

    name = "aspl"
    version = "1"
    config_type = ASPLConfig
    presets: ClassVar[Mapping[str, ASPLConfig]] = {
        "paper": ASPLConfig(
            eps_levels=6.375,
            step_levels=0.6375,
            surrogate="full",
            learning_rate=5e-7,
            prior_images=200,
        ),
        "fast": ASPLConfig(rounds=6),
        "strong": ASPLConfig(eps_levels=16.0, step_levels=0.5, prior_images=50),
    }

    @property
    def steps(self) -> int:
        return self.config.rounds * self.config.pgd_steps

    def _attack(self, school: DreamBooth, tick: Callable[[], None]) -> Tensor:
        generators = streams(school.batch.seeds, "aspl/attack")

        def loss(images: Tensor, embeddings: Tensor) -> Tensor:
            return denoising_loss(self.model, images, embeddings, draw(self.model, images, generators))

        def climb(images: Tensor) -> Tensor:
            return self._climb(school, images, loss, tick, steps=self.config.pgd_steps)

        return alternate(school, self._start(school.batch), climb, self.config)


def alternate(school: DreamBooth, images: Tensor, climb: Callable[[Tensor], Tensor], config: ASPLConfig) -> Tensor:
    """The turns of ASPL.

    Args:
        school: trains the surrogates.
        images: where the perturbed images begin.
        climb: the next sign steps under the surrogates as they are.
        config: how many turns, and how much training in each.

    Returns:
        The perturbed images.
    """
    surrogate = school.surrogates.state()
    for turn in range(config.rounds):
        if turn > 0:
            school.surrogates.load(surrogate)
            school.train(images, steps=config.perturbed_steps)
            surrogate = school.surrogates.state()
        school.train(steps=config.clean_steps)
        images = climb(images)
    return images
