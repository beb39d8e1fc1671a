"""What each layer of a file executes on an emulated Arm core."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from sepdeploy.bench.arm_cores import ArmCore
from sepdeploy.bench.arm_counts import count_files, require_counts
from sepdeploy.bench.prefixes import write_prefixes
from sepdeploy.core.measurement import Counts, LayerCounts
from sepdeploy.core.progress import Progress

__all__ = ["count_layers"]


def count_layers(core: ArmCore, path: Path, progress: Progress, *, seed: int = 0) -> tuple[Counts, list[LayerCounts]]:
    """Count a file layer by layer.

    All prefixes of the file run in one emulated process; a layer is the difference of two of them. So layers sum to the
    whole, and what a runtime converts between layouts is where it happens. A layer can come out a little below 0 where
    the runtime runs the longer prefix in another way.

    Args:
        core: Where.
        path: ONNX or TFLite file.
        progress: Told what is going on.
        seed: Of the random inputs.

    Returns:
        The whole file, and its layers in order.

    Raises:
        ToolError: if the file cannot be taken apart or counted.
    """
    with tempfile.TemporaryDirectory(prefix="sepdeploy-arm-") as folder:
        progress.stage(f"taking {path.name} apart")
        prefixes = write_prefixes(path, Path(folder))
        paths = [prefix.path for prefix in prefixes]
        progress.stage(f"counting {len(paths)} prefixes of {path.name} on the {core.title}")
        counts = require_counts(paths, count_files(core, paths, progress, seed=seed, repeats=2, warmup=1))
    return counts[-1], _differences([prefix.name for prefix in prefixes], counts)


def _differences(names: Sequence[str], counts: Sequence[Counts]) -> list[LayerCounts]:
    layers = []
    before: Counts | None = None
    for name, each in zip(names, counts, strict=True):
        layers.append(
            LayerCounts(
                name=name,
                instructions=each.instructions - (before.instructions if before else 0),
                macs=each.macs - (before.macs if before else 0),
                l1_misses=each.l1_misses - (before.l1_misses if before else 0),
                kcycles_low=each.kcycles_low - (before.kcycles_low if before else 0.0),
                kcycles_high=each.kcycles_high - (before.kcycles_high if before else 0.0),
            )
        )
        before = each
    return layers
