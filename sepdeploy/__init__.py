"""sepdeploy: rewrite a trained CNN's convolutions into separable ones, keep the accuracy, prove the speed.

report = sepdeploy.convert(sepdeploy.ConvertOptions(model=..., arch=..., calibration=...))
network = sepdeploy.load("model.sepdeploy")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sepdeploy.version import __version__

if TYPE_CHECKING:
    from sepdeploy.core.options import ConvertOptions
    from sepdeploy.pipeline import convert
    from sepdeploy.stages.bundle import load

__all__ = ["ConvertOptions", "__version__", "convert", "load"]

_PLACES = {
    "ConvertOptions": "sepdeploy.core.options",
    "convert": "sepdeploy.pipeline",
    "load": "sepdeploy.stages.bundle",
}


def __getattr__(name: str) -> Any:
    """Import the public names when they are used: torch takes seconds."""
    if name not in _PLACES:
        raise AttributeError(f"module 'sepdeploy' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_PLACES[name]), name)
