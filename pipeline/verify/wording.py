"""What a report says in sentences: every headline with its interval and sample size, and what it does not say.

The documents are those of ``verification.json``. Nothing here computes a figure; what is missing is called missing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.verify.check import AT_TRAINING_SCALE
from pipeline.verify.plots import Tone
from pipeline.verify.scores import NO_PURIFIER
from pipeline.verify.tables import FEW_UNITS, State, Verdict
from protectors.reference import NANO_DDPM, NANO_SD

MISSING = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"
_JOINED = "\N{NO-BREAK SPACE}"
_TONES: Mapping[str, Tone] = {Verdict.SHOWN: Tone.GOOD, Verdict.NONE: Tone.BAD, Verdict.UNRESOLVED: Tone.OPEN}

NO_CUSTOMIZATION = (
    "No customization was measured, so this report does not say what a model trained on the protected images learns. "
    'To measure it, run "fixative verify" on the destination, or set "groups" under "check" in the job file (at '
    "least 3 for an interval, 10 for a claim)."
)
NO_GROUP = "No customization was measured: no group of images of one subject could be made."


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One finding."""

    tone: Tone
    label: str
    sentence: str
    # Section of the report with the numbers behind it.
    section: str


def number(value: object) -> str:
    """A figure for people: three decimals while small; a dash for what is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return MISSING
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if isinstance(value, int) or size >= 100:
        text = f"{value:,.0f}"
    elif 0 < size < 0.0005:
        text = f"{value:.0e}"
    else:
        text = f"{value:.1f}" if size >= 10 else f"{value:.3f}"
    return text.replace("-", _MINUS)


def limits(found: Mapping[str, Any]) -> str:
    """The interval of a figure in brackets; empty where it has none."""
    low, high = found.get("low"), found.get("high")
    if low is None and high is None:
        return ""
    return f"[{'no limit' if low is None else number(low)},{_JOINED}{'no limit' if high is None else number(high)}]"


def interval(found: object, value: str = "value") -> str:
    """A figure and its interval, such as ``0.150 [0.110, 0.190]``; a dash where there is none."""
    if not isinstance(found, Mapping) or found.get(value) is None:
        return MISSING
    return f"{number(found[value])} {limits(found)}".strip()


def counted(count: object, noun: str) -> str:
    """A number of things."""
    text = number(count)
    return f"{'an unknown number of' if text == MISSING else text} {noun}" + ("" if count == 1 else "s")


def treatment(purifier: str) -> str:
    """A purifier's name in a sentence."""
    return "no purifier" if purifier == NO_PURIFIER else purifier.replace(AT_TRAINING_SCALE, " at training scale")


def verdict_tone(verdict: object, state: object = State.MEASURED) -> Tone:
    """How a verdict is shown; nothing but a measured state has one."""
    return _TONES.get(str(verdict), Tone.OPEN) if state == State.MEASURED else Tone.VOID


def headlines(document: Mapping[str, Any]) -> list[Headline]:
    """The findings of a verification, the most telling first."""
    customization, editing = _claims(document, "customization"), _claims(document, "editing")
    if not customization:
        customization = [_nothing("customization", no_customization(document))]
    return [*customization, *editing, *_objective(document), *_gate(document)]


def no_customization(document: Mapping[str, Any]) -> str:
    """Why a report holds no customization: no group could be made, or none was asked for."""
    return f"{NO_GROUP} {_too_few(document)}" if document.get("too_few_groups") else NO_CUSTOMIZATION


def _too_few(document: Mapping[str, Any]) -> str:
    reasons = Counter(document["too_few_groups"].values())
    return "; ".join(f"{counted(count, 'shard')}: {reason}" for reason, count in reasons.most_common()) + "."


def warnings(document: Mapping[str, Any]) -> list[str]:
    """What a reader must know before he quotes a number."""
    found = []
    own = document.get("model")
    models = {**({} if own is None else {"protecting": own}), **(_part(document, "attack").get("models") or {})}
    embedded = [f"the {kind} model {name}" for kind, name in models.items() if name in (NANO_SD, NANO_DDPM)]
    if embedded:
        found.append(
            f"Laboratory numbers: {' and '.join(embedded)} of this measurement are embedded in Fixative, small and "
            "made for trials. What was measured with them says nothing about real checkpoints: name a real one to "
            "measure against it."
        )
    tables = [*_primary(document, "customization"), *_primary(document, "editing")]
    few = [table for table in tables if table.get("state") == State.MEASURED and table.get("publishable") is False]
    if few:
        sizes = [f"{table['attack']} has {counted(table.get('units'), 'unit')} and {_seeds(table)}" for table in few]
        found.append(
            f"Monitoring, not claims to publish, which take {FEW_UNITS} units and 3 seeds in each: {'; '.join(sizes)}."
        )
    if not_run := document.get("not_run"):
        names = ", ".join(item["purifier"] for item in not_run)
        found.append(f"Planned and not run, so nothing is said of them: {names}.")
    if document.get("too_few_groups") and document.get("customization"):
        found.append(f"Fewer groups were attacked than asked for. {_too_few(document)}")
    return found


def _seeds(table: Mapping[str, Any]) -> str:
    return counted((table.get("seeds") or [None])[0], "seed")


def _primary(document: Mapping[str, Any], section: str) -> list[Mapping[str, Any]]:
    return [table for table in document.get(section) or () if table["question"].get("primary")]


