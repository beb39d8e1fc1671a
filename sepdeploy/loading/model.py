"""A trained network: an architecture with the weights of a checkpoint in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sepdeploy.errors import UnsupportedModelError, UsageError
from sepdeploy.loading.arch import Architecture, build_architecture
from sepdeploy.loading.checkpoint import LoadedWeights, load_state_dict
from sepdeploy.loading.mismatch import describe_mismatch, find_mismatch

__all__ = ["LoadedModel", "load_model"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A network that is ready to run.

    Attributes:
        module: In evaluation mode, float32, on the CPU.
        weights: What was read from the file.
        architecture: Where the network came from.
        notes: Sentences for the user about what was assumed or converted.
    """

    module: nn.Module
    weights: LoadedWeights
    architecture: Architecture
    notes: tuple[str, ...]


def load_model(model_path: Path, arch: str) -> LoadedModel:
    """Build the architecture `arch` and load the checkpoint at `model_path` into it.

    Every weight must find its place, except counters of batch norms (`num_batches_tracked`), which inference ignores.
    A prefix that all names of one side share and the other side lacks is no difference, nor is what a training
    framework keeps beside the network.

    Args:
        model_path: See `load_state_dict`.
        arch: See `build_architecture`.

    Raises:
        UsageError: if file or architecture cannot be read, or they do not belong together.
        UntrustedFileError: if loading the file would run code.
        UnsupportedModelError: if the network is lazy or on the meta device, or the weights are not dense real floats.
        ToolError: if the architecture needs timm and that cannot be imported.
    """
    weights = load_state_dict(model_path)
    architecture = build_architecture(arch)
    module = architecture.module
    _check_module(module, arch)
    _check_tensors(weights.tensors, model_path)
    module = module.float().cpu()
    expected = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    tensors, prefix_note = _align_prefix(weights.tensors, expected)
    mismatch = find_mismatch(tensors, expected)
    if mismatch is not None:
        raise UsageError(describe_mismatch(mismatch, model_path, arch))
    _check_dtypes(tensors, expected, model_path)
    try:
        module.load_state_dict(tensors, strict=False)
    except Exception as error:  # the user's network may have loading hooks of its own
        raise UsageError(f"{model_path} cannot be loaded into {arch}: {type(error).__name__}: {error}") from error
    notes = (*weights.notes, *prefix_note, *_note_dtypes(tensors), *_note_not_finite(tensors))
    return LoadedModel(module=module.eval(), weights=weights, architecture=architecture, notes=notes)


def _check_module(module: nn.Module, arch: str) -> None:
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(value):
            raise UnsupportedModelError(
                f"{arch} has the lazy parameter {name}, whose shape is not known yet: use the module that is not lazy"
            )
        if value.is_meta:
            raise UnsupportedModelError(
                f"{name} of {arch} is on the meta device and has no memory: build it on the CPU"
            )


def _check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    for name, value in tensors.items():
        if value.is_quantized:
            raise UnsupportedModelError(
                f"{name} in {path} is quantized: give the checkpoint from before the quantization"
            )
        if value.is_complex() or value.is_meta or value.layout != torch.strided:
            kind = "complex" if value.is_complex() else "on the meta device" if value.is_meta else "sparse"
            raise UnsupportedModelError(f"{name} in {path} is {kind}; weights must be dense real tensors with values")


def _check_dtypes(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    # load_state_dict would turn integer codes into floats of the same digits, without a word.
    for name, value in tensors.items():
        if expected[name].is_floating_point() and not value.is_floating_point():
            raise UnsupportedModelError(
                f"{name} in {path} has {str(value.dtype).removeprefix('torch.')} values where the network has "
                "floating-point ones: give the checkpoint from before the quantization"
            )


def _align_prefix(
    tensors: dict[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Drop or add a shared prefix if that, and only that, makes all names equal."""
    if _has_names(tensors, expected):
        return tensors, ()
    for prefix in _shared_prefixes(tensors):
        renamed = {name.removeprefix(prefix): value for name, value in tensors.items()}
        if _has_names(renamed, expected):
            return renamed, (f"the prefix '{prefix}' was taken off all names of the checkpoint",)
    for prefix in _shared_prefixes(expected):
        renamed = {prefix + name: value for name, value in tensors.items()}
        if _has_names(renamed, expected):
            return renamed, (f"the prefix '{prefix}' was put before all names of the checkpoint",)
    return _take_part(tensors, expected) or (tensors, ())


def _take_part(
    tensors: dict[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]] | None:
    """Only what is below a prefix, if the whole network is there and nowhere else, averages of its weights apart.

    Modules of training frameworks hold the network beside losses, metrics and averages. A teacher or another copy,
    with more layers or without a prefix too, is no such thing: which of them is meant is not for us to say.
    """
    needed = {name for name in expected if not name.endswith("num_batches_tracked")}
    first = min(needed, default="")
    prefixes = {name.removesuffix(first) for name in tensors if first and f".{name}".endswith(f".{first}")}
    parts = {}
    for prefix in prefixes:
        below = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if needed <= below.keys() and "ema" not in re.split(r"[._]", prefix.lower()):
            parts[prefix] = below
    if len(parts) != 1:
        return None
    ((prefix, below),) = parts.items()
    if not _has_names(below, expected):
        return None
    depth = prefix.count(".")
    others = sorted({".".join(name.split(".")[:depth]) for name in tensors if not name.startswith(prefix)})
    note = f"the network was found below '{prefix}'; what is beside it was left out: {', '.join(others)}"
    return below, (note,)


def _has_names(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return tensors.keys() <= expected.keys() and all(
        name.endswith("num_batches_tracked") for name in expected.keys() - tensors.keys()
    )


def _shared_prefixes(names: Mapping[str, Tensor]) -> Iterator[str]:
    """Every run of leading name parts that all names have, the shortest first."""
    split = [name.split(".")[:-1] for name in names]
    prefix = ""
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            return
        prefix += f"{parts[0]}."
        yield prefix


def _note_dtypes(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    dtypes = {value.dtype for value in tensors.values() if value.is_floating_point()} - {torch.float32}
    if not dtypes:
        return ()
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return (f"the checkpoint's {names} weights were converted to float32",)


def _note_not_finite(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    names = [name for name, value in tensors.items() if value.is_floating_point() and not _is_finite(value)]
    if not names:
        return ()
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (f"the checkpoint has NaN or infinite values in {', '.join(names[:5])}{more}",)


def _is_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value.float()).all())
