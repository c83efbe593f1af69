"""Weights of networks that metrics define themselves: one safetensors file in a local folder, and nothing else."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from protectors.model_files import ModelError

_COUNTER = "num_batches_tracked"


def load_weights(network: nn.Module, folder: Path, source: str) -> None:
    """Fills a network from the folder's one safetensors file; what the network lacks in it is passed over.

    Args:
        network: gets weights, and is made ready to measure with.
        folder: holds the file.
        source: of such weights, for the message.

    Raises:
        ModelError: not one file, one that cannot be read, or a weight of the network is missing or of another shape.
    """
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise ModelError(f"{folder} holds {len(files)} safetensors files, not one: it must hold {source}")
    try:
        given = load_file(files[0])
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{files[0]} cannot be read: {error}") from error
    # Counters of training steps decide nothing, and older files lack them.
    wanted = {name: weight for name, weight in network.state_dict().items() if not name.endswith(_COUNTER)}
    if wrong := [name for name, weight in wanted.items() if not _fits(weight, given.get(name))]:
        raise ModelError(f"{files[0]} lacks {wrong[0]} or has it in another shape: it must hold {source}")
    network.load_state_dict({name: given[name] for name in wanted}, strict=False)
    network.eval().requires_grad_(False)


def _fits(weight: Tensor, given: Tensor | None) -> bool:
    return given is not None and given.shape == weight.shape
