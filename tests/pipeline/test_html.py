"""The HTML report says what the document says, and nothing else.

Contract: 1. every number on the page is in the document, and what is missing is called missing; 2. states are never
mixed: invalid, not run and failed look unlike measured; 3. names and texts from outside are escaped; 4. the page needs
nothing but itself; 5. it stays usable with thousands of shards, the worst first.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from pipeline.verify.html import MOST_SHARDS, Strip, render
from pipeline.verify.plots import Span, Tone, interval_plot
from pipeline.verify.scores import Cell
from pipeline.verify.tables import Verdict
from pipeline.verify.wording import headlines, interval, number, verdict_tone, warnings
from tests.pipeline.report_documents import LEVELS, SCRIPT, decision, full, hostile, many_shards, shard, strips, table

CLEAN, PROTECTED = (Cell.CLEAN, "none"), (Cell.PROTECTED, "none")
PURIFIED, BOTH = (Cell.PURIFIED, "chain"), (Cell.PURIFIED_PROTECTED, "chain")
FLOOR, CEILING = (Cell.FLOOR, "none"), (Cell.CEILING, "none")


class Elements(HTMLParser):
    """All elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.found if name in attributes]

    def tagged(self, kind: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.found if tag == kind]


# Kind, purifier and finding of the rows of four-cell tables.
_ROWS = re.compile(
    r'<tr class="(\w*)">\s*<th scope="row">(.+?)</th>\s*<td class="n">.*?</td>\s*<td class="wrap">(.*?)</td>', re.DOTALL
)


def words(page: str) -> str:
    return re.sub(r"\s+", " ", Elements(page).text)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return full()


@pytest.fixture(scope="module")
def page(document: dict[str, Any]) -> str:
    return render(document, strips())


def test_every_figure_of_a_table_is_on_the_page(document: dict[str, Any], page: str) -> None:
    text = page.replace("\N{NO-BREAK SPACE}", " ")
    for found in [*document["customization"], *document["editing"]]:
        figures = [found["summary"][name] for name in ("worst_mean", "worst_unit", "protection", "attacker_loss")]
        figures += [
            row[name] for row in found["rows"] for name in ("residual", "damage", "lost", "effect", "retention")
        ]
        for figure in figures:
            assert interval(figure).replace("\N{NO-BREAK SPACE}", " ") in text
        for row in found["rows"]:
            assert row["reason"] in text
    for item in [*document["survival"], *document["fidelity"]]:
        assert interval(item, "share" if "share" in item else "mean").replace("\N{NO-BREAK SPACE}", " ") in text
    assert document["measure"] in words(page)
    assert "812.4" in text


def test_every_number_in_a_headline_is_in_the_document(document: dict[str, Any]) -> None:
    def figures(value: Any) -> set[str]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        own = {number(value)} if isinstance(value, int | float) else set(re.findall(r"[\d.]+", str(value)))
        return own.union(*map(figures, inner))

    known = figures(document) | {"10"}  # fewer than ten units: a rule
    counts = {"1", "2", "3"}  # of purifiers and shards
    for line in headlines(document):
        said = re.findall(r"(?<![\w.-])\N{MINUS SIGN}?\d+(?:\.\d+)?(?![\w-])", line.sentence.replace("95%", ""))
        assert said
        assert set(said) <= known | counts


