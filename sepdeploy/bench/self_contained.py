"""Files that go somewhere else must hold everything: ONNX files may keep their weights in others beside them."""

from __future__ import annotations

from pathlib import Path

from sepdeploy.core.quiet import first_line
from sepdeploy.errors import UsageError

__all__ = ["self_contained"]

_KEY = b"location"
"""Stands in every ONNX file that names another (`TensorProto.external_data`)."""


def self_contained(path: Path, folder: Path) -> Path:
    """The file itself, or where it keeps weights elsewhere a copy with them in it.

    Args:
        path: An ONNX or TFLite file.
        folder: Where a copy is written, if one is needed.

    Raises:
        UsageError: if weights are missing, or too large for one file (2 GiB).
    """
    if path.suffix.lower() != ".onnx" or _KEY not in path.read_bytes():
        return path
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # no ONNX file: the runtime that is asked to run it says so
        return path
    if not any(onnx.external_data_helper.uses_external_data(tensor) for tensor in model.graph.initializer):
        return path
    copy = folder / path.name
    try:
        onnx.save(onnx.load(path), copy)
    except Exception as error:
        raise UsageError(
            f"the weights that {path} keeps in other files cannot be put into it: {first_line(error)}"
        ) from error
    return copy
