from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from protectors.constraints import LEVELS
from protectors.pgd import SCHEDULES, PgdPlan, Places, Plateau, pgd, repaired, uniform_start
from protectors.randomness import normal, streams


def plan(*, ascend: bool = True, eps: float = 4.0, step: float = 1.0, steps: int = 3) -> PgdPlan:
    return PgdPlan(eps_levels=eps, step_levels=step, steps=steps, ascend=ascend)


def brightness(images: Tensor, places: Places) -> Tensor:
    return images.flatten(1).sum(1)


def test_direction_and_step_length() -> None:
    originals = torch.full((1, 3, 4, 4), 0.5)
    for ascend, sign in ((True, 1), (False, -1)):
        change = (pgd(brightness, originals, plan(ascend=ascend)) - originals) * LEVELS
        assert torch.allclose(change, torch.full_like(change, 3.0 * sign), atol=1e-4)


def test_schedule_scales_the_steps() -> None:
    originals = torch.full((1, 3, 2, 2), 0.5)
    halving = PgdPlan(eps_levels=8, step_levels=2, steps=3, ascend=True, schedule=lambda k, steps: 0.5**k)
    change = (pgd(brightness, originals, halving) - originals) * LEVELS
    assert torch.allclose(change, torch.full_like(change, 3.5), atol=1e-4)


def test_ball_is_around_the_original_after_two_chained_calls() -> None:
    originals = torch.full((1, 3, 4, 4), 0.5)
    first = pgd(brightness, originals, plan(eps=4, steps=4))
    second = pgd(brightness, originals, plan(eps=4, steps=4), start=first - originals)
    assert ((second - originals) * LEVELS).max() <= 4 + 1e-4


def test_range_and_mask() -> None:
    originals = torch.rand(2, 3, 6, 6).round()
    masks = torch.zeros(2, 1, 6, 6)
    masks[:, :, :3] = 1
    start = uniform_start(originals, 4.0, streams([1, 2], "test"))
    images = pgd(brightness, originals, plan(), start=start, masks=masks)
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(images[:, :, 3:], originals[:, :, 3:])


def test_grey_gets_the_channel_mean_and_colour_does_not() -> None:
    originals = torch.rand(2, 3, 5, 5) * 0.5 + 0.2
    originals[0] = originals[0, :1]
    weights = torch.tensor([3.0, -1.0, -1.0]).view(1, 3, 1, 1)
    start = uniform_start(originals, 4.0, streams([1, 2], "test"))
    images = pgd(lambda x, k: (x * weights).flatten(1).sum(1), originals, plan(steps=9), start=start)
    change = (images - originals) * LEVELS
    assert torch.allclose(change[0], torch.full((3, 5, 5), 4.0), atol=1e-4)
    assert torch.allclose(change[1, 1], torch.full((5, 5), -4.0), atol=1e-4)


def test_broken_gradient_gives_nan_for_that_image_only() -> None:
    originals = torch.rand(2, 3, 4, 4)
    broken = torch.tensor([1.0, torch.nan])
    images = pgd(lambda x, k: brightness(x, k) * broken, originals, plan())
    assert images[0].isfinite().all()
    assert images[1].isnan().all()


def test_originals_stand_in_for_images_that_are_not_finite() -> None:
    originals = torch.rand(3, 3, 4, 4)
    images = originals + 1
    images[0, 0, 0, 0], images[2, 2, 3, 3] = torch.nan, torch.inf
    assert torch.equal(repaired(images, originals), torch.stack([originals[0], images[1], originals[2]]))


def test_uniform_start_fills_the_ball() -> None:
    start = uniform_start(torch.zeros(1, 3, 64, 64), 8.0, streams([1], "test")) * LEVELS
    assert start.abs().max() <= 8
    assert start.abs().max() > 7.9
    assert abs(start.mean().item()) < 0.2


def test_streams_depend_on_all_bits_and_on_the_purpose() -> None:
    draws = [
        normal(streams([seed], purpose), (4,)) for seed, purpose in ((0, "a"), (2**32, "a"), (2**64 - 1, "a"), (0, "b"))
    ]
    assert len({tuple(row[0].tolist()) for row in draws}) == 4
    assert torch.equal(normal(streams([7, 0], "a"), (4,))[1], draws[0][0])