@pytest.mark.parametrize(
    ("left", "units", "label", "tone"),
    [
        (0.40, 12, "residual protection shown", Tone.GOOD),
        (0.69, 12, "no material protection", Tone.BAD),
        (0.65, 12, "not resolved at this sample size", Tone.OPEN),
        (0.40, 9, "not resolved at this sample size", Tone.OPEN),
    ],
)
def test_a_headline_is_worded_after_the_interval(left: float, units: int, label: str, tone: Tone) -> None:
    levels = {CLEAN: 0.8, PROTECTED: 0.3, PURIFIED: 0.7, BOTH: left, FLOOR: 0.2, CEILING: 0.9}
    document = full() | {"customization": [table(levels, units=units, not_run={})]}
    found = document["customization"][0]
    (line, *_) = headlines(document)
    assert (line.label, line.tone) == (f"Customization with dreambooth: {label}", tone)
    worst = found["summary"]["worst_mean"]
    assert f"is {number(worst['value'])} after chain, the worst of 2 (no purifier, chain)" in line.sentence
    assert (
        f"95% interval [{number(worst['low'])},\N{NO-BREAK SPACE}{number(worst['high'])}], {units} groups"
        in line.sentence
    )
    assert "dreambooth, preset quick, on nano-sd (latent) and nano-ddpm (pixel), 2026-11-22" in line.sentence
    assert ("fewer than 10 units nothing is claimed" in line.sentence) == (units < 10)


def test_a_failed_gate_is_no_protection() -> None:
    weak = LEVELS | {CLEAN: 0.21, PROTECTED: 0.20}
    document = full() | {"customization": [table(weak)]}
    (line, *_) = headlines(document)
    assert line.label == "Customization with dreambooth: invalid"
    assert line.tone is Tone.VOID
    assert "attack works on clean images" in line.sentence
    page = render(document, [])
    found = {name: (kind, finding) for kind, name, finding in _ROWS.findall(page.partition('id="editing"')[0])}
    for name in ("no purifier", "jpeg75", "chain"):
        assert found[name] == ("void", '<span class="tag void">invalid</span> a gate failed')
    assert "residual protection shown" not in page
    # Nor does the plot show a row as if it could be read.
    assert "stroke: var(--ink)" not in page.partition('id="editing"')[0]
    assert "stroke: var(--ink)" in page


def test_metrics_are_named_with_their_weights_and_absent_ones_with_the_reason(page: str) -> None:
    for item in full()["metrics"]:
        assert f'<th scope="row">{item["name"]}</th>' in page
        assert f'<code title="{item["weights"]}">{item["weights"][:12]}</code>' in page
    assert "a folder with &lt;weights&gt;" in page
    assert "<td>not judged</td>" in page
    assert "Read beside it" not in page
    document = full()
    document["customization"][0]["figures"] = [{"cell": "C", "purifier": "none", "not found": 0.6945, "pictures": 12}]
    shown = render(document, [])
    assert '<th scope="col">not found</th>' in shown
    assert '<td class="n">0.695</td>' in shown or '<td class="n">0.694</td>' in shown


def test_an_invalid_row_and_one_that_was_not_run_look_unlike_a_measured_one(page: str) -> None:
    found = {name: (kind, finding) for kind, name, finding in _ROWS.findall(page.partition("<h3>lora: ")[0])}
    assert found["jpeg75"] == ("", '<span class="tag good">residual protection shown</span>')
    assert found["blur"][0] == found["diffpure"][0] == "void"
    assert found["blur"][1].startswith('<span class="tag void">invalid</span> keeps less than 50%')
    assert found["diffpure"][1] == '<span class="tag void">not run</span> no pixel model given'


def test_without_customization_the_page_says_so_and_how_to_ask() -> None:
    for missing in ({"customization": []}, {"customization": None}):
        (line, *_) = headlines(full() | missing)
        assert (line.label, line.tone) == ("Customization: not measured", Tone.VOID)
        assert "No customization was measured" in line.sentence
        assert words(render(full() | missing, [])).count("fixative verify") == 2


def test_secondary_metrics_make_no_headline() -> None:
    secondary = table()
    secondary["question"]["primary"] = False
    (line, *_) = headlines(full() | {"customization": [secondary]})
    assert (line.label, line.tone) == ("Customization: not measured", Tone.VOID)
    assert "primary metric has no scores" in line.sentence


