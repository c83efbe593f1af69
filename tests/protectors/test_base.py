"""What the base promises when a method misbehaves."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from protectors.base import Batch
from protectors.fake import FakeConfig, FakeProtector
from protectors.pgd import Progress


class Careless(FakeProtector):
    """Returns far too large changes everywhere."""

    name = "careless"

    def _perturb(self, batch: Batch, progress: Progress | None) -> Tensor:
        return batch.originals + torch.randn_like(batch.originals)


class Shrinking(FakeProtector):
    name = "shrinking"

    def _perturb(self, batch: Batch, progress: Progress | None) -> Tensor:
        return batch.originals[:, :, 1:]


class Blind(FakeProtector):
    """Its objective breaks on the second image once that has changed."""

    name = "blind"

    def _objective(self, images: Tensor, batch: Batch) -> Tensor:
        values = super()._objective(images, batch)
        values[1] = torch.where(values[1] > 0, torch.inf, values[1])
        return values


def marked(*values: int) -> Tensor:
    images = torch.full((len(values), 3, 8, 8), 100 / 255)
    images[:, :, 0, 0] = torch.tensor(values).view(-1, 1) / 255
    return images


def test_subclass_cannot_leave_budget_range_or_mask() -> None:
    images = torch.rand(2, 3, 8, 8)
    masks = torch.zeros(2, 1, 8, 8)
    masks[:, :, :4] = 1
    result = Careless(FakeConfig(eps_levels=5.5), None).protect(images, seeds=[1, 2], masks=masks)
    change = (result.images * 255).round() - (images * 255).round()
    assert change.abs().max() == 5
    assert (change[:, :, 4:] == 0).all()
    assert result.images.min() >= 0
    assert result.images.max() <= 1


def test_shape_change_is_a_bug_of_the_method() -> None:
    with pytest.raises(RuntimeError, match=r"shrinking\._perturb changed the shape"):
        Shrinking(FakeConfig(), None).protect(torch.rand(1, 3, 8, 8), seeds=[1])


def test_one_image_without_result_leaves_the_others_alone() -> None:
    images = marked(1, 2, 3)
    result = FakeProtector(FakeConfig(nan_on=2), None).protect(images, seeds=[1, 2, 3])
    clean = FakeProtector(FakeConfig(), None).protect(images, seeds=[1, 2, 3])
    failures = [fact.failed for fact in result.facts]
    assert failures[0] is failures[2] is None
    assert "not finite" in (failures[1] or "")
    assert torch.equal(result.images[1], images[1])
    assert result.facts[1].linf_levels == 0
    assert torch.equal(result.images[[0, 2]], clean.images[[0, 2]])


def test_objective_that_is_not_finite_fails_the_image() -> None:
    images = marked(1, 2)
    result = Blind(FakeConfig(), None).protect(images, seeds=[1, 2])
    assert result.facts[0].failed is None
    assert "objective went from 0.0 to inf" in (result.facts[1].failed or "")
    assert torch.equal(result.images[1], images[1])


def test_marker_follows_the_image_not_its_place() -> None:
    protector = FakeProtector(FakeConfig(raise_on=9), None)
    protector.protect(marked(1, 2), seeds=[1, 2])
    for images in (marked(9, 1), marked(1, 9)):
        with pytest.raises(RuntimeError, match="marked 9"):
            protector.protect(images, seeds=[1, 2])


@pytest.mark.parametrize(("field", "status"), [("segfault_on", -11), ("exit_on", 3)])
def test_fake_can_end_its_process(field: str, status: int) -> None:
    code = (
        "import torch; from protectors.fake import *\n"
        f"FakeProtector(FakeConfig({field}=0), None).protect(torch.zeros(1, 3, 4, 4), seeds=[1])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == status


class TakesGroupsDown(FakeProtector):
    """Remembers the groups that its batch came with."""

    def _perturb(self, batch: Batch, progress: Progress | None) -> Tensor:
        self.seen = batch
        return super()._perturb(batch, progress)


def test_groups_are_in_the_order_of_seeds_and_can_be_taken_apart() -> None:
    protector = TakesGroupsDown(FakeConfig(), None)
    images = torch.rand(4, 3, 8, 8)
    protector.protect(images, groups=["b", "a", "b", "a"], seeds=[9, 4, 2, 5], prompts=["0", "1", "2", "3"])
    batch = protector.seen
    assert batch.groups == ((2, 0), (1, 3))
    assert batch.owners == (0, 1, 0, 1)
    part = batch.part(batch.groups[0])
    assert part.groups == ((0, 1),)
    assert (part.seeds, part.prompts) == ((2, 9), ("2", "0"))
    assert torch.equal(part.originals, batch.originals[[2, 0]])
    protector.protect(images, seeds=[9, 4, 2, 5])
    assert protector.seen.groups == ((0,), (1,), (2,), (3,))
    with pytest.raises(ValueError, match="groups must be a list of 4"):
        protector.protect(images, groups=["a"], seeds=[9, 4, 2, 5])
