"""Finding and reading the TOML files of the calibration folder."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from sepdeploy.errors import UsageError

__all__ = ["find_file", "read_toml"]


def find_file(path: Path) -> Path:
    """Return `path`, or the packaged file of that name where `calibration/NAME` does not exist here.

    An installed sepdeploy has its manifests inside the package, so that `calibration/NAME.toml` of the documentation
    works from any working directory.
    """
    if path.exists() or path.is_absolute() or len(path.parts) != 2 or path.parts[0] != "calibration":
        return path
    packaged = resources.files("sepdeploy.calibration").joinpath(path.name)
    return Path(str(packaged)) if packaged.is_file() else path


def read_toml(path: Path) -> dict[str, Any]:
    """Parse the TOML file at `path` (or its packaged namesake, see `find_file`).

    Raises:
        UsageError: if it cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(find_file(path).read_bytes().decode())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