def test_a_gate_that_lets_all_pass_does_not_hide_what_is_weak(document: dict[str, Any]) -> None:
    (line,) = [line for line in headlines(document) if line.label == "Gate"]
    assert line.sentence.startswith("Of 3 judged shards: 1 flag, 2 pass. 1 of those that pass lies below")
    strong = {"shards": {"a": shard(decision()), "b": shard(decision("pass", None))}}
    (line,) = [line for line in headlines(document | strong) if line.label == "Gate"]
    assert (line.sentence, line.tone) == ("Of 2 judged shards: 2 pass.", Tone.GOOD)
    failed = {"shards": {"a": shard(decision("fail", None, reason="nothing was gained"))}}
    (line,) = [line for line in headlines(document | failed) if line.label == "Gate"]
    assert line.tone is Tone.BAD


def test_laboratory_numbers_are_called_that(document: dict[str, Any]) -> None:
    assert any("Laboratory" in text and "nano-sd" in text for text in warnings(document))
    real = document["attack"] | {"models": {"latent": "/models/stable-diffusion-v1-5"}}
    assert not any("Laboratory" in text for text in warnings(document | {"attack": real}))
    assert any("Laboratory" in text for text in warnings({"model": "nano-sd"}))


def test_what_is_no_claim_to_publish_says_why() -> None:
    (text,) = [text for text in warnings(full()) if text.startswith("Monitoring")]
    assert "dreambooth has 12 units and 1 seed;" in text
    claim = full() | {"customization": [table(seeds=3)], "editing": []}
    assert claim["customization"][0]["publishable"] is True
    assert not any(text.startswith("Monitoring") for text in warnings(claim))


@pytest.mark.parametrize("key", sorted(full()))
def test_any_part_may_be_missing(document: dict[str, Any], key: str) -> None:
    text = words(render({name: value for name, value in document.items() if name != key}, []))
    assert not re.search(r"\bNone\b|Undefined|\{'|\bnan\b", text)


def test_parts_that_are_null_are_missing(document: dict[str, Any]) -> None:
    assert render(dict.fromkeys(document), []) == render({}, [])


def test_what_was_not_measured_is_not_a_number() -> None:
    nothing = {"purifier": "chain", "share": None, "low": None, "high": None, "images": 2}
    document = full() | {"survival": [nothing], "fidelity": []}
    (line,) = [line for line in headlines(document) if line.label.startswith("Objective")]
    assert (line.label, line.tone) == ("Objective: not measured", Tone.VOID)
    assert "there was no gain to lose" in line.sentence
    assert '<span class="tag void">not measured</span> no gain to lose' in render(document, [])


def test_a_later_verification_does_not_speak_of_an_objective_it_does_not_look_at() -> None:
    later = full() | {"survival": []}
    assert not any(line.label.startswith("Objective") for line in headlines(later))
    assert 'id="survival"' not in render(later, [])
    assert 'id="survival"' in render(later | {"kind": "protect"}, [])


def test_only_what_is_measured_has_a_tone() -> None:
    assert verdict_tone(Verdict.SHOWN) is Tone.GOOD
    assert {verdict_tone(Verdict.SHOWN, state) for state in ("invalid", "not run", "error", "odd")} == {Tone.VOID}


def test_a_state_that_nobody_knows_is_shown_as_it_is() -> None:
    odd = full()
    odd["customization"][0]["rows"][1]["state"] = "half done"
    odd["shards"]["shard-00000-3f2a9c1b7d20"]["gate"][0]["outcome"] = "perhaps"
    page = render(odd, [])
    assert '<span class="tag void">half done</span>' in page
    assert '<span class="tag void">perhaps</span>' in page


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.05, "0.050"), (12, "12"), (12345, "12,345"), (34.125, "34.1"), (-0.5, "\N{MINUS SIGN}0.500"), (0.0, "0.000"),
     (0.00012, "1e\N{MINUS SIGN}04"), (None, "\N{EN DASH}"), ("3", "\N{EN DASH}"), (True, "\N{EN DASH}"),
     (float("nan"), "not finite")],
)  # fmt: skip
def test_numbers(value: object, text: str) -> None:
    assert number(value) == text


