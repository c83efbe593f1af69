"""``fixative attack``: one attack on a few images, with pictures: the laboratory bench."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import track
from rich.table import Table

from flows import show
from flows.options import S3Endpoint, S3Profile, S3Region
from pipeline.config import S3Settings
from pipeline.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.verify.attack_models import AttackModels
    from pipeline.verify.samples import Sample

app = typer.Typer(
    no_args_is_help=True,
    help="Single attacks on a folder or shard, writing images: purify, customize, edit.",
)
console = show.terminal()

Source = Annotated[str, typer.Argument(help="Folder, prefix, Parquet file or tar with images.")]
Out = Annotated[Path, typer.Argument(help="Folder for the pictures and attack.json.")]
Count = Annotated[int, typer.Option("--count", help="Use the first so many images.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the attack's random draws.")]
Device = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
FEW = 8  # images; an attack on one takes seconds to minutes
Models = Annotated[
    list[str] | None,
    typer.Option("--attack-model", help="The attacker's checkpoint, as latent=FOLDER; repeatable. See `attack list`."),
]


@app.command("list")
def list_attacks() -> None:
    """List purifiers, customizers and editors, what they do and which checkpoint they need."""
    from pipeline.verify.attack_models import EMBEDDED
    from pipeline.verify.customizers import CUSTOMIZERS
    from pipeline.verify.editors import EDITORS
    from pipeline.verify.purifiers import PURIFIERS, SUITES

    table = Table("kind", "name", "what it does", "needs", "in suites")
    for name, purifier in PURIFIERS.items():
        suites = [suite for suite, members in SUITES.items() if name in members]
        need = "" if purifier.needs is None else str(purifier.needs)
        table.add_row("purify", name, purifier.summary, need, suites[0])
    for name, attack in CUSTOMIZERS.items():
        table.add_row("customize", name, f"{_first_line(attack)} Presets: {', '.join(attack.presets())}.", "latent", "")
    for name, editor in EDITORS.items():
        table.add_row("edit", name, _first_line(type(editor)), str(editor.needs), "")
    console.print(table)
    console.print(f"Embedded: {', '.join(f'{kind} ({name})' for kind, name in EMBEDDED.items())}; name others with")
    console.print("--attack-model KIND=FOLDER. A suite holds those before it: quick, standard, full.")


@app.command()
def purify(
    source: Source,
    out: Out,
    purifier: Annotated[list[str], typer.Option("--purifier", "-p", help="See `attack list`; repeatable.")],
    count: Count = FEW,
    seed: Seed = 0,
    device: Device = "cpu",
    attack_model: Models = None,
    s3_endpoint: S3Endpoint = None,
    s3_region: S3Region = None,
    s3_profile: S3Profile = None,
) -> None:
    """Purify images; writes OUT/PURIFIER/NAME.png and prints how far each purifier is from the image it got.

    Example: fixative attack purify protected/ purified/ -p chain -p gridpure-quick --count 4
    """
    from pipeline.verify.purifiers import PURIFIERS, check_purifiers
    from protectors.reference.quality import psnr

    models = _models(attack_model, device)
    check_purifiers(purifier, models.folders)
    samples = _samples(source, count, _s3(s3_endpoint, s3_region, s3_profile))
    table = Table("purifier", "PSNR to its input, dB", "images")
    for name in purifier:
        values = []
        for number, sample in enumerate(track(samples, description=name, console=console)):
            image = _tensor(sample)
            purified = PURIFIERS[name].purify(image, seeds=[seed + number], models=models)
            values.append(float(psnr(purified.float() / 255, image.float() / 255)))
            _save(purified, out / name / f"{_file_name(sample, number)}.png")
        table.add_row(name, f"{sum(values) / len(values):.2f}", str(len(values)))
    _note(out, {"attack": "purify", "seed": seed, "purifiers": {n: PURIFIERS[n].parameters() for n in purifier}})
    console.print(table)
    console.print(f"wrote {out}", highlight=False)


@app.command()
def customize(
    source: Source,
    out: Out,
    class_word: Annotated[str, typer.Option("--class-word", help='What the subject is, e.g. "dog".')],
    customizer: Annotated[str, typer.Option("--customizer", help="See `attack list`.")] = "dreambooth",
    preset: Annotated[str, typer.Option("--preset", help="literature or quick.")] = "quick",
    count: Annotated[int, typer.Option("--count", help="Train on the first so many images.")] = 4,
    drawn: Annotated[int, typer.Option("--drawn", help="Images to draw afterwards.")] = 8,
    prompt: Annotated[str, typer.Option("--prompt", help="Template; {} becomes the subject.")] = "a photo of a {}",
    seed: Seed = 0,
    device: Device = "cpu",
    attack_model: Models = None,
    s3_endpoint: S3Endpoint = None,
    s3_region: S3Region = None,
    s3_profile: S3Profile = None,
) -> None:
    """Customize a model on images of one subject and draw from it; writes OUT/drawn-N.png and OUT/before-N.png.

    Example: fixative attack customize photos-of-my-dog/ out/ --class-word dog
    """
    import torch

    from pipeline.verify.attack_models import ModelKind
    from pipeline.verify.customizers import customizer as attack_named
    from pipeline.verify.customizers.base import sample
    from pipeline.verify.embed import Embedder, mean_similarity
    from pipeline.verify.trial import square, tensor

    if "{}" not in prompt:
        raise UserError("--prompt: write {} where the subject goes")
    attack = attack_named(customizer, preset)
    samples = _samples(source, count, _s3(s3_endpoint, s3_region, s3_profile))
    base = _models(attack_model, device).get(ModelKind.LATENT)
    side = base.unet.config.sample_size * base.vae_scale_factor
    images = torch.stack([tensor(square(item.pixels, side)) for item in samples]).float() / 255
    with console.status(f"{customizer} on {len(images)} images"):
        customized = attack.customize(base, images, class_word, seed=seed)
        before = sample(base, prompt.format(class_word), drawn, seed=seed, sampling=attack.sampling)
        after = sample(
            customized.pipeline, prompt.format(customized.subject), drawn, seed=seed, sampling=attack.sampling
        )
    for name, pictures in (("before", before), ("drawn", after)):
        for number, picture in enumerate(pictures):
            _save((picture[None] * 255).round().to(torch.uint8), out / f"{name}-{number}.png")
    embedder = Embedder(device=device)
    real = embedder.embed(images)
    scores = {
        name: mean_similarity(embedder.embed(made), real) for name, made in (("before", before), ("after", after))
    }
    _note(out, {"attack": attack.parameters(), "class_word": class_word, "seed": seed, "similarity": scores})
    console.print(
        f"similarity to the images it was trained on: {scores['before']:.3f} before, {scores['after']:.3f} after "
        "(nano-embed). `fixative verify` compares with images that it has not seen, and with a clean control."
    )
    console.print(f"wrote {out}", highlight=False)


@app.command()
def edit(
    source: Source,
    out: Out,
    editor: Annotated[list[str], typer.Option("--editor", "-e", help="See `attack list`; repeatable.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="The edited image, or for instruct-pix2pix the instruction.")
    ] = None,
    source_prompt: Annotated[str, typer.Option("--source-prompt", help="The image as it is, if known.")] = "",
    cases: Annotated[
        bool, typer.Option("--cases", help="SOURCE holds case folders with one image and prompt.txt (Defense-Edit).")
    ] = False,
    count: Count = FEW,
    seed: Seed = 0,
    device: Device = "cpu",
    attack_model: Models = None,
    s3_endpoint: S3Endpoint = None,
    s3_region: S3Region = None,
    s3_profile: S3Profile = None,
) -> None:
    """Edit images; writes OUT/EDITOR/NAME.png. Editors that repaint a mask repaint the middle of the image.

    Example: fixative attack edit photos/ edited/ -e sdedit-0.5-quick --prompt "a watercolour painting"
    """
    from pipeline.verify.edit_trial import middle_mask
    from pipeline.verify.editors import EDITORS
    from pipeline.verify.editors.base import Edit

    if unknown := set(editor) - set(EDITORS):
        raise UserError(f"no editor named {min(unknown)!r}; `fixative attack list` shows what there is")
    if cases == (prompt is not None):
        raise UserError("give --prompt, or --cases for folders that hold their own prompt")
    models = _models(attack_model, device)
    wishes = _cases(Path(source), count) if cases else []
    if not cases:
        given = Edit(target=prompt or "", source=source_prompt)
        found = _samples(source, count, _s3(s3_endpoint, s3_region, s3_profile))
        wishes = [(_file_name(item, number), _tensor(item), given) for number, item in enumerate(found)]
    for name in editor:
        for number, (stem, image, wish) in enumerate(track(wishes, description=name, console=console)):
            masks = middle_mask(image) if EDITORS[name].needs_mask else None
            edited = EDITORS[name].edit(image, [wish], seeds=[seed + number], models=models, masks=masks)
            _save(edited, out / name / f"{stem}.png")
    _note(out, {"attack": "edit", "seed": seed, "editors": {name: EDITORS[name].parameters() for name in editor}})
    console.print(f"wrote {out}", highlight=False)


def _first_line(described: type[Any]) -> str:
    return (described.__doc__ or "").strip().splitlines()[0]


def _cases(root: Path, count: int) -> list[tuple[str, Tensor, Any]]:
    from pipeline.verify.editors.cases import load_cases

    found = load_cases(root)
    for refused in found.refused:
        console.print(f"left out {refused.folder}: {refused.reason}", style="yellow", markup=False)
    return [(case.id, case.image[None], case.edit) for case in found.cases[:count]]


def _s3(endpoint: str | None, region: str | None, profile: str | None) -> S3Settings:
    return S3Settings(endpoint_url=endpoint, region=region, profile=profile)


def _samples(source: str, count: int, s3: S3Settings) -> list[Sample]:
    from pipeline.decode import DecodeLimits
    from pipeline.verify.samples import read_samples

    samples, left_out = read_samples(source, count, limits=DecodeLimits(), s3=s3)
    for reason in left_out:
        console.print(f"left out {reason}", style="yellow", markup=False)
    return samples


def _models(given: Sequence[str] | None, device: str) -> AttackModels:
    from pipeline.verify.attack_models import AttackModels, with_embedded

    return AttackModels(with_embedded(kinds(given)), device=device)


def kinds(given: Sequence[str] | None) -> dict[str, str]:
    """KIND=FOLDER options as a mapping."""
    pairs = [text.partition("=") for text in given or ()]
    if wrong := [kind for kind, mark, folder in pairs if not (mark and folder)]:
        raise UserError(f"--attack-model {wrong[0]}: write KIND=FOLDER")
    return {kind: folder for kind, _, folder in pairs}


def _tensor(sample: Sample) -> Tensor:
    from pipeline.verify.trial import tensor

    return tensor(sample.pixels)[None]


def _file_name(sample: Sample, number: int) -> str:
    """Unique, and safe whatever the asset is called."""
    return f"{number:04d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', Path(sample.name).stem)[:60]}"


def _save(image: Tensor, file: Path) -> None:
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[0].permute(1, 2, 0).numpy()).save(file)


def _note(out: Path, facts: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "attack.json").write_text(json.dumps(facts, indent=1, default=str) + "\n")
