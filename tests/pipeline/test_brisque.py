"""BRISQUE: planted densities, and the trained regression beside scikit-learn's; its files are read, never run."""

from __future__ import annotations

import importlib.util
import pickle
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.svm import SVR

from pipeline.verify.metrics.base import WeightsMissing, measure
from pipeline.verify.metrics.naturalness import (
    Brisque,
    SupportVectors,
    asymmetric_fit,
    brisque_features,
    installed_weights,
    read_support_vectors,
)


@pytest.mark.parametrize("shape", [0.8, 1.0, 2.0, 4.0])
def test_the_fit_finds_planted_shapes(shape: float) -> None:
    draws = stats.gennorm.rvs(shape, size=200_000, random_state=np.random.default_rng(1))
    skewed = np.where(draws < 0, 2 * draws, draws)
    # Twice as wide on the left, with twice the mass there, is one asymmetric density.
    skewed = np.concatenate([skewed, skewed[skewed < 0]])
    found, mean, left, right = asymmetric_fit(skewed)
    assert found == pytest.approx(shape, rel=0.05)
    assert left / right == pytest.approx(4, rel=0.05)
    assert mean == pytest.approx(skewed.mean(), rel=0.05)


def test_noise_has_gaussian_features_and_a_plain_surface_none() -> None:
    noise = torch.randint(0, 256, (3, 128, 128), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    features = brisque_features(noise)
    assert features.shape == (36,)
    assert features[0] > 1.9, "independent pixels are not peaked"
    assert features[[3, 7, 11, 15]] == pytest.approx(0, abs=0.2), "neighbours have nothing in common"
    flat = torch.full((1, 3, 64, 64), 90, dtype=torch.uint8)
    vectors = SupportVectors(
        vectors=np.zeros((1, 36)), weights=np.ones(1), width=1.0, offset=0.0, lowest=np.zeros(36), highest=np.ones(36)
    )
    assert measure(Brisque(vectors), flat)["brisque"][0].value is None
    assert Brisque(vectors).score(flat[..., :16]) == {}


def libsvm_text(model: SVR) -> str:
    lines = ["svm_type epsilon_svr", "kernel_type rbf", f"gamma {model.gamma}", f"rho {-model.intercept_[0]}", "SV"]
    for weight, vector in zip(model.dual_coef_[0], model.support_vectors_, strict=True):
        # Zeros are not written.
        entries = " ".join(f"{place + 1}:{value!r}" for place, value in enumerate(vector.tolist()) if value)
        lines.append(f"{float(weight)!r} {entries} ")
    return "\n".join(lines) + "\n"


def test_support_vectors_are_read_without_running_anything() -> None:
    random = np.random.default_rng(3)
    inputs = random.uniform(-1, 1, (40, 36))
    inputs[:, 5] = 0
    svr = SVR(gamma=0.05, C=10).fit(inputs, inputs.sum(axis=1))
    lowest, highest = random.uniform(0, 1, 36), random.uniform(2, 3, 36)
    ranges = pickle.dumps({"min_": lowest.tolist(), "max_": highest.tolist()}, protocol=4)
    read = read_support_vectors(libsvm_text(svr), ranges)
    raw = (inputs[:5] + 1) / 2 * (highest - lowest) + lowest
    assert [read.score(row) for row in raw] == pytest.approx(svr.predict(inputs[:5]).tolist())
    with pytest.raises(ValueError, match="no epsilon-SVR"):
        read_support_vectors("svm_type c_svc\nkernel_type rbf\nSV\n", ranges)
    with pytest.raises(ValueError, match="limits"):
        read_support_vectors(libsvm_text(svr), pickle.dumps([1.0]))


def test_other_files_than_the_known_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("brisque", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(WeightsMissing, match="lacks its files"):
        installed_weights()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "svm.txt").write_text("svm_type epsilon_svr\nkernel_type rbf\nSV\n")
    (tmp_path / "models" / "normalize.pickle").write_bytes(pickle.dumps([1.0] * 72))
    with pytest.raises(WeightsMissing, match="other files"):
        installed_weights()