def _claims(document: Mapping[str, Any], section: str) -> list[Headline]:
    claims = [_claim(table, document, section) for table in _primary(document, section)]
    if document.get(section) and not claims:
        return [_nothing(section, "The primary metric has no scores; the other metrics make no headline.")]
    return claims


def _nothing(section: str, sentence: str) -> Headline:
    return Headline(tone=Tone.VOID, label=f"{section.capitalize()}: not measured", sentence=sentence, section=section)


def _part(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return document.get(name) or {}


def _attack(table: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """Attack, checkpoints and date: a claim holds for these and no others."""
    attack = _part(document, "attack")
    own = table["attack"] == attack.get("customizer")
    preset = f", preset {attack['preset']}" if own and attack.get("preset") else ""
    models = " and ".join(f"{name} ({kind})" for kind, name in (attack.get("models") or {}).items())
    date = str(document.get("created_at") or "")[:10]
    return f"{table['attack']}{preset}, on {models or 'a model that is not named'}" + (f", {date}" if date else "")


def _claim(table: Mapping[str, Any], document: Mapping[str, Any], section: str) -> Headline:
    summary, question = table.get("summary"), table["question"]
    title = f"{section.capitalize()} with {table['attack']}: "
    attack = f"Attack: {_attack(table, document)}."
    if table.get("state") != State.MEASURED or summary is None:
        reasons = [f"{gate['name']} ({gate['detail']})" for gate in table.get("gates") or () if gate["passed"] is False]
        why = "; ".join(reasons) or "no draw succeeded in all cells"
        sentence = f"Nothing can be concluded from the {question['metric']}. What failed: {why}. {attack}"
        return Headline(tone=Tone.VOID, label=f"{title}{table.get('state')}", sentence=sentence, section=section)
    rows = [row["purifier"] for row in table["rows"] if row["state"] == State.MEASURED]
    tried = ", ".join(treatment(name) for name in rows)
    units = counted(table.get("units"), "image" if section == "editing" else "group")
    sentence = (
        f"Residual protection in {question['metric']} is {number(summary['worst_mean']['value'])} after "
        f"{treatment(summary['worst_purifier'])}, the worst of {len(rows)} ({tried}): "
        f"{_between(summary['worst_mean'], table.get('bootstrap'))}, {units}; {number(question['delta'])} is the least "
        "that counts."
    )
    if (effect := summary.get("worst_effect")) is not None:
        sentence += f" Of what the attack gains on clean images, a share of {interval(effect)} is prevented."
    if table.get("units", 0) < FEW_UNITS:
        sentence += f" With fewer than {FEW_UNITS} units nothing is claimed."
    label = title + str(summary.get("verdict") or "no verdict")
    return Headline(
        tone=verdict_tone(summary.get("verdict")), label=label, sentence=f"{sentence} {attack}", section=section
    )


def _between(found: Mapping[str, Any], method: Mapping[str, Any] | None) -> str:
    if not (brackets := limits(found)):
        return "no interval"
    level = (method or {}).get("confidence")
    return f"{'' if level is None else f'{level:.0%} '}interval {brackets}"


def worst_survival(entries: Sequence[Mapping[str, Any]] | None) -> Mapping[str, Any] | None:
    """The purifier that leaves least of the objective's gain; None where no share exists."""
    shares = [item for item in entries or () if item["purifier"] != NO_PURIFIER and item.get("share") is not None]
    return min(shares, key=lambda item: float(item["share"]), default=None)


def _objective(document: Mapping[str, Any]) -> list[Headline]:
    entries = [item for item in document.get("survival") or () if item["purifier"] != NO_PURIFIER]
    worst = worst_survival(entries)
    if not entries and document.get("kind") == "verify":
        return []  # later verifications attack; they do not look at the objective
    if worst is None:
        why = "there was no gain to lose" if entries else "no image was checked"
        sentence = f"What purifiers leave of the objective's gain is unknown: {why}."
        return [Headline(tone=Tone.VOID, label="Objective: not measured", sentence=sentence, section="survival")]
    sentence = (
        f"After {treatment(worst['purifier'])}, the worst of {counted(len(entries), 'purifier')}, a share of "
        f"{number(worst['share'])} of the objective's gain is left ({_between(worst, document.get('interval'))}, "
        f"{counted(worst.get('images'), 'image')}). This is what the optimizer pursues, not what an attacker obtains."
    )
    return [Headline(tone=Tone.OPEN, label="Objective left", sentence=sentence, section="survival")]


def _gate(document: Mapping[str, Any]) -> list[Headline]:
    last = [shard["gate"][-1] for shard in _part(document, "shards").values() if shard.get("gate")]
    if not last:
        return []
    outcomes = Counter(str(decision["outcome"]) for decision in last)
    tally = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
    sentence = f"Of {counted(len(last), 'judged shard')}: {tally}."
    short = sum(decision["outcome"] == "pass" and not reaches(decision) for decision in last)
    if short:
        sentence += (
            f" {number(short)} of those that pass {'lies' if short == 1 else 'lie'} below the threshold or could not "
            "be measured: their policy commits them whatever is measured."
        )
    tone = Tone.BAD if outcomes["fail"] else Tone.GOOD if outcomes["pass"] == len(last) and not short else Tone.OPEN
    return [Headline(tone=tone, label="Gate", sentence=sentence, section="shards")]


def reaches(decision: Mapping[str, Any]) -> bool:
    """Whether a gate's decision rests on a value that reaches the threshold, or on nothing to judge."""
    value = decision.get("value")
    return not decision.get("reason") if value is None else bool(value >= decision["threshold"])
