"""The reference models that are shipped inside the package, found by name and checked by digest."""

import hashlib
from pathlib import Path

NANO_SD = "nano-sd"
NANO_DDPM = "nano-ddpm"
NANO_EMBED = "nano-embed"

# sha256 of every weight file. A protection is only reproducible against exactly these weights, so the digests
# live in code, where a change is reviewed, and not beside the files, where it would change with them.
PINNED: dict[str, dict[str, str]] = {
    NANO_DDPM: {
        "unet/diffusion_pytorch_model.safetensors": "3e78e2af960e20f5365f4db44601954a6f02d36624227859fc3ca1f1fc53fa16"
    },
    NANO_EMBED: {"model.safetensors": "7989753ea9418b1411ebe0841289c71901d750781b95c8a42ed3b41f31a4bc0c"},
    NANO_SD: {
        "text_encoder/model.safetensors": "8710a2059e67b6a2839170dc5589ea08e100dacb37263bb5ce6dc6b74cdd3ca2",
        "unet/diffusion_pytorch_model.safetensors": "769a0410277bfd2e42c7c63c14c28056436a030746b1121ca465fe6db7cbd0ba",
        "vae/diffusion_pytorch_model.safetensors": "73f931a45b585edef76b861e9405e928480aacb388bfbf62e3fdebb1b8899a82",
    },
}


class ReferenceModelError(ValueError):
    """A shipped reference model is unknown, incomplete or not the one that the code was written for."""


def reference_path(name: str = NANO_SD) -> Path:
    """Returns the folder of a shipped model, in diffusers' own format.

    Raises:
        ReferenceModelError: `name` is not a model of this package.
    """
    if name not in PINNED:
        raise ReferenceModelError(f"no reference model {name!r}; there are: {', '.join(sorted(PINNED))}")
    return Path(__file__).resolve().parent / name


def verify_reference(name: str = NANO_SD) -> None:
    """Returns silently if every weight file of the model has its pinned digest. Reads all of them (20 MB).

    Raises:
        ReferenceModelError: a file is missing or differs; the message names it.
    """
    folder = reference_path(name)
    for relative, expected in PINNED[name].items():
        file = folder / relative
        if not file.is_file():
            raise ReferenceModelError(f"reference model {name!r} lacks {relative}: install the package again")
        actual = hashlib.sha256(file.read_bytes()).hexdigest()
        if actual != expected:
            raise ReferenceModelError(
                f"reference model {name!r}: {relative} has sha256 {actual}, the code pins {expected}; install the "
                "package again, or name your own model by its path"
            )
