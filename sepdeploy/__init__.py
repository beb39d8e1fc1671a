"""sepdeploy: rewrite a trained CNN's convolutions into separable ones, keep the accuracy, prove the speed.

report = sepdeploy.convert(sepdeploy.ConvertOptions(model=..., arch=..., calibration=...))
report = sepdeploy.finetune("model.sepdeploy", "train_images/")
network = sepdeploy.load("model.sepdeploy")
report = sepdeploy.adopt("model.sepdeploy", network)

variant, result = sepdeploy.design(sepdeploy.DesignOptions(arch="models.resnet_cifar:resnet20"))
conv = sepdeploy.SeparableConv2d(64, 128, kernel_size=3, padding=1)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from sepdeploy.version import __version__

if TYPE_CHECKING:
    from sepdeploy.core.design import DesignOptions
    from sepdeploy.core.int8 import Int8Options
    from sepdeploy.core.options import ConvertOptions, MovedInputs, SelectionOptions
    from sepdeploy.core.training import ReconstructOptions, TrainOptions
    from sepdeploy.pipeline import adopt, convert, design, finetune, plan
    from sepdeploy.schemes.separable_conv2d import SeparableConv2d
    from sepdeploy.stages.bundle import load
    from sepdeploy.train.hooks import FinetuneContext

__all__ = [
    "ConvertOptions",
    "DesignOptions",
    "FinetuneContext",
    "Int8Options",
    "MovedInputs",
    "ReconstructOptions",
    "SelectionOptions",
    "SeparableConv2d",
    "TrainOptions",
    "__version__",
    "adopt",
    "convert",
    "design",
    "finetune",
    "load",
    "plan",
]

_PLACES = {
    "ConvertOptions": "sepdeploy.core.options",
    "DesignOptions": "sepdeploy.core.design",
    "FinetuneContext": "sepdeploy.train.hooks",
    "Int8Options": "sepdeploy.core.int8",
    "MovedInputs": "sepdeploy.core.options",
    "ReconstructOptions": "sepdeploy.core.training",
    "SelectionOptions": "sepdeploy.core.options",
    "SeparableConv2d": "sepdeploy.schemes.separable_conv2d",
    "TrainOptions": "sepdeploy.core.training",
    "adopt": "sepdeploy.pipeline",
    "convert": "sepdeploy.pipeline",
    "design": "sepdeploy.pipeline",
    "finetune": "sepdeploy.pipeline",
    "load": "sepdeploy.stages.bundle",
    "plan": "sepdeploy.pipeline",
}

# onnxruntime's wheels send usage data to Microsoft unless told not to before they are first imported, by us or by a
# package that we use. Users who want that set the variable to 0; who imported onnxruntime before has decided already.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    """Import the public names when they are used: torch takes seconds."""
    if name not in _PLACES:
        raise AttributeError(f"module 'sepdeploy' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_PLACES[name]), name)
