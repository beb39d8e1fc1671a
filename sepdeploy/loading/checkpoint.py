"""Weights out of a checkpoint file, without running anything that the file carries."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sepdeploy.core.files import sha256_of_file
from sepdeploy.errors import UntrustedFileError, UsageError
from sepdeploy.loading.file_kind import RESAVE, FileKind, identify_file

__all__ = ["LoadedWeights", "load_state_dict"]

# Where training scripts put the weights. An average (EMA) is taken only where there is nothing else.
_PLAIN_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module")
_AVERAGED_KEYS = ("state_dict_ema", "ema_state_dict", "model_ema", "ema", "params_ema")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DataParallel and torch.compile


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """The weights of one checkpoint.

    Attributes:
        tensors: Name -> tensor on the CPU, as stored.
        sha256: Hash of the file.
        nested_under: Keys of the checkpoint that lead to the weights, joined by dots; None if they are at the top.
        stripped_prefix: What DataParallel or torch.compile had put before every name; often empty.
        notes: Sentences for the user about choices that were made.
    """

    tensors: dict[str, Tensor]
    sha256: str
    nested_under: str | None
    stripped_prefix: str
    notes: tuple[str, ...] = ()


def load_state_dict(path: Path) -> LoadedWeights:
    """Read the weights from a `.safetensors` file, a state_dict or a training checkpoint of PyTorch.

    The content decides what the file is, not its name. Pickles are read with `weights_only=True`, whatever the
    environment says.

    Raises:
        UsageError: if the file is missing, damaged, of another kind, or holds no weights.
        UntrustedFileError: if it can only be loaded by running code that it carries.
    """
    kind = identify_file(path)
    content = _read_safetensors(path) if kind is FileKind.SAFETENSORS else _read_torch(path)
    found = _find_weights(content)
    if found is None:
        raise UsageError(f"{path} holds no weights: {_describe(content)}")
    keys, weights = found
    tensors = {str(name): value.detach() for name, value in weights.items() if isinstance(value, Tensor)}
    notes = []
    others = [str(name) for name, value in weights.items() if not isinstance(value, Tensor)]
    if others:
        notes.append(f"entries of the checkpoint that are not tensors were left out: {_shorten(others)}")
    unused = [key for key in _AVERAGED_KEYS if keys and key not in keys and key in content]
    if unused:
        notes.append(f"the weights under '{'.'.join(keys)}' were taken; the averaged ones under '{unused[0]}' were not")
    elif set(keys) & set(_AVERAGED_KEYS):
        notes.append(f"the averaged weights under '{'.'.join(keys)}' were taken: the checkpoint has no others")
    tensors, prefix = _strip_wrappers(tensors)
    return LoadedWeights(
        tensors=tensors,
        sha256=sha256_of_file(path),
        nested_under=".".join(keys) or None,
        stripped_prefix=prefix,
        notes=tuple(notes),
    )


class _Inert:
    """Stands in for classes that checkpoints often mention and that no weight depends on.

    Allowing the real ones would let a file call numpy's own unpickling, which trusts its input.
    """

    def __new__(cls, *_args: Any, **_kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, _state: Any) -> None:
        pass


_HARMLESS_NAMES = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    *(f"pathlib.{part}{name}Path" for part in ("", "_local.") for name in ("Posix", "Windows")),
    "numpy.ndarray",
    "numpy.dtype",
    *(
        f"numpy.{core}.multiarray.{function}"
        for core in ("core", "_core")  # before and since numpy 2
        for function in ("scalar", "_reconstruct")
    ),
    *(
        f"numpy.dtypes.{name}DType"
        for name in ("Bool", "Float16", "Float32", "Float64", "Int8", "Int16", "Int32", "Int64", "Str", "Bytes")
    ),
    *(f"numpy.dtypes.UInt{bits}DType" for bits in (8, 16, 32, 64)),
)


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in _HARMLESS_NAMES]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.<>]+)", str(error))
        what = f"an object of {named[1]}" if named else "a pickle with more than plain weights"
        raise UntrustedFileError(
            f"{path} holds {what}, and loading it would run code; where the file came from, run {RESAVE} "
            "and give that file"
        ) from error
    except Exception as error:  # a damaged file can make the parser raise anything
        raise UsageError(
            f"{path} is damaged and cannot be read as a PyTorch file ({type(error).__name__}); copy it again"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{path} is damaged and cannot be read as a safetensors file ({error}); copy it again"
        ) from error


def _find_weights(content: Any, depth: int = 2) -> tuple[tuple[str, ...], Mapping[Any, Any]] | None:
    """The keys that lead to the mapping with the weights, and that mapping."""
    if not isinstance(content, Mapping):
        return None
    for key in (*_PLAIN_KEYS, *_AVERAGED_KEYS) if depth else ():
        inner = _find_weights(content.get(key), depth - 1)
        if inner is not None:
            return (key, *inner[0]), inner[1]
    return ((), content) if any(isinstance(value, Tensor) for value in content.values()) else None


def _strip_wrappers(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    stripped = ""
    while True:
        # AveragedModel counts its updates beside the wrapped network.
        names = [name for name in tensors if name != "n_averaged"]
        prefix = next((p for p in _WRAPPER_PREFIXES if names and all(name.startswith(p) for name in names)), None)
        if prefix is None:
            return tensors, stripped
        tensors = {name.removeprefix(prefix): tensors[name] for name in names}
        stripped += prefix


def _describe(content: Any) -> str:
    if isinstance(content, Tensor):
        return "it is a single tensor; save model.state_dict() instead"
    if not isinstance(content, Mapping):
        return f"it is a {type(content).__name__}; save model.state_dict() instead"
    if not content:
        return "it is an empty dictionary; save model.state_dict() instead"
    return (
        f"its keys are {_shorten([str(key) for key in content])}, and none of them is a tensor or a usual place for "
        "weights; save the state_dict alone and give that file"
    )


def _shorten(names: list[str], count: int = 8) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