def test_a_side_without_a_limit_is_named() -> None:
    assert interval({"value": 0.5, "low": 0.1, "high": None}) == "0.500 [0.100,\N{NO-BREAK SPACE}no limit]"
    assert interval({"value": 0.5, "low": None, "high": None}) == "0.500"


def test_names_from_outside_are_escaped() -> None:
    poisoned = [
        Strip(title=SCRIPT, unit=SCRIPT, shard_id=f'"{SCRIPT}', row=f"'{SCRIPT}", pictures={f'"{SCRIPT}': b"png"}),
        Strip(
            title='" onerror="alert(1)',
            unit='" onclick="alert(1)',
            shard_id="javascript:alert(1)",
            row="",
            pictures={'" onload="x': b"png"},
        ),
    ]
    page = render(hostile(), poisoned)
    assert "<script" not in page
    elements = Elements(page)
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)
    assert not any(link.startswith("javascript:") for link in elements.all("href"))
    # Reasons, gates, groups, purifiers, shards, versions: the text is there, as text.
    assert elements.text.count(SCRIPT) > 100


def test_a_page_needs_nothing_but_itself(page: str) -> None:
    elements = Elements(page)
    (policy,) = [item["content"] for item in elements.tagged("meta") if "http-equiv" in item]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert all(source.startswith("data:image/png;base64,") for source in elements.all("src"))
    assert {tag for tag, _ in elements.found} & {"script", "iframe", "object", "form", "base"} == set()


def test_a_page_beside_the_archive_links_to_manifests_and_one_with_originals_does_not(page: str) -> None:
    def outside(text: str) -> set[str]:
        return {link for link in Elements(text).all("href") if not link.startswith("#")}

    assert outside(page) == {"data:,", "verification.json"}
    manifests = {f"../../manifests/{name}.json" for name in full()["shards"]}
    assert outside(render(full(), [])) == {"data:,", "verification.json"} | manifests


def test_ids_are_unique_and_links_lead_to_them(page: str) -> None:
    elements = Elements(page)
    ids = Counter(elements.all("id"))
    assert [name for name, count in ids.items() if count > 1] == []
    inside = {link[1:] for link in [*elements.all("href"), *elements.all("xlink:href")] if link.startswith("#")}
    assert "shard-shard-00001-77aa01c2e9f4" in inside
    assert inside - set(ids) == set()


def test_the_same_document_gives_the_same_page(document: dict[str, Any], page: str) -> None:
    assert render(json.loads(json.dumps(document)), strips()) == page


def test_pictures_are_in_the_page_with_the_way_to_their_row(page: str) -> None:
    images = Elements(page).tagged("img")
    sent = [data for strip in strips() for data in strip.pictures.values()]
    assert [base64.b64decode(image["src"].partition(",")[2]) for image in images] == sent
    assert images[1]["alt"] == "protected: cats/tabby 17.png"
    assert "fixative inspect s3://archive/protected 'cats/tabby 17.png'" in words(page)
    assert words(page).count("fixative inspect") == 1, "a group has no one row"
    assert '<a href="#picture-1">subject-3</a>' in page


def test_the_numbers_of_an_edited_image_lead_to_its_pictures(document: dict[str, Any]) -> None:
    """Tables count images by shard and hash; people know them by asset ids, which may repeat across shards."""
    unit = next(iter(document["editing"][0]["unit_residuals"]["none"]))
    strip = replace(strips()[0], unit=unit)
    page = render(document, [strip])
    assert f'<a href="#picture-0">{unit}</a>' in page
    assert f"<h3>{strip.title}</h3>" in page


REASONS = {"a": "too unlike", "b": "too unlike", "c": "too few"}


