"""FSMG of Anti-DreamBooth (Van Le et al., ICCV 2023, https://arxiv.org/abs/2303.15433)."""

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
class FSMGConfig(SurrogateConfig):
    """Fields of ``SurrogateConfig``, the number of sign steps and the length of the training."""

    # Sign steps per image. Time grows in proportion.
    steps: int = 100
    # DreamBooth steps on the clean images before the surrogate is frozen.
    training_steps: int = 100

    def check(self) -> None:
        SurrogateConfig.check(self)
        require(self.steps >= 1, "steps", self.steps, "use 1 or more")
        require(self.training_steps >= 1, "training_steps", self.training_steps, "use 1 or more")


class FSMG(SubjectProtector[FSMGConfig]):
    """Fully-trained surrogate model guidance: raises the denoising loss of a model that has learnt the clean subject.

    "Anti-DreamBooth: Protecting users from personalized text-to-image synthesis",
    https://arxiv.org/abs/2303.15433, section 4.2. theta_ref = DreamBooth on the clean images;
    J = E over t, n of || eps_theta_ref(z_t, t, c) - n ||^2, maximised; c = "a photo of sks person"; one draw of
    (t, n, posterior) per image and step; v-prediction models use v as target.

    Distance: l_inf, ``config.eps_levels`` 8-bit levels of the saved pixels.

    Args:
        config: ``FSMGConfig``. The published 0.05 and 0.005 on [-1, 1] are 6.375 and 0.6375 levels (times 127.5).
        model: ``DiffusionModel``.

    Shape: images ``(N, 3, H, W)`` float32 in [0, 1] sRGB, any H and W (padded inside to the model's stride);
        the output has the same shape.

    Returns:
        ``ProtectResult``; the objective is the mean loss of the untrained model over ``eval_draws`` fixed draws: the
        surrogate is gone when ``protect`` returns.

    Raises:
        ValueError: bad input or configuration. ModelError: the model is no ``DiffusionModel``, or not in float32 for
        a full surrogate.

    Cost: per step one encoder and one UNet pass, forward and backward; before that ``training_steps`` UNet and text
        encoder passes per subject, with weight gradients.

    Differs from the paper: the surrogate learns the very images that are protected, where the paper has other clean
        photos of the person: an archive has none. The identifier is put into a caller's prompt; class images are
        latents that were never decoded. The targeted and ensemble forms are left out.
    """

    name = "fsmg"
    version = "1"
    config_type = FSMGConfig
    presets: ClassVar[Mapping[str, FSMGConfig]] = {
        "paper": FSMGConfig(
            eps_levels=6.375,
            step_levels=0.6375,
            steps=100,
            surrogate="full",
            learning_rate=5e-7,
            training_steps=1000,
            train_batch=2,
            prior_images=200,
        ),
        "fast": FSMGConfig(steps=30, training_steps=40),
        "strong": FSMGConfig(eps_levels=16.0, step_levels=0.5, steps=300, training_steps=400, prior_images=50),
    }

    @property
    def steps(self) -> int:
        return self.config.steps

    def _attack(self, school: DreamBooth, tick: Callable[[], None]) -> Tensor:
        batch = school.batch
        generators = streams(batch.seeds, "fsmg/attack")
        school.train(steps=self.config.training_steps)
        return self._climb(
            school,
            self._start(batch),
            lambda images, embeddings: denoising_loss(
                self.model, images, embeddings, draw(self.model, images, generators)
            ),
            tick,
            steps=self.config.steps,
        )
