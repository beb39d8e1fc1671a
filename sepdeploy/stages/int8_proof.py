"""What an int8 file computes in int8, and which of its layers lose most; work/int8/*.json."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from sepdeploy.core.artifact import Artifact, Format
from sepdeploy.core.codec import read_json, write_json
from sepdeploy.core.files import sha256_of_file
from sepdeploy.core.int8_proof import Int8Proof
from sepdeploy.core.progress import Progress
from sepdeploy.core.quiet import error_summary
from sepdeploy.core.stage_store import StageStore
from sepdeploy.data.images import ImageSet
from sepdeploy.quantize.int8_share import int8_share_of_onnx, int8_share_of_tflite
from sepdeploy.quantize.layer_sqnr import layer_sqnr_of_onnx, layer_sqnr_of_tflite
from sepdeploy.stages.int8 import range_images
from sepdeploy.stages.load import Inputs
from sepdeploy.version import __version__

__all__ = ["held_out_images", "prove_int8"]

_IMAGES = 32
"""The ratios of a layer differ by tenths of a decibel between images."""


def held_out_images(inputs: Inputs, seed: int) -> tuple[ImageSet, bool]:
    """Calibration images that no range comes from, and whether they are that: with too few, any are taken."""
    fit, held_out = range_images(inputs, seed)
    images = held_out.head(_IMAGES)
    return images, len(images.without(fit)) == len(images)


def prove_int8(
    store: StageStore,
    artifact: Artifact,
    source: Path,
    inputs: Inputs,
    seed: int,
    versions: dict[str, str],
    progress: Progress,
) -> Int8Proof:
    """Read the share of int8 from a file, and compare its layers with those of the float file on calibration images.

    Args:
        store: Remembers what was made from what.
        artifact: The int8 file.
        source: The float32 file that it was quantized from.
        inputs: Has the calibration images.
        seed: Of the choice of images.
        versions: Of the packages that have a hand in it.
        progress: Told what is going on.
    """
    name = f"{artifact.role.value}.{artifact.format.value}"
    path = store.work / "int8" / f"{name}.json"
    key = {
        "file": artifact.sha256,
        "source": sha256_of_file(source),
        "images": inputs.calibration.sha256,
        "seed": seed,
        "version": __version__,
        "versions": versions,
    }

    def make() -> None:
        progress.stage(f"comparing the layers of the {artifact.role.value} int8 {artifact.format.value} file")
        images, is_held_out = held_out_images(inputs, seed)

        def as_file_takes() -> Iterator[np.ndarray]:
            for batch, _ in images.batches(1):
                yield np.ascontiguousarray(batch.transpose(0, 2, 3, 1) if artifact.is_channels_last else batch)

        is_onnx, file = artifact.format is Format.ONNX, Path(artifact.path)
        proof = Int8Proof(0, 0, ())
        try:
            proof = int8_share_of_onnx(file) if is_onnx else int8_share_of_tflite(file)
            layers = (layer_sqnr_of_onnx if is_onnx else layer_sqnr_of_tflite)(source, file, as_file_takes())
            proof = replace(proof, layers=layers, images=len(images), is_held_out=is_held_out)
        except Exception as error:  # whatever a network brings: the files are made, and stay without this proof
            what = "how much noise its layers add" if proof.macs else "what it computes in int8"
            proof = replace(proof, note=f"{what} could not be found out: {error_summary(error)}")
        write_json(path, proof)

    store.run(f"int8 {name}", key, (path,), make)
    return read_json(Int8Proof, path)
