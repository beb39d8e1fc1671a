"""sepdeploy: rewrite a trained CNN's convolutions into separable ones, keep the accuracy, prove the speed.

report = sepdeploy.convert(sepdeploy.ConvertOptions(model=..., arch=..., calibration=...))
network = sepdeploy.load("model.sepdeploy")

variant, result = sepdeploy.design(sepdeploy.DesignOptions(arch="models.resnet_cifar:resnet20"))
conv = sepdeploy.SeparableConv2d(64, 128, kernel_size=3, padding=1)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sepdeploy.version import __version__

if TYPE_CHECKING:
    from sepdeploy.core.design import DesignOptions
    from sepdeploy.core.options import ConvertOptions
    from sepdeploy.pipeline import convert, design
    from sepdeploy.schemes.separable_conv2d import SeparableConv2d
    from sepdeploy.stages.bundle import load

__all__ = ["ConvertOptions", "DesignOptions", "SeparableConv2d", "__version__", "convert", "design", "load"]

_PLACES = {
    "ConvertOptions": "sepdeploy.core.options",
    "DesignOptions": "sepdeploy.core.design",
    "SeparableConv2d": "sepdeploy.schemes.separable_conv2d",
    "convert": "sepdeploy.pipeline",
    "design": "sepdeploy.pipeline",
    "load": "sepdeploy.stages.bundle",
}


def __getattr__(name: str) -> Any:
    """Import the public names when they are used: torch takes seconds."""
    if name not in _PLACES:
        raise AttributeError(f"module 'sepdeploy' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_PLACES[name]), name)
