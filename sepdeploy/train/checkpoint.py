"""Checkpoints of a training run, and what they are valid for."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sepdeploy.core.codec import to_data
from sepdeploy.core.files import replacing, sha256_of_bytes
from sepdeploy.core.training import ReconstructOptions, TrainOptions
from sepdeploy.data.images import ImageSet
from sepdeploy.version import __version__

__all__ = ["read_checkpoint", "run_key", "tensor_state", "write_checkpoint"]

_FORMAT = 1


def run_key(
    student: nn.Module,
    teacher: nn.Module,
    images: ImageSet,
    held_out: ImageSet,
    options: TrainOptions | ReconstructOptions,
    features: tuple[str, ...],
    *,
    by_damage: bool = False,
) -> str:
    """Hash of everything that the result of a run depends on, but not of the number of processes."""
    parts = {
        "format": _FORMAT,
        "versions": (__version__, torch.__version__),
        "structure": (_structure(student), _structure(teacher)),
        "student": _weights_sha256(student),
        "teacher": _weights_sha256(teacher),
        "images": images.sha256,
        "held_out": held_out.sha256,
        "options": to_data(options),
        "features": features,
        "by_damage": by_damage,
    }
    return sha256_of_bytes(json.dumps(parts, sort_keys=True).encode())


def tensor_state(network: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers by name, copied to the CPU."""
    state = network.state_dict().items()
    return {name: value.detach().cpu().clone() for name, value in state if isinstance(value, Tensor)}


def write_checkpoint(path: Path, key: str, state: Mapping[str, Any]) -> None:
    """Write `state`, of tensors and plain data, as a whole or not at all.

    Raises:
        UsageError: if the file cannot be written.
    """
    with replacing(path) as temporary:
        torch.save({"key": key, "state": dict(state)}, temporary)


def read_checkpoint(path: Path, key: str) -> dict[str, Any] | None:
    """What `write_checkpoint` wrote under `key`; None if there is no such file or it is another run's."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError):
        return None
    if not isinstance(content, dict) or content.get("key") != key or not isinstance(content.get("state"), dict):
        return None
    state: dict[str, Any] = content["state"]
    return state


def _structure(network: nn.Module) -> str:
    """What its modules are and how they are set, without addresses in memory, which are others in each run."""
    return re.sub(r"0x[0-9a-fA-F]+", "", str(network))


def _weights_sha256(network: nn.Module) -> str:
    """Hash of names, types, shapes and values of all weights and buffers, and of which weights are frozen."""
    digest = sha256(repr([name for name, weight in network.named_parameters() if weight.requires_grad]).encode())
    for name, value in tensor_state(network).items():
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        digest.update(value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
