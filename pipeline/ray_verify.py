"""Runs a campaign's trials on Ray Data: shards through a CPU stage, trials through a pool of attackers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from pipeline import metrics
from pipeline.ray_job import LOAD_CPUS, Batch, Failed, Pool, each, on_actors, results, source
from pipeline.ray_metrics import export_from_worker
from pipeline.verify.attack_models import AttackModels
from pipeline.verify.campaign import Campaign, Target, prepare_target
from pipeline.verify.edit_trial import EditTrial, run_edit_trial
from pipeline.verify.trial import Trial, TrialBench, TrialResult
from pipeline.verify.trials import store_trial


def run_campaign(campaign: Campaign, pool: Pool, targets: Sequence[Target]) -> Iterator[TrialResult | Failed]:
    """Runs every trial that is not stored yet; stores its scores and yields them with their pictures."""
    stream = source(targets, "attack").map_batches(
        prepare_trials, batch_size=1, num_cpus=LOAD_CPUS, fn_kwargs={"campaign": campaign}
    )
    yield from results(on_actors(stream, Attacks, pool, campaign=campaign))


def prepare_trials(batch: Batch, campaign: Campaign) -> Iterator[Batch]:
    """Stage: a shard becomes its trials."""
    yield from each(batch, "attack", lambda target: prepare_target(campaign, target))


class Attacks:
    """Stage: a trial is run. One instance per actor; the attacker's models are loaded with it."""

    def __init__(self, campaign: Campaign, device: str) -> None:
        if device == "cpu":
            # Sums are rounded by thread count: a fixed number keeps scores equal on every pool size.
            torch.set_num_threads(campaign.config.run.threads)
        self.campaign = campaign
        self.bench = TrialBench(campaign.attack, AttackModels(campaign.attack.models, device=device))
        export_from_worker()
        self.clock = metrics.BusyClock()

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        with self.clock.working("attack", metrics.NO_METHOD):
            done = list(each(batch, "attack", self._one))
        yield from done

    def _one(self, trial: Trial | EditTrial) -> Iterator[TrialResult]:
        if isinstance(trial, EditTrial):
            result = run_edit_trial(trial, self.bench.models, self.bench.further)
        else:
            result = self.bench.run(trial)
        store_trial(self.campaign.destination(), result)
        yield result
