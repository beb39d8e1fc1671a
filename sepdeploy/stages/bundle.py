"""Read a bundle back: the converted network as an nn.Module."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from sepdeploy.analyze.trace import layer_spec
from sepdeploy.core.codec import read_json
from sepdeploy.core.files import sha256_of_file, write_bytes
from sepdeploy.core.manifest import ArchitectureSource, Manifest
from sepdeploy.core.plan import Plan
from sepdeploy.errors import UsageError
from sepdeploy.loading.arch import build_architecture
from sepdeploy.passes.replace_convs import copy_network, replace_modules
from sepdeploy.schemes.module import chain_class

__all__ = ["load", "read_weights", "rebuild", "save_weights"]


def load(bundle: str | Path, arch: str | None = None) -> nn.Module:
    """The converted network of a bundle, in eval mode and with its batch norms.

    The architecture's code is run as the bundle's manifest names it, and a manifest can name any Python function: load
    only bundles that you trust, or name the architecture yourself. The weights are loaded without running anything.

    Args:
        bundle: The output folder of `sepdeploy convert`.
        arch: Architecture to use instead of the recorded one, as for --arch.

    Raises:
        UsageError: if the folder is no finished bundle, a file changed, or the architecture does not fit.
    """
    folder = Path(bundle)
    manifest_path = folder / "manifest.json"
    if not manifest_path.is_file():
        raise UsageError(
            f"{folder} is no finished bundle: it has no manifest.json; run the same 'sepdeploy convert' again to finish"
        )
    manifest = read_json(Manifest, manifest_path)
    for name in ("plan.json", "model.pt"):
        path = folder / name
        if not path.is_file() or name not in manifest.files or sha256_of_file(path) != manifest.files[name].sha256:
            raise UsageError(f"{path} is missing or not the file that {manifest_path} lists; convert again")
    plan = read_json(Plan, folder / "plan.json")
    network = build_architecture(arch or _recorded_spec(manifest.arch)).module
    return rebuild(network, plan, read_weights(folder / "model.pt"))


def rebuild(network: nn.Module, plan: Plan, weights: dict[str, Tensor]) -> nn.Module:
    """Put the plan's forms and the converted weights into a network of the original architecture.

    Args:
        network: The architecture, with any weights; it is not changed.
        plan: What is replaced.
        weights: State dict of the converted network.

    Raises:
        UsageError: if they do not belong together.
    """
    network = copy_network(network).float().cpu()
    modules = dict(network.named_modules(remove_duplicate=False))
    for name, candidate in plan.replaced.items():
        conv = modules.get(name)
        if not isinstance(conv, nn.Conv2d | nn.Linear):
            raise UsageError(f"the architecture has no layer '{name}', which the plan replaces; check arch")
        module = chain_class(conv)(candidate.form, layer_spec(conv), bias=False)
        own = {f"{name}.{key}" for key in module.state_dict()}
        if any(key.startswith(f"{name}.") and key not in own for key in weights):  # transfer has added a bias
            module = chain_class(conv)(candidate.form, layer_spec(conv), bias=True)
        replace_modules(network, {name: module})
    try:
        missing, unexpected = network.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise UsageError(f"the bundle's weights do not fit the architecture: {lines[-1].strip()}") from error
    # Extra state is no tensor: the architecture builds it, and model.pt leaves it out.
    wrong = [key for key in (*missing, *unexpected) if not key.endswith("_extra_state")]
    if wrong:
        raise UsageError(f"the bundle's weights do not fit the architecture: {len(wrong)} names differ, as {wrong[0]}")
    return network.eval()


def save_weights(path: Path, network: nn.Module) -> None:
    """Write the state dict of `network`; equal weights give equal bytes.

    Raises:
        UsageError: if the file cannot be written.
    """
    buffer = io.BytesIO()  # a path would put the file's own name into the archive
    state = network.state_dict().items()
    torch.save({name: value.contiguous() for name, value in state if isinstance(value, Tensor)}, buffer)
    write_bytes(path, buffer.getvalue())


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read what `save_weights` wrote, name by name as it is: no prefix is guessed away.

    Raises:
        UsageError: if the file is not one of those.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UsageError(f"{path} is not the file of weights that sepdeploy wrote; convert again") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UsageError(f"{path} is not the file of weights that sepdeploy wrote; convert again")
    return weights


def _recorded_spec(arch: ArchitectureSource) -> str:
    """The recorded architecture, its file found wherever the working directory is now."""
    if arch.path is None:
        return arch.spec
    path = Path(arch.path)
    if not path.is_file():
        raise UsageError(f"the architecture's file {path} is gone; name it with arch='path/to/file.py:factory'")
    if sha256_of_file(path) != arch.sha256:
        raise UsageError(
            f"{path} has changed since the bundle was made; if it still fits, name it with arch='{arch.spec}'"
        )
    _, colon, factory = arch.spec.partition(".py:")
    return f"{path}:{factory}" if colon else arch.spec
