"""What a training needs to go on after a stop: tensors in safetensors, the position in a small JSON."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

Binding = Mapping[str, str | int | float | bool | list[float]]


class CheckpointConflict(ValueError):
    """The checkpoint is of another training; the message says which fields differ."""


@dataclass(slots=True)
class Cursor:
    """Where a training stands. All random numbers are functions of these three, so nothing else is kept."""

    seed: int
    step: int = 0  # updates made
    position: int = 0  # samples drawn so far, which is the place in the order of the data


def save_checkpoint(folder: Path, cursor: Cursor, tensors: dict[str, Tensor], binding: Binding) -> None:
    """Writes a checkpoint; a kill or a power cut at any moment leaves the previous or the new one, never a mixture.

    The JSON is the commit point: it names the tensor file, which is complete on the disk before the JSON is replaced.

    Args:
        binding: what the training depends on besides its position; another binding is refused when it goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"state-{cursor.step:08d}.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.part")
    _finish(folder, name)
    facts = {**asdict(cursor), "tensors": name, "binding": dict(binding)}
    (folder / "state.json.part").write_text(json.dumps(facts, indent=1) + "\n")
    _finish(folder, "state.json")
    for old in folder.glob("state-*.safetensors"):
        if old.name != name:
            old.unlink()


def _finish(folder: Path, name: str) -> None:
    """Gives a written file its name; both are on the disk when this returns."""
    part = folder / f"{name}.part"
    _sync(part)
    os.replace(part, folder / name)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(folder: Path, seed: int, binding: Binding) -> tuple[Cursor, dict[str, Tensor]] | None:
    """Returns the last checkpoint, or None if there is none.

    Raises:
        CheckpointConflict: it was made with another seed or binding; a mixture would be neither training.
    """
    file = folder / "state.json"
    if not file.exists():
        return None
    facts = json.loads(file.read_text())
    made = {"seed": facts["seed"], **facts["binding"]}
    wanted = {"seed": seed, **binding}
    differing = [name for name in made.keys() | wanted.keys() if made.get(name) != wanted.get(name)]
    if differing:
        change = "; ".join(f"{name} {made.get(name)}, not {wanted.get(name)}" for name in sorted(differing))
        raise CheckpointConflict(f"{folder} holds a training with {change}: remove it, or train in another --work")
    tensors: dict[str, Tensor] = load_file(folder / facts["tensors"])
    return Cursor(seed=seed, step=facts["step"], position=facts["position"]), tensors
