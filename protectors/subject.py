"""What methods share that train surrogates on all images of a subject while they perturb them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from protectors.base import Batch, ImageProtector
from protectors.diffusion import DiffusionModel
from protectors.dreambooth import DreamBooth, SurrogateConfig, class_latents, class_prompts, instance_prompts
from protectors.objectives import mean_denoising_loss
from protectors.pgd import PgdPlan, Progress, pgd, uniform_start
from protectors.randomness import streams
from protectors.surrogate import Tick, check_surrogate, make_surrogates, perturb_parts, subject_seeds

SurrogateConfigT = TypeVar("SurrogateConfigT", bound=SurrogateConfig)
SubjectLoss = Callable[[Tensor, Tensor], Tensor]
"""(images ``(B, 3, H, W)``, prompt embeddings ``(B, L, D)``) -> one loss per image ``(B,)``, at new draws."""


class SubjectProtector(ImageProtector[SurrogateConfigT, DiffusionModel]):
    """Base of the methods on DreamBooth surrogates; a subclass writes ``_attack``.

    The subjects of a batch are attacked together with low-rank surrogates, else one after the other.
    """

    model_type = DiffusionModel

    def __init__(self, config: SurrogateConfigT, model: DiffusionModel) -> None:
        super().__init__(config, model)
        check_surrogate(config.surrogate, model)

    @abstractmethod
    def _attack(self, school: DreamBooth, tick: Tick) -> Tensor:
        """The perturbed images of ``school.batch``; calls ``tick`` after each sign step."""

    def _perturb(self, batch: Batch, progress: Progress | None) -> Tensor:
        return perturb_parts(self._perturb_part, batch, self.config.surrogate, self.steps, progress)

    def _perturb_part(self, batch: Batch, tick: Tick) -> Tensor:
        config = self.config
        # Before there are surrogates: the unchanged model draws the class images.
        wanted, words = config.prior_images, sorted(set(class_prompts(batch, config)))
        prior = {word: class_latents(self.model, word, wanted) for word in words} if wanted else None
        seeds = subject_seeds(batch)
        with make_surrogates(
            config.surrogate, self.model, seeds, train_text_encoder=config.train_text_encoder
        ) as surrogates:
            return self._attack(DreamBooth(surrogates, batch, config, prior), tick)

    def _start(self, batch: Batch) -> Tensor:
        """Where the perturbed images begin."""
        if not self.config.random_start:
            return batch.originals
        generators = streams(batch.seeds, f"{self.name}/start")
        return batch.originals + uniform_start(batch.originals, self.config.eps_levels, generators)

    def _climb(self, school: DreamBooth, images: Tensor, loss: SubjectLoss, tick: Tick, *, steps: int) -> Tensor:
        """Sign steps up the loss under the surrogates as they are, in the originals' ball."""
        batch, config = school.batch, self.config
        plan = PgdPlan(eps_levels=config.eps_levels, step_levels=config.step_levels, steps=steps, ascend=True)
        with school.attacked() as embeddings:
            return pgd(
                lambda current, _: loss(current, embeddings),
                batch.originals,
                plan,
                start=images - batch.originals,
                masks=batch.masks,
                progress=lambda *_: tick(),
            )

    def _objective(self, images: Tensor, batch: Batch) -> Tensor:
        generators = streams(batch.seeds, f"{self.name}/evaluation")
        embeddings = self.model.embed_prompts(instance_prompts(batch, self.config))
        return mean_denoising_loss(self.model, images, embeddings, generators, self.config.eval_draws)