def test_why_there_are_fewer_groups_than_asked_for(document: dict[str, Any]) -> None:
    why = "2 shards: too unlike; 1 shard: too few."
    assert f"Fewer groups were attacked than asked for. {why}" in warnings(document | {"too_few_groups": REASONS})
    nothing = document | {"too_few_groups": REASONS, "customization": []}
    (line, *_) = headlines(nothing)
    assert line.label == "Customization: not measured"
    assert line.sentence.endswith(f"no group of images of one subject could be made. {why}")
    assert words(render(nothing, [])).count(why) == 2
    assert not any("Fewer groups" in text for text in warnings(document | {"too_few_groups": {}}))


def test_of_many_shards_the_worst_are_shown_and_the_others_counted() -> None:
    strip = Strip(title="far", unit="far", shard_id="shard-00500-aa", row="far", pictures={})
    page = render(many_shards(1000), [strip])
    shown = re.findall(r'<tr class="main" id="shard-(.*?)">', page)
    assert len(shown) == MOST_SHARDS
    assert shown[:2] == ["shard-00999-aa", "shard-00000-aa"]
    assert "The 200 shards that fare worst. 800 more are in verification.json." in words(page)
    assert "shard-00500-aa, in verification.json" in page
    assert len(page) < 2_000_000


def test_shards_are_ordered_by_outcome_and_then_by_what_is_left() -> None:
    weak = shard(decision())
    weak["survival"] = [{"purifier": "chain", "share": 0.1, "low": None, "high": None, "images": 1}]
    blind = shard(decision()) | {"survival": []}
    named = {"strong": shard(decision()), "weak": weak, "blind": blind, "ungated": shard(), "flagged":
             shard(decision("flag", 0.4)), "failed": shard(decision("fail", 0.4))}  # fmt: skip
    shown = re.findall(r'<tr class="main" id="shard-(.*?)">', render(full() | {"shards": named}, []))
    assert shown == ["failed", "flagged", "ungated", "blind", "weak", "strong"]


def plot(**fields: Any) -> ElementTree.Element:
    given: dict[str, Any] = {"label": "chain", "note": "0.2", "value": 0.2, "low": 0.1, "high": 0.3, "tone": Tone.OPEN}
    return ElementTree.fromstring(
        interval_plot([Span(**given | fields)], [0, 0.05], axis="residual", title="all <purifiers>")
    )


def drawn(root: ElementTree.Element) -> list[str]:
    return [str(path.get("d")) for path in root.iter("{http://www.w3.org/2000/svg}path") if path.get("clip-path")]


def test_a_plot_takes_names_as_they_are_and_colours_from_the_page() -> None:
    root = plot(label="$\\frac{1}$ <b>&\x07", tone=Tone.BAD)
    text = ["".join(item.itertext()) for item in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "$\\frac{1}$ <b>&\N{REPLACEMENT CHARACTER}" in text
    assert "0.05" in text
    assert root.get("aria-label") == "all <purifiers>"
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", ElementTree.tostring(root, encoding="unicode")))
    assert colours == {"none", "var(--ink)", "var(--muted)", "var(--rule)", "var(--bad)"}


def test_a_value_without_an_interval_has_no_line_and_no_value_has_nothing() -> None:
    counts = [len(drawn(plot(**fields))) for fields in ({}, {"low": None, "high": None})]
    assert counts == [3, 2], "two marks, and the line between the limits"
    assert len(drawn(plot(value=None, low=None, high=None))) == 2


def test_a_line_without_a_limit_goes_to_the_edge() -> None:
    ends = [float(x) for x in re.findall(r"[ML] (\S+) ", drawn(plot(high=None))[2])]
    edge = max(float(x) for path in plot(high=None).iter("{http://www.w3.org/2000/svg}rect") for x in [
        float(path.get("x", 0)) + float(path.get("width", 0))])  # fmt: skip
    assert max(ends) == pytest.approx(edge)
