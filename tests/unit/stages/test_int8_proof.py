"""A network that the proof cannot deal with is converted all the same, and the report says so."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sepdeploy.core.artifact import Artifact, Format, Precision, Role
from sepdeploy.core.int8_proof import Int8Proof, LayerSqnr
from sepdeploy.core.progress import Silent
from sepdeploy.core.stage_store import StageStore
from sepdeploy.render.int8 import share_text
from sepdeploy.stages import int8_proof
from sepdeploy.stages.int8_proof import prove_int8


class Images(list):
    """Eight images; none is left over for anything."""

    sha256 = "images"

    def head(self, count):
        return self

    def without(self, other):
        return self

    def split(self, ratio, seed):
        return self, self

    def batches(self, size):
        for image in self:
            yield image[None], None


@pytest.fixture
def proven(tmp_path):
    file = tmp_path / "net.onnx"
    file.write_bytes(b"net")
    artifact = Artifact.of_file(file, format=Format.ONNX, precision=Precision.INT8, role=Role.CONVERTED)
    store = StageStore(tmp_path, on_change=lambda: None)
    return lambda: prove_int8(
        store,
        artifact,
        Path(file),
        SimpleNamespace(calibration=Images(np.ones((8, 8, 6, 6), np.float32))),
        4,
        {},
        Silent(),
    )


def test_what_fails_is_said(proven, monkeypatch):
    def fails(*arguments):
        raise KeyError("tensor")

    monkeypatch.setattr(int8_proof, "int8_share_of_onnx", fails)
    proof = proven()
    assert "what it computes in int8 could not be found out" in proof.note
    assert share_text(proof) == "-"


def test_the_share_stays_where_the_layers_fail(proven, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no such tensor")

    monkeypatch.setattr(int8_proof, "int8_share_of_onnx", lambda path: Int8Proof(7, 7, ()))
    monkeypatch.setattr(int8_proof, "layer_sqnr_of_onnx", fails)
    proof = proven()
    assert proof.note == "how much noise its layers add could not be found out: RuntimeError: no such tensor"
    assert share_text(proof) == "100.00"


def test_layers_are_compared_on_images(proven, monkeypatch):
    layers = (LayerSqnr("a", "Conv", 40.0, 30.0),)
    seen = []
    monkeypatch.setattr(int8_proof, "int8_share_of_onnx", lambda path: Int8Proof(7, 7, ()))
    monkeypatch.setattr(int8_proof, "layer_sqnr_of_onnx", lambda a, b, images: (seen.extend(images), layers)[1])
    proof = proven()
    assert (proof.layers, proof.images, len(seen), proof.note) == (layers, 8, 8, "")
    assert seen[0].shape == (1, 8, 6, 6)
