"""Why a checkpoint does not fit an architecture, said so that the user can put it right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

__all__ = ["Mismatch", "describe_mismatch", "find_mismatch"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How the names and shapes of a checkpoint differ from those of a network.

    Attributes:
        missing: Names that the network has and the checkpoint lacks.
        unexpected: Names that the checkpoint has and the network lacks.
        wrong_shape: (name, shape in the checkpoint, shape in the network).
        matching: Count of names that agree in shape too.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shape: tuple[tuple[str, Shape, Shape], ...]
    matching: int


def find_mismatch(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Mismatch | None:
    """Compare a checkpoint with a network's state_dict; None if they agree.

    A missing `num_batches_tracked` is no difference: checkpoints from before PyTorch 0.4.1 have none.
    """
    shared = [name for name in expected if name in tensors]
    wrong_shape = tuple(
        (name, tuple(tensors[name].shape), tuple(expected[name].shape))
        for name in shared
        if tensors[name].shape != expected[name].shape
    )
    missing = tuple(n for n in expected if n not in tensors and not n.endswith("num_batches_tracked"))
    unexpected = tuple(name for name in tensors if name not in expected)
    if not (missing or unexpected or wrong_shape):
        return None
    return Mismatch(missing, unexpected, wrong_shape, len(shared) - len(wrong_shape))


def describe_mismatch(mismatch: Mismatch, path: Path, arch: str) -> str:
    """One sentence with the counts, the first few names and the likely cause."""
    parts = []
    if mismatch.missing:
        parts.append(f"{len(mismatch.missing)} missing ({_first(mismatch.missing)})")
    if mismatch.unexpected:
        parts.append(f"{len(mismatch.unexpected)} unexpected ({_first(mismatch.unexpected)})")
    if mismatch.wrong_shape:
        shapes = [f"{name} is {_shape(have)}, not {_shape(want)}" for name, have, want in mismatch.wrong_shape]
        parts.append(f"{len(shapes)} of another shape ({_first(shapes)})")
    return (
        f"{path} does not fit {arch}: {mismatch.matching} tensors match, {', '.join(parts)}; {_guess(mismatch, arch)}"
    )


def _guess(mismatch: Mismatch, arch: str) -> str:
    factory = arch.strip().partition("(")[0]
    is_same_names = not mismatch.missing and not mismatch.unexpected
    if is_same_names and (classes := _class_count(mismatch)) is not None:
        return f"the checkpoint was trained with {classes} classes: try --arch '{factory}(num_classes={classes})'"
    if is_same_names and len(mismatch.wrong_shape) == 1 and _differs_in_channels(mismatch.wrong_shape[0]):
        channels = mismatch.wrong_shape[0][1][1]
        return f"the checkpoint takes {channels} input channels: build the architecture with as many"
    differing = len(mismatch.missing) + len(mismatch.unexpected) + len(mismatch.wrong_shape)
    if mismatch.matching * 4 < differing:
        return "most of it differs, so this is probably the checkpoint of another architecture"
    if is_same_names:
        return "the names agree, so this is probably a wider or narrower variant of the architecture"
    if not mismatch.unexpected:
        return "the checkpoint is probably of a shallower variant of the architecture, or only a part of one"
    if not mismatch.missing:
        return "the checkpoint is probably of a deeper variant of the architecture, or has parts used in training only"
    return "some names differ, so this is probably another version of the architecture"


def _class_count(mismatch: Mismatch) -> int | None:
    """The classes of the checkpoint, if only one layer differs, and only in its outputs."""
    layers = {name.rpartition(".")[0] for name, _, _ in mismatch.wrong_shape}
    outputs = {have[:1] for _, have, _ in mismatch.wrong_shape}
    is_outputs_only = all(have and want and have[1:] == want[1:] for _, have, want in mismatch.wrong_shape)
    return outputs.pop()[0] if len(layers) == 1 and len(outputs) == 1 and is_outputs_only else None


def _differs_in_channels(wrong: tuple[str, Shape, Shape]) -> bool:
    _, have, want = wrong
    return len(have) == len(want) == 4 and (have[0], *have[2:]) == (want[0], *want[2:])


def _first(items: Sequence[str], count: int = 3) -> str:
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")


def _shape(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a scalar"
