"""Write a designed network as a bundle that `sepdeploy.load` gives back, to be trained."""

from __future__ import annotations

from pathlib import Path

from sepdeploy.core.codec import read_json, write_json
from sepdeploy.core.design import DesignOptions
from sepdeploy.core.files import output_error, sha256_of_file
from sepdeploy.core.manifest import FileEntry, Manifest
from sepdeploy.core.stage_store import locked, require_usable
from sepdeploy.errors import UsageError
from sepdeploy.planning.design_network import DesignedNetwork
from sepdeploy.stages.bundle import save_weights
from sepdeploy.stages.load import architecture_source
from sepdeploy.stages.versions import versions
from sepdeploy.version import __version__

__all__ = ["check_design_folder", "write_design"]

_FILES = ("plan.json", "model.pt", "design.json")
_MANIFEST = "manifest.json"


def check_design_folder(folder: Path) -> None:
    """Check that a design may go to `folder`: it is new, empty, or holds an earlier one with its fresh weights.

    Raises:
        UsageError: if it is anything else, a converted network or trained weights included.
    """
    require_usable(folder)
    try:
        others = {entry.name for entry in folder.iterdir()} - {*_FILES, _MANIFEST, "work"} if folder.exists() else set()
    except OSError as error:
        raise output_error(folder, error) from error
    if others:
        raise UsageError(f"{folder} holds a converted network ({min(others)}); choose another --output")
    weights, manifest = folder / "model.pt", folder / _MANIFEST
    if weights.exists() and manifest.exists():
        written = read_json(Manifest, manifest).files.get("model.pt")
        if written is None or written.sha256 != sha256_of_file(weights):
            raise UsageError(
                f"{weights} has changed since the design was made, perhaps by training; choose another --output"
            )


def write_design(folder: Path, designed: DesignedNetwork, options: DesignOptions) -> None:
    """Write plan, fresh weights and costs and, last, the manifest.

    The manifest names no checkpoint: the weights come from the seed.

    Raises:
        UsageError: if the folder cannot be written.
    """
    with locked(folder):
        (folder / _MANIFEST).unlink(missing_ok=True)
        write_json(folder / "plan.json", designed.plan)
        save_weights(folder / "model.pt", designed.module)
        write_json(folder / "design.json", designed.result)
        manifest = Manifest(
            version=__version__,
            command=options.command or repr(options),
            seed=options.seed,
            model="",
            model_sha256="",
            arch=architecture_source(designed.architecture),
            input_shape=(1, *options.input_shape),
            versions=versions(),
            files={n: FileEntry((folder / n).stat().st_size, sha256_of_file(folder / n)) for n in _FILES},
        )
        write_json(folder / _MANIFEST, manifest)
