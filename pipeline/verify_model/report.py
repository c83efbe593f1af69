"""Writes what a verification found: every number as JSON, and tables to be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.compare.report import written
from pipeline.verify.bootstrap import CONFIDENCE, RESAMPLES
from pipeline.verify.report import LIBRARIES
from pipeline.verify.tables import FEW_UNITS, State
from pipeline.verify_model.models import Concept, Protected
from pipeline.verify_model.results import KEPT_BAR, PREVENTED_BAR, CaseResult, Findings, RowResult
from pipeline.verify_model.subjects import SETS
from pipeline.verify_model.tasks import Case, Kind
from pipeline.verify_model.utility import TIMES
from pipeline.verify_model.utility_results import LOSS_BAR, UtilityResult
from protectors.reference import NANO_EMBED

SCHEMA_VERSION = 1
MEASURE = (
    "A: likeness to the subject of what the base draws after it was customized; C: of what the protected model draws "
    "after the same; F: of what the base draws of the class before. Likeness is the mean cosine by nano-embed to "
    "photos of the subject that the attacker does not train on. Prevented = 1 - (C - F) / (A - F), "
    "kept = (C - F) / (A - F); photos, seeds and draws are the same for both models; each draws its own class images"
)
HEADER = ("photos", "attack", "word", "method", "A", "C", "F", "own F", "gain A - F", "prevented", "kept", "bar", "n")
DIFFERENCE_HEADER = ("row", "methods", "difference", "over")
SETS_HEADER = ("photos", "subject", "attacker has", "of them protected on", "likeness to", "of them protected on",
               "in both")  # fmt: skip
UTILITY_HEADER = ("method", "models", "held-out loss, ratio", "bar", "cosine of pairs", "control", "KID", "control",
                  "drift", "largest change")  # fmt: skip


def document(found: Findings) -> dict[str, Any]:
    """Everything that decided the numbers, and the numbers."""
    plan, settings = found.plan, asdict(found.plan.settings)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "model verification",
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in LIBRARIES},
        "environment": plan.environment,
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
        "measure": MEASURE,
        "bootstrap": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": 0},
        "bars": {"prevented": PREVENTED_BAR, "kept": KEPT_BAR, "held_out_loss_ratio": LOSS_BAR},
        "base": {"name": settings["base"], "digest": plan.base.digest, "side": plan.side},
        "embedder": {"name": NANO_EMBED, "digest": plan.embedder},
        "held_out_photos": plan.held_out,
        "sets": SETS,
        "protected": [_model(model) for model in plan.protected],
        "rows": [_row(row) for row in found.rows],
        "against": found.against,
        "differences": [
            {"row": item.row.title, **{name: value for name, value in asdict(item).items() if name != "row"}}
            for item in found.differences
        ],
        "utility": [_utility(item) for item in found.utility],
        "not_met": verdicts(found),
        "failed_trials": list(found.failed_trials),
    }


def _model(model: Protected) -> dict[str, Any]:
    return {
        "label": model.label,
        "folder": model.model.folder,
        "digest": model.model.digest,
        "method": model.method,
        "preset": model.preset,
        "config": model.config,
        "seed": model.seed,
        "facts": model.facts,
        "concepts": [_concept(concept) for concept in model.concepts],
    }


def _concept(concept: Concept) -> dict[str, Any]:
    names = concept.subject.digests
    return {
        "subject": concept.subject.name,
        "class_word": concept.class_word,
        "protected_on": [names[place] for place in concept.seen],
        "not_protected_on": [names[place] for place in concept.unseen],
        "protected_on_but_not_in_photos": concept.missing,
    }


def _row(found: RowResult) -> dict[str, Any]:
    row = found.row
    return {
        "row": row.title,
        "kind": row.kind,
        "attack": row.customizer.parameters(),
        "images": row.images,
        "word": row.word,
        "method": found.label,
        "state": found.state,
        "reason": found.reason,
        "errors": list(found.errors),
        "n": {"resampled": found.unit, "units": found.units, "images": found.images},
        "means": dict(found.means),
        "gain": None if found.gain is None else asdict(found.gain),
        found.what: None if found.share is None else asdict(found.share),
        "bar": found.bar,
        "met": found.met,
        "cases": [_case(case) for case in found.cases],
    }


def _case(result: CaseResult) -> dict[str, Any]:
    case = result.case
    means = result.means
    gain = means["base"] - means["floor"]
    return {
        "model": case.protected.model.digest,
        "concept": case.concept.subject.name,
        "subject": case.subject.name,
        "class_word": case.base.class_word,
        "seed": case.seed,
        "images": image_sets(case),
        "trials": {name: getattr(case, name).key for name in ("base", "attacked", "floor", "own_floor")},
        "means": means,
        "real_photos": result.ceiling,
        "left_share": (means["protected"] - means["floor"]) / gain if gain > 0 else None,
        "values": {name: result.values[:, place].tolist() for place, name in enumerate(means)},
    }


def image_sets(case: Case) -> dict[str, Any]:
    """Which photos, by hash, protection, attack and comparison have, and how many each two share."""
    concept, names = case.concept, case.subject.digests
    protection = {concept.subject.digests[place] for place in concept.seen}
    attack, references = ([names[place] for place in places] for places in (case.train, case.references))
    return {
        "attack": attack,
        "attack_changed": SETS[case.row.images] if case.row.images in ("flipped", "blurred") else None,
        "references": references,
        "overlap": {
            "protection_and_attack": len(protection & set(attack)),
            "protection_and_references": len(protection & set(references)),
            "attack_and_references": len(set(attack) & set(references)),
        },
    }


def _utility(found: UtilityResult) -> dict[str, Any]:
    loss, drawn = found.loss, found.drawn
    return {
        "method": found.label,
        "models": [{"digest": model.model.digest, **model.facts} for model in found.models],
        "held_out_loss": None if loss is None else {**asdict(loss), "draws_per_photo": TIMES, "met": loss.met},
        "unrelated_prompts": None if drawn is None else asdict(drawn),
        "errors": list(found.errors),
    }


def lines(found: Findings) -> list[list[str]]:
    """Cells of the table of attacks, one line per row and method."""
    return [_line(row) for row in found.rows]


def _line(found: RowResult) -> list[str]:
    row, means = found.row, found.means
    photos = row.images if row.kind is Kind.CONCEPT else str(row.kind)
    shares = {"prevented": "", "kept": ""}
    if found.state is State.MEASURED:
        shares[found.what] = written(found.share)
    elif found.means:
        shares[found.what] = "measures nothing"
    else:
        shares[found.what] = str(found.state)
    values = [f"{means[name]:.3f}" if means else "" for name in ("base", "protected", "floor", "own_floor")]
    gain = "" if found.gain is None else written(found.gain, digits=3)
    bar = f">= {found.bar:g}" + {True: ", met", False: ", not met", None: ""}[found.met]
    return [photos, row.attack, row.word, found.label, *values, gain, *shares.values(), bar, _count(found)]


def _count(found: RowResult) -> str:
    subjects = len({case.case.subject.name for case in found.cases})
    attacks = "" if len(found.cases) == 1 else f", {len(found.cases)} attacks"
    lost = f", {len(found.errors)} failed" if found.errors else ""
    return f"{subjects} subject{'' if subjects == 1 else 's'}{attacks}, {found.images} images{lost}"


def utility_lines(found: Findings) -> list[list[str]]:
    """Cells of the table of costs, one line per method."""
    return [_utility_line(item) for item in found.utility]


def _utility_line(found: UtilityResult) -> list[str]:
    loss, drawn = found.loss, found.drawn
    cells = [found.label, str(len(found.models))]
    cells += ["-", ""] if loss is None else [
        written(loss.ratio, digits=3), f"<= {LOSS_BAR:g}, {'met' if loss.met else 'not met'}"
    ]  # fmt: skip
    cells += ["-", "-"] if drawn is None else [written(drawn.cosine), written(drawn.control)]
    cells += ["-", "-"] if drawn is None else [written(drawn.kid), written(drawn.kid_control)]
    for name in ("drift", "largest_change"):
        cells.append(", ".join(f"{model.facts[name]:.3g}" for model in found.models))
    return cells


def difference_lines(found: Findings) -> list[list[str]]:
    """Row, method, what it prevents more than the one it is held against, and n."""
    return [
        [item.row.title, f"{item.label} less {item.against}", written(item.interval) if item.interval else item.reason,
         f"{item.units} {item.unit}".strip()]
        for item in found.differences
    ]  # fmt: skip


def verdicts(found: Findings) -> list[str]:
    """One sentence per bar that is not met, or cannot be judged, or was judged without what failed."""
    said = []
    for row in found.rows:
        where = f"{row.label}: {row.row.title}"
        if row.state is State.MEASURED and row.met is False:
            said.append(f"{where}: {row.what} {written(row.share)}, the bar is {row.bar:g}{_above(row)}")
        elif row.state is not State.MEASURED:
            said.append(f"{where}: not judged: {row.reason}")
        if row.errors and row.cases:
            said.append(f"{where}: without what failed: {'; '.join(row.errors)}")
    for item in found.utility:
        if item.loss is not None and not item.loss.met:
            ratio = written(item.loss.ratio, digits=3)
            said.append(f"{item.label}: held-out denoising loss is {ratio} times the base's, the bar is {LOSS_BAR:g}")
        if item.errors:
            said.append(f"{item.label}: costs without what failed: {'; '.join(item.errors)}")
    return said


def _above(row: RowResult) -> str:
    return " with an interval above 0" if row.row.kind is Kind.CONCEPT else ""


def notes(found: Findings) -> list[str]:
    """What a reader must know beside the tables."""
    plan = found.plan
    said = [MEASURE]
    units = sorted({row.unit for row in found.rows if row.unit})
    said += [f"intervals (95 %, bootstrap) over {unit}" for unit in units]
    if any(row.unit.startswith("pictures") for row in found.rows):
        said.append("an interval over pictures of one attack says nothing of another attack, model or subject")
    if any(row.units < FEW_UNITS for row in found.rows if row.unit and not row.unit.startswith("pictures")):
        said.append(f"of fewer than {FEW_UNITS} concepts, models or subjects nothing is claimed for further ones")
    said += _notes_on_others(found)
    for model in plan.protected:
        for concept in model.concepts:
            sizes = f"{len(concept.seen)} seen, {len(concept.unseen)} unseen photos of {concept.subject.name}"
            lost = f"; {concept.missing} more of its protection are not in --photos" if concept.missing else ""
            said.append(f"{model.label}, {model.model.digest[:12]}: {sizes}{lost}")
    if found.utility and any(item.drawn is not None for item in found.utility):
        said.append(
            "cosine and KID on nano-embed, of images of unrelated prompts; cosine: protected and base from equal "
            "noise, control: base and base from other noise; KID, within prompts and averaged over them: to the base "
            "from other noise, control: of the base itself, which is 0 but for chance; published KID is another number"
        )
        if any(item.drawn is not None and item.drawn.kid is None for item in found.utility):
            said.append("no KID: it needs --draws 2 or more")
    return said


def _notes_on_others(found: Findings) -> list[str]:
    """What rows of other subjects share between models, and for which models there are none."""
    said = []
    for row in (row for row in found.rows if row.row.kind is not Kind.CONCEPT and row.cases):
        where = f"{row.label}: {row.row.title}"
        tried = [case for case in found.plan.cases if case.row is row.row and case.protected.label == row.label]
        own = [model for model in found.plan.protected if model.label == row.label]
        models = {case.protected.model.digest: case.protected for case in tried}
        if lacking := [concept.subject.name for model in own if model.model.digest not in models
                       for concept in model.concepts]:  # fmt: skip
            said.append(f"{where}: --photos has no such subject for the model of {', '.join(lacking)}")
        pairs = {(case.protected.model.digest, case.subject.name) for case in tried}
        if len(pairs) > len({name for _, name in pairs}):
            said.append(f"{where}: several models were taught the same subjects: nothing is claimed for further ones")
    return said


def set_lines(found: Findings) -> list[list[str]]:
    """Which photos protection, attack and comparison share, one line per kind of photos and subject."""
    lines = []
    for case in found.plan.cases:
        sets = image_sets(case)
        overlap = sets["overlap"]
        attack = f"{len(sets['attack'])}{', changed' if sets['attack_changed'] else ''}"
        lines.append([
            case.row.images if case.row.kind is Kind.CONCEPT else str(case.row.kind), case.subject.name,
            attack, str(overlap["protection_and_attack"]), str(len(sets["references"])),
            str(overlap["protection_and_references"]), str(overlap["attack_and_references"]),
        ])  # fmt: skip
    return [list(line) for line in dict.fromkeys(map(tuple, lines))]


def markdown(found: Findings) -> str:
    """The tables as Markdown."""
    plan = found.plan
    text = [
        "# Verification of protected models", "",
        f"Base `{plan.settings.base}` (sha256 {plan.base.digest[:12]}), {plan.side} pixels, seed {plan.settings.seed}, "
        f"{plan.settings.generated} images per customized model.", "",
        *_table(HEADER, lines(found)), "",
    ]  # fmt: skip
    if found.differences:
        text += ["## Prevented, one method less another", ""]
        text += [*_table(DIFFERENCE_HEADER, difference_lines(found)), ""]
    text += ["## Photos", "", *_table(SETS_HEADER, set_lines(found)), ""]
    text += ["## Costs", "", *_table(UTILITY_HEADER, utility_lines(found)), "", "## Verdict", ""]
    text += [f"- {line}" for line in verdicts(found)] or ["- Every bar is met."]
    text += ["", "## Notes", "", *(f"- {note}" for note in notes(found))]
    if found.failed_trials:
        text += ["", "## Failed", "", *(f"- {line}" for line in found.failed_trials)]
    return "\n".join(text) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_joined(header), _joined(["---"] * len(header)), *map(_joined, rows)]


def _joined(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
