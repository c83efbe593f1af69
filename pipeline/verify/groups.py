"""Chooses groups of images of one subject: what somebody would customize a model on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from pipeline.ids import sha256_hex

TRAIN = 4  # images that the attacker has
REFERENCES = 8  # at most so many others of the group tell whether he succeeded
SMALLEST = 3  # two to train on and one to compare with
LOOKED_AT = 128  # images among which look-alikes are sought: embedding a whole shard would cost minutes
DEFAULT_CLASS = "subject"
# Least cosine of a look-alike to the first image of its group: the mean of two photos of one subject by nano-embed, on
# 81 photos of 15 subjects of google/dreambooth. Half of the pairs of one subject reach it, and 5 % of the others.
LEAST_LIKENESS = 0.7
SAME_PICTURE = 0.98  # cosine above which a reference is taken for a copy of an image that is trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An image that may become part of a group."""

    asset_id: str
    # Names the original; equal ones are one image.
    source_sha256: str
    # Names what is stored for it.
    protected_sha256: str
    unit_id: str
    # None: unknown.
    subject: str | None = None
    class_word: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Images of one subject, or look-alikes where subjects are unknown."""

    name: str
    class_word: str
    train: tuple[Candidate, ...]
    # Held-out originals that generated images are compared with.
    references: tuple[Candidate, ...]

    @property
    def members(self) -> tuple[Candidate, ...]:
        """All of them."""
        return self.train + self.references


def choose_groups(
    candidates: Sequence[Candidate], count: int, salt: str, embed: Callable[[Sequence[Candidate]], Tensor]
) -> list[Group]:
    """The groups of one shard, by hash: every run chooses the same ones.

    Args:
        candidates: protected images of the shard.
        count: groups at most; fewer where there are not enough images.
        salt: changes the choice.
        embed: unit vectors `(N, D)` of images; called where no candidate names its subject.
    """
    ranked = sorted(
        {item.source_sha256: item for item in sorted(candidates, key=lambda item: item.asset_id)}.values(),
        key=lambda item: sha256_hex(f"{salt}|group|{item.source_sha256}"),
    )
    if any(item.subject is not None for item in ranked):
        found = _by_subject(ranked)
    else:
        found = _by_likeness(ranked[:LOOKED_AT], count, embed)
    return [_group(name, members) for name, members in found[:count]]


def why_fewer(candidates: Sequence[Candidate]) -> str:
    """Why `choose_groups` found fewer groups among these images than it was asked for."""
    if any(item.subject is not None for item in candidates):
        return f"no further subject has {SMALLEST} different images"
    return f"no further {SMALLEST} images are look-alikes (cosine of at least {LEAST_LIKENESS} to one of them)"


def _by_subject(ranked: Sequence[Candidate]) -> list[tuple[str, list[Candidate]]]:
    subjects: dict[str, list[Candidate]] = defaultdict(list)
    for item in ranked:
        if item.subject is not None:
            subjects[item.subject].append(item)
    return [(name, members) for name, members in subjects.items() if len(members) >= SMALLEST]


def _by_likeness(
    ranked: Sequence[Candidate], count: int, embed: Callable[[Sequence[Candidate]], Tensor]
) -> list[tuple[str, list[Candidate]]]:
    """Neighbourhoods: the next free image by hash, with those nearest to it; no image is in two of them.

    An image without enough look-alikes is passed over: a model customized on unlike images learns no subject, and what
    it draws says nothing of a protection.
    """
    if len(ranked) < SMALLEST or count < 1:
        return []
    vectors = embed(ranked)
    free = list(range(len(ranked)))
    size = min(TRAIN + REFERENCES, max(SMALLEST, len(ranked) // count))
    found: list[tuple[str, list[Candidate]]] = []
    while len(free) >= SMALLEST and len(found) < count:
        likeness = vectors[free] @ vectors[free[0]]
        likeness[0] = 2.0  # itself first, whatever rounding says
        order = likeness.argsort(descending=True, stable=True)[:size].tolist()
        nearest = [free[place] for place in order if likeness[place] >= LEAST_LIKENESS]
        if len(nearest) < SMALLEST:
            free = free[1:]
            continue
        free = [place for place in free if place not in nearest]
        train, others = nearest[:TRAIN], nearest[TRAIN:]
        if not others:
            train, others = nearest[:-1], nearest[-1:]
        copies = (vectors[others] @ vectors[train].T).amax(dim=1) > SAME_PICTURE
        kept = [place for place, copy in zip(others, copies.tolist(), strict=True) if not copy]
        if kept:
            name = f"like-{ranked[train[0]].source_sha256[:12]}"
            found.append((name, [ranked[place] for place in train + kept]))
    return found


def _group(name: str, members: Sequence[Candidate]) -> Group:
    cut = min(TRAIN, len(members) - 1)
    word = next((item.class_word for item in members if item.class_word), DEFAULT_CLASS)
    return Group(
        name=name, class_word=word, train=tuple(members[:cut]), references=tuple(members[cut : cut + REFERENCES])
    )