def test_schedules_begin_at_one_and_fall() -> None:
    factors = {name: [schedule(step, 50) for step in range(50)] for name, schedule in SCHEDULES.items()}
    assert {values[0] for values in factors.values()} == {1.0}
    assert set(factors["constant"]) == {1.0}
    for name in ("linear", "cosine"):
        assert all(later < sooner for sooner, later in itertools.pairwise(factors[name]))
        assert 0 < factors[name][-1] < 0.03
    assert factors["linear"][25] == pytest.approx(factors["cosine"][25], abs=0.01)
    assert factors["linear"][10] < factors["cosine"][10]


GOALS = torch.tensor([2.0, 40.0, 9.0]) / LEVELS


def towards_goals(images: Tensor, places: Places) -> Tensor:
    """Minus the distance of each image's first half from a brightness of its own, which images 0 and 2 reach soon."""
    goals = 0.5 + GOALS[places].view(-1, 1, 1, 1)
    return -(images[:, :, :2] - goals).abs().flatten(1).mean(1)


def test_images_stop_one_by_one_at_what_as_many_steps_alone_give() -> None:
    originals = torch.full((3, 3, 4, 4), 0.5)
    start = uniform_start(originals, 0.5, streams([1, 2, 3], "test"))
    long = PgdPlan(eps_levels=64, step_levels=1, steps=30, ascend=True)
    seen: list[Places] = []

    def loss(images: Tensor, places: Places) -> Tensor:
        assert len(images) == len(places)
        seen.append(places)
        return towards_goals(images, places)

    calls: list[tuple[int, int]] = []
    plateau = Plateau(4, towards_goals)
    images = pgd(loss, originals, long, start=start, plateau=plateau, progress=lambda *call: calls.append(call))
    steps = [plateau.stopped.get(place, 30) for place in range(3)]
    assert plateau.stopped.keys() == {0, 2}
    assert 8 <= steps[0] < steps[2] < 30
    # Only images that are on their way are seen, each as often as it takes steps.
    assert [sum(place in places for places in seen) for place in range(3)] == steps
    assert calls == [(step + 1, 30) for step in range(30)]
    for place, taken in enumerate(steps):
        alone = PgdPlan(eps_levels=64, step_levels=1, steps=taken, ascend=True)
        one = slice(place, place + 1)
        expected = pgd(lambda x, _, p=place: towards_goals(x, [p]), originals[one], alone, start=start[one])
        assert torch.equal(images[one], expected)


def test_when_all_have_stopped_the_progress_is_at_its_end() -> None:
    originals = torch.full((3, 3, 4, 4), 0.5)
    calls: list[tuple[int, int]] = []
    plateau = Plateau(2, lambda images, places: torch.zeros(len(places)))
    pgd(brightness, originals, plan(steps=50), plateau=plateau, progress=lambda *call: calls.append(call))
    assert plateau.stopped == {0: 4, 1: 4, 2: 4}
    assert calls == [(1, 50), (2, 50), (3, 50), (4, 50), (50, 50)]


def test_an_even_pace_is_no_plateau_and_a_broken_image_stops() -> None:
    originals = torch.full((2, 3, 4, 4), 0.5)
    broken = torch.tensor([1.0, torch.nan])
    plateau = Plateau(1, lambda images, places: brightness(images, places))
    images = pgd(
        lambda x, places: brightness(x, places) * broken[places], originals, plan(eps=64, steps=50), plateau=plateau
    )
    assert plateau.stopped == {1: 2}
    torch.testing.assert_close(images[0], originals[0] + 50 / LEVELS)
    assert images[1].isnan().all()


def test_loss_plateau_and_result_are_of_the_images_as_they_are_shown() -> None:
    originals = torch.full((1, 3, 4, 4), 0.5)
    seen: list[Tensor] = []

    def keep(images: Tensor, places: Places) -> Tensor:
        seen.append(images.detach())
        return brightness(images, places)

    images = pgd(keep, originals, plan(steps=1), shown=lambda x, _: x - 0.25, plateau=Plateau(1, keep))
    assert [float(each.mean()) for each in seen] == [0.25, 0.25]
    torch.testing.assert_close(images, originals - 0.25 + 1 / LEVELS)
