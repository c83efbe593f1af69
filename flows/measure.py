"""``fixative measure``: every number that can be measured of a set of images here, and why the others cannot."""

from __future__ import annotations

import json
from functools import partial
from itertools import tee
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flows import show
from flows.options import S3Endpoint, S3Profile, S3Region, metric_option, metrics_asked
from pipeline.config import S3Settings
from pipeline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from pipeline.verify.metrics.registry import Absent
    from pipeline.verify.metrics.sets import Number
    from pipeline.verify.samples import Sample

app = typer.Typer()
console = show.terminal()


@app.command("measure")
def measure(
    images: Annotated[str, typer.Argument(help="Folder, prefix, Parquet file or tar with images.")],
    originals: Annotated[
        str | None, typer.Option("--originals", help="What they were made from, under the same names: fidelity, LPIPS.")
    ] = None,
    photos: Annotated[
        str | None,
        typer.Option("--photos", help="Real photos of the subject that no attack was trained on: similarity, faces."),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="What the images should show: CLIP-T.")] = None,
    others: Annotated[
        str | None, typer.Option("--others", help="Another set: KID and CMMD from 100 images, FID from 2048 on.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        metric_option("inception=FOLDER (one safetensors file; FID). Faces and BRISQUE come with packages."),
    ] = None,
    count: Annotated[int | None, typer.Option("--count", help="Use the first so many images.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="JSON file for all numbers, per image as well.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    s3_endpoint: S3Endpoint = None,
    s3_region: S3Region = None,
    s3_profile: S3Profile = None,
) -> None:
    """Measure images: fidelity, likeness to a subject, faces, naturalness, distance to another set.

    Every number says which weights it used; one whose weights are missing is absent, with the reason.

    Example: fixative measure protected/ --originals photos/ --metric lpips=alexnet/
    """
    from pipeline.verify.metrics.registry import INSTALLED, WEIGHTS
    from pipeline.verify.metrics.sets import Comparison, measure_set, remarks

    weights = metrics_asked(metric)
    if wrong := [name for name, folder in weights.items() if name not in WEIGHTS or folder == INSTALLED]:
        raise UserError(f"--metric {wrong[0]}: write NAME=FOLDER, with one of {', '.join(WEIGHTS)}")
    s3 = S3Settings(endpoint_url=s3_endpoint, region=s3_region, profile=s3_profile)
    left_out: list[str] = []
    names: list[str] = []
    read = partial(_read, s3=s3, left_out=left_out)
    samples: Iterator[Sample] = read(images, count)
    known: Iterator[Sample] | None = None
    if originals is not None:
        # Both sides of a pair are taken in turn, so that one pair is in memory at a time.
        left, right = tee(_paired(samples, read(originals, None), originals))
        samples, known = (pair[0] for pair in left), (pair[1] for pair in right)
    given = Comparison(
        originals=None if known is None else map(_tensor, known),
        photos=None if photos is None else [_tensor(sample) for sample in read(photos, None)],
        prompt=prompt,
        others=None if others is None else (_tensor(sample) for sample in read(others, None)),
    )
    folders = {name: Path(folder) for name, folder in weights.items()}
    with console.status(images):
        numbers, absent = measure_set(_tensors(samples, names), given, folders, device=device)
    for reason in left_out:
        console.print(f"left out {reason}", style="yellow", markup=False)
    _show(numbers, absent, remarks(numbers))
    if out is not None:
        document = {
            "images": names,
            "numbers": [number.to_dict() for number in numbers],
            "absent": [entry.to_dict() for entry in absent],
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        console.print(f"wrote {out}", highlight=False)


def _read(source: str, count: int | None, s3: S3Settings, left_out: list[str]) -> Iterator[Sample]:
    from pipeline.decode import DecodeLimits
    from pipeline.verify.samples import stream_samples

    return stream_samples(source, count, limits=DecodeLimits(), s3=s3, left_out=left_out)


def _tensor(sample: Sample) -> Tensor:
    from pipeline.verify.trial import tensor

    return tensor(sample.pixels)


def _tensors(samples: Iterable[Sample], names: list[str]) -> Iterator[Tensor]:
    """The images; their names are noted as they pass."""
    for sample in samples:
        names.append(sample.name)
        yield _tensor(sample)


def _paired(samples: Iterable[Sample], originals: Iterable[Sample], source: str) -> Iterator[tuple[Sample, Sample]]:
    """Every image and its original: of the same name, apart from its ending, and of the same size.

    Both lie in the order of their names as a rule, and then nothing is kept; what passes before its turn waits.
    """
    waiting: dict[str, Sample] = {}
    stream = _distinct(originals)
    for sample in _distinct(samples):
        stem = _stem(sample)
        while stem not in waiting and (other := next(stream, None)) is not None:
            waiting[_stem(other)] = other
        original = waiting.pop(stem, None)
        if original is None or original.pixels.shape != sample.pixels.shape:
            raise UserError(f"{source} holds no original named {stem} and of the size of {sample.name}")
        yield sample, original
    for _ in stream:  # for names that are there twice
        pass


def _distinct(samples: Iterable[Sample]) -> Iterator[Sample]:
    seen: dict[str, str] = {}
    for sample in samples:
        if (other := seen.get(_stem(sample))) is not None:
            raise UserError(f"{other} and {sample.name} differ in their endings at most: nobody can tell the pairs")
        seen[_stem(sample)] = sample.name
        yield sample


def _stem(sample: Sample) -> str:
    return str(PurePosixPath(sample.name).with_suffix(""))


def _show(numbers: Sequence[Number], absent: Sequence[Absent], said: Sequence[str]) -> None:
    table = Table("metric", "mean", "images", "errors", "weights", "licence")
    for number in numbers:
        value = "" if number.value is None else f"{number.value:.4g}"
        facts = number.facts
        table.add_row(facts.name, value, str(number.images), str(len(number.errors)), facts.weights[:12], facts.licence)
    if numbers:
        console.print(table)
    for line in said:
        console.print(line, markup=False, highlight=False)
    for number in numbers:
        if number.errors:
            console.print(f"{number.facts.name}: {number.errors[0]}", markup=False, highlight=False)
    for entry in absent:
        console.print(f"{entry.name}: absent, because {entry.reason}", markup=False, highlight=False)
