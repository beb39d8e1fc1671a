"""Manifests: TOML files that say where images come from and which of them calibrate and which validate."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sepdeploy.data.preprocess import Preprocess, preprocess_from_table
from sepdeploy.data.sources import ImageSource, check_arrays, open_source
from sepdeploy.data.toml_files import find_file, read_toml
from sepdeploy.errors import UsageError

__all__ = ["Manifest", "read_manifest", "read_manifest_preprocess"]

SplitRole = Literal["calibration", "validation"]


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest with its source opened.

    Attributes:
        source: All images, of every split.
        split: Which of them belong to the role that was asked for.
        preprocess: Of its `[preprocess]` table; None without one.
    """

    source: ImageSource
    split: slice
    preprocess: Preprocess | None


def read_manifest(path: Path, role: SplitRole) -> Manifest:
    """Read the manifest at `path` and open its source.

    Raises:
        UsageError: if the manifest or its source cannot be read, or it has splits but none for `role`.
    """
    content = read_toml(path)
    unknown = sorted(set(content) - {"source", "splits", "preprocess"})
    if unknown:
        raise UsageError(f"{path}: unknown table {', '.join(unknown)}; allowed are source, splits, preprocess")
    source = content.get("source")
    if not isinstance(source, Mapping) or set(source) not in ({"path"}, {"loader"}):
        raise UsageError(f'{path} needs a [source] table with either path = "..." or loader = "module:function"')
    (kind, value), *_ = source.items()
    if not isinstance(value, str) or not value:
        raise UsageError(f"{path}: source.{kind} must be a string, got {value!r}")
    opened = _call_loader(value) if kind == "loader" else open_source(find_file(path).parent / value)
    table = content.get("preprocess")
    return Manifest(
        source=opened,
        split=_read_split(content.get("splits", {}), role, path),
        preprocess=None if table is None else preprocess_from_table(table, path),
    )


def read_manifest_preprocess(path: Path) -> Preprocess | None:
    """The `[preprocess]` table of the manifest at `path`; None without one, or where `path` is not a `.toml`.

    Raises:
        UsageError: if the manifest cannot be read or the table has an unknown key or a bad value.
    """
    if path.suffix.lower() != ".toml":
        return None
    table = read_toml(path).get("preprocess")
    return None if table is None else preprocess_from_table(table, path)


def _read_split(splits: Any, role: SplitRole, path: Path) -> slice:
    if not isinstance(splits, Mapping) or set(splits) - {"calibration", "validation"}:
        raise UsageError(f"{path}: splits must be the tables splits.calibration and splits.validation")
    if not splits:
        return slice(None)
    if role not in splits:
        raise UsageError(f"{path} has no [splits.{role}], only {', '.join(splits)}; add it, or give another {role} set")
    split = splits[role]
    if not isinstance(split, Mapping) or set(split) - {"start", "stop", "step"}:
        raise UsageError(f"{path}: splits.{role} takes start, stop and step, got {split!r}")
    for name, value in split.items():
        least = 1 if name == "step" else 0
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UsageError(f"{path}: splits.{role}.{name} must be a whole number of at least {least}, got {value!r}")
    return slice(split.get("start"), split.get("stop"), split.get("step"))


def _call_loader(name: str) -> ImageSource:
    """Call a `module:function` that returns (images, labels); see `check_arrays` for what they must be."""
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise UsageError(f"loader {name!r} must look like 'module:function'")
    with _working_directory_importable():
        try:
            function = _import_loader(module_name, function_name)
            result = function()
        except ImportError as error:
            package = (error.name or "").partition(".")[0]
            remedy = "pip install 'sepdeploy[digits]'" if package == "sklearn" else f"install {package or 'it'}"
            raise UsageError(f"loader {name} cannot run because {error}; {remedy}") from error
        except UsageError:
            raise
        except Exception as error:  # the user's code: it may raise anything
            raise UsageError(f"loader {name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(result, tuple) or len(result) != 2:
        raise UsageError(f"loader {name} must return (images, labels), got {type(result).__name__}")
    return check_arrays(result[0], result[1], f"loader {name}")


def _import_loader(module_name: str, function_name: str) -> Callable[[], Any]:
    module = None
    if module_name.startswith("models."):
        try:
            module = importlib.import_module(f"sepdeploy.{module_name}")
        except ModuleNotFoundError as error:
            if not f"sepdeploy.{module_name}".startswith(error.name or "?"):
                raise
    if module is None:
        module = importlib.import_module(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(f"{module_name} has no function {function_name}")
    return function  # type: ignore[no-any-return]  # callable, and its result is checked


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
