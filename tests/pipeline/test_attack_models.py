"""The attacker's checkpoints: a damaged one is refused, for a weak attack would pass for protection."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.verify.attack_models import ModelKind, load_pipeline
from protectors.model_files import ModelError
from tests.pipeline.edit_models import save_edit_models
from tests.protectors.tiny import save_tiny_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("whole") / "model")


def stored_weights(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.mark.parametrize("network", ["unet", "vae", "text_encoder"])
def test_a_model_that_lacks_a_weight_is_refused(whole: Path, tmp_path: Path, network: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    file = stored_weights(folder / network)
    weights = load_file(file)
    weights.pop(max(weights))
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{network} lacks weights"):
        load_pipeline(folder)


def test_a_whole_model_has_the_weights_of_its_files(whole: Path) -> None:
    pipeline = load_pipeline(whole)
    for network in ("unet", "vae", "text_encoder"):
        loaded = getattr(pipeline, network).state_dict()
        for name, weight in load_file(stored_weights(whole / network)).items():
            assert torch.equal(loaded[name], weight), name


def test_every_kind_of_checkpoint_is_loaded_whole(tmp_path: Path) -> None:
    for kind, folder in save_edit_models(tmp_path).items():
        assert load_pipeline(folder, ModelKind(kind)).unet.dtype == torch.float32


def test_a_folder_without_an_index_is_no_model(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    (folder / "model_index.json").unlink()
    with pytest.raises(ModelError, match="model_index"):
        load_pipeline(folder)
