"""Versions of the packages that have a hand in a bundle."""

from __future__ import annotations

from importlib import metadata

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """Package -> installed version of everything that has a hand in the files."""
    names = (
        "torch", "numpy", "onnx", "onnxscript", "onnxsim", "onnxruntime",
        "litert-torch", "ai-edge-litert", "ai-edge-quantizer", "pillow",
    )  # fmt: skip
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
