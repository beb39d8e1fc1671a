"""Trace, plan, transfer and guard: from the trained network to the converted one."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.codec import read_json, to_data, to_json, write_json
from sepdeploy.core.conv import Trace
from sepdeploy.core.files import sha256_of_bytes
from sepdeploy.core.measurement import Quality
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.plan import Plan
from sepdeploy.core.progress import Progress
from sepdeploy.core.report import GuardStep, LayerTransfer, SelectionSummary
from sepdeploy.core.stage_store import StageStore
from sepdeploy.errors import UsageError
from sepdeploy.planning.candidates import drop_failing, propose_plan
from sepdeploy.planning.evaluate import Evaluator, tensor_batches
from sepdeploy.planning.guard import guard_plan
from sepdeploy.stages.bundle import read_weights, rebuild, save_weights
from sepdeploy.stages.load import Inputs

if TYPE_CHECKING:
    from sepdeploy.transfer.layer import TransferMethod

__all__ = ["TRANSFERRED", "GuardRecord", "MemoryFile", "guard_files", "propose", "run_guard", "trace", "trace_key"]

TRANSFERRED = "transferred"
"""The network that the guard leaves in work/, before anything is recovered."""


@dataclass(frozen=True, slots=True)
class GuardRecord:
    """What the guard leaves on disk besides plan.json and work/transferred.pt.

    Attributes:
        transfers: Quality of each replaced layer.
        steps: Every set that was measured.
        quality: Of the converted PyTorch network, before recovery.
        limit_points: What it was allowed to lose; None if there was no limit.
        selection: How the plan was predicted and measured, where it was chosen layer by layer.
    """

    transfers: tuple[LayerTransfer, ...]
    steps: tuple[GuardStep, ...]
    quality: Quality
    limit_points: float | None
    selection: SelectionSummary | None = None


@dataclass(frozen=True, slots=True)
class _Measured:
    """The guard's memory as a file."""

    inputs: dict[str, object]
    damages: dict[str, float]
    steps: dict[str, GuardStep]


class MemoryFile(MutableMapping[str, "float | GuardStep"]):
    """What the guard measured, written to disk with each entry, so that a killed run goes on where it was."""

    def __init__(self, path: Path, inputs: dict[str, object]) -> None:
        self._path = path
        self._inputs = to_data(inputs)  # as it comes back: lists for tuples
        self._values: dict[str, float | GuardStep] = {}
        try:
            known = read_json(_Measured, path)
        except UsageError:
            return  # not there, or cut off: measured again
        if known.inputs == self._inputs:
            self._values = {**known.damages, **known.steps}

    def __setitem__(self, key: str, value: float | GuardStep) -> None:
        self._values[key] = value
        damages = {k: v for k, v in self._values.items() if isinstance(v, float)}
        steps = {k: v for k, v in self._values.items() if isinstance(v, GuardStep)}
        write_json(self._path, _Measured(self._inputs, damages, steps))

    def __getitem__(self, key: str) -> float | GuardStep:
        return self._values[key]

    def __delitem__(self, key: str) -> None:
        del self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def trace(store: StageStore, options: ConvertOptions, inputs: Inputs) -> Trace:
    """Find every convolution, and linear layers if asked; work/trace.json."""
    path = store.work / "trace.json"

    def make() -> None:
        traced = trace_network(inputs.network, inputs.example(), includes_linear=options.includes_linear)
        write_json(path, traced)

    store.run("trace", trace_key(options, inputs), (path,), make)
    return read_json(Trace, path)


def trace_key(options: ConvertOptions, inputs: Inputs) -> dict[str, object]:
    """What the trace depends on: the network and everything that runs it."""
    return {**inputs.network_key(), "includes_linear": options.includes_linear}


def propose(
    store: StageStore, options: ConvertOptions, inputs: Inputs, traced: Trace, given: Plan | None = None
) -> Plan:
    """Everything that the scheme, or a plan that the user gives, can replace; work/proposal.json."""
    path = store.work / "proposal.json"
    key = {
        **inputs.network_key(),
        "scheme": options.scheme,
        "options": repr(options.scheme_options),
        "given": None if given is None else sha256_of_bytes(to_json(given).encode()),
        "includes_linear": options.includes_linear,
    }

    def make() -> None:
        plan = given or propose_plan(traced, options.scheme, options.scheme_options, inputs.network)
        write_json(path, drop_failing(inputs.network, traced, plan, inputs.example()))

    store.run("plan", key, (path,), make)
    return read_json(Plan, path)


def guard_files(folder: Path) -> tuple[Path, Path, Path]:
    """The plan, the weights and the record that the guard leaves in the bundle `folder`."""
    return folder / "plan.json", folder / "work" / f"{TRANSFERRED}.pt", folder / "work" / "guard.json"


def run_guard(
    store: StageStore,
    options: ConvertOptions,
    inputs: Inputs,
    traced: Trace,
    proposal: Plan,
    evaluator: Evaluator,
    batch_size: int,
    limit_points: float | None,
    progress: Progress,
) -> tuple[Plan, nn.Module, GuardRecord]:
    """Replace as much as the limit allows; plan.json, work/transferred.pt and work/guard.json."""
    files = guard_files(store.folder)
    plan_path, weights_path, record_path = files
    basis: dict[str, object] = {
        **inputs.network_key(),
        "proposal": sha256_of_bytes(to_json(proposal).encode()),
        "calibration": inputs.calibration.sha256,
        "validation": inputs.validation.sha256,
        "transfer": options.transfer,
        "threads": torch.get_num_threads(),
    }

    def make() -> None:
        guarded = guard_plan(
            inputs.network,
            traced,
            proposal,
            tensor_batches(inputs.calibration, batch_size),
            evaluator,
            max_drop_points=limit_points,
            method=cast("TransferMethod", options.transfer),
            memory=MemoryFile(store.work / "guard_memory.json", basis),
            progress=progress.stage,
        )
        store.before_change()
        save_weights(weights_path, guarded.network)
        write_json(plan_path, guarded.plan)
        write_json(record_path, GuardRecord(guarded.transfers, guarded.steps, guarded.quality, limit_points))

    store.run("guard", {**basis, "limit": limit_points}, files, make)
    plan = read_json(Plan, plan_path)
    network = rebuild(inputs.network, plan, read_weights(weights_path))
    return plan, network, read_json(GuardRecord, record_path)
