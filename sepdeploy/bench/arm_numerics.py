"""Whether files compute the same on an emulated Arm core as on this machine, and if not, where it starts."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeGuard

import numpy as np

from sepdeploy.bench.arm_cores import ArmCore
from sepdeploy.bench.arm_guest import GuestPlace, run_guest
from sepdeploy.bench.arm_root import arm64_files
from sepdeploy.bench.outside_programs import last_line
from sepdeploy.bench.prefixes import write_prefixes
from sepdeploy.core.files import sha256_of_file
from sepdeploy.core.measurement import Numerics
from sepdeploy.core.onnx_steps import output_steps
from sepdeploy.core.progress import Progress
from sepdeploy.errors import ContractError, ToolError

__all__ = [
    "FLOAT_TOLERANCE",
    "Difference",
    "agreement_sentence",
    "compare_numerics",
    "difference_text",
    "mismatch_sentence",
    "output_difference",
    "require_same",
]

FLOAT_TOLERANCE = 1e-4
"""Of floating-point outputs, relative to the largest of them: sums are added up in other orders."""

_FLOAT16_TOLERANCE = 2e-2
"""Of files with float16 weights: some cores compute them in float16 throughout, others widen them first."""

_STEPS = 1.0
"""Of quantized outputs: kernels round halves differently."""

_STEP_DIGITS = 3
"""Of a number of steps that was computed from floating-point values: a step is not exact in them."""

_SMALLEST_OUTPUT = 1e-6
"""Outputs that are smaller everywhere count as this large."""

_HOST_SECONDS = 900
_AT_ONCE = 24
"""Prefixes that are looked at in one go for the place where a difference starts."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one output: infinite where a value is finite on one side only.

    Attributes:
        value: In steps of the quantization where `is_in_steps`, else as a share of the largest value.
        allowed: What rounding explains.
        is_in_steps: The unit.
    """

    value: float
    allowed: float
    is_in_steps: bool

    @property
    def share(self) -> float:
        """Of what is allowed; above 1 it is no rounding."""
        return self.value / self.allowed


_Compare = Callable[[Sequence[Path]], list[Difference | str]]
"""From files to the largest difference of each one's outputs, or why it does not run on the core."""


def compare_numerics(
    core: ArmCore, paths: Sequence[Path], progress: Progress, *, seed: int = 0, place: GuestPlace | None = None
) -> list[Numerics]:
    """Run files on random inputs here and on the emulated core, all in one process on either side.

    Args:
        core: Where.
        paths: ONNX and TFLite files.
        progress: Told what is going on.
        seed: Of the inputs.
        place: The emulator; None is that of this machine.

    Returns:
        One result for each file, in order. Floating-point outputs may differ by 1e-4 of the largest value (2e-2 in
        files with float16 weights), quantized ones by one step; where they differ by more, the first layer at which
        they do is named.

    Raises:
        ToolError: if the emulation fails as a whole, or a file does not run on this machine.
    """
    names = paths[0].name if len(paths) == 1 else f"{len(paths)} files"
    progress.stage(f"comparing {names} on the {core.title} with this machine")
    differences = partial(_differences, core, progress=progress, seed=seed, place=place)
    found = differences(paths)
    return [_numerics(core, path, each, progress, differences) for path, each in zip(paths, found, strict=True)]


def mismatch_sentence(name: str, numerics: Numerics) -> str:
    """What is wrong with the file called `name` on the core, one sentence without a full stop."""
    if numerics.failure:
        return f"{name} does not run on the {numerics.core}: {numerics.failure}"
    if numerics.difference is None:
        what = "values are finite on one of the two only"
    else:
        limit = "one step" if numerics.is_in_steps else f"{numerics.allowed:g} of the largest value"
        what = f"outputs differ by {difference_text(numerics)}, where rounding explains {limit}"
    place = f"; it starts at {numerics.starts_at}" if numerics.starts_at else ""
    return f"{name} computes something else on the {numerics.core} than here: {what}{place}"


def agreement_sentence(found: Sequence[Numerics]) -> str:
    """How far files that compute the same differ at most, one sentence without a full stop."""
    worst: dict[bool, Numerics] = {}  # by unit
    for each in found:
        if each.is_in_steps not in worst or (each.difference or 0) > (worst[each.is_in_steps].difference or 0):
            worst[each.is_in_steps] = each
    differences = " and ".join(difference_text(worst[unit]) for unit in sorted(worst))
    which = f"all {len(found)} files compute" if len(found) > 1 else "the file computes"
    return (
        f"{which} on the emulated {found[0].core} what this machine computes: outputs differ by {differences} at most"
    )


def difference_text(numerics: Numerics) -> str:
    """The largest difference with its unit, such as '1 step' or '3.1e-07 of the largest value'.

    Raises:
        ContractError: if there is none.
    """
    if numerics.difference is None:
        raise ContractError("there is no finite difference")
    if numerics.is_in_steps:
        return f"{numerics.difference:.3g} step{'' if numerics.difference == 1 else 's'}"
    return f"{numerics.difference:.2g} of the largest value"


def require_same(paths: Sequence[Path], found: Sequence[Numerics]) -> None:
    """See that files compute the same.

    Raises:
        ToolError: if one does not; the message names the first layer at which it does not.
    """
    for path, numerics in zip(paths, found, strict=True):
        if not numerics.is_same:
            raise ToolError(mismatch_sentence(str(path), numerics))


def output_difference(
    reference: np.ndarray, output: np.ndarray, step: float | None, tolerance: float = FLOAT_TOLERANCE
) -> Difference:
    """The largest difference of an output, in the unit in which it is the smaller share of what is allowed.

    Args:
        reference: What it should be; integers are steps of the quantization.
        output: What it is.
        step: Of the quantization behind floating-point values; None if there is none.
        tolerance: Of floating-point values, relative to the largest of them.

    >>> output_difference(np.array([3, 4], np.int8), np.array([3, 5], np.int8), None).share
    1.0
    """
    is_integer = np.issubdtype(reference.dtype, np.integer)
    is_in_steps = is_integer or step is not None
    allowed = _STEPS if is_in_steps else tolerance
    if reference.shape != output.shape:
        return Difference(float("inf"), allowed, is_in_steps)
    wide = (reference.astype(np.float64), output.astype(np.float64))
    finite = [np.isfinite(each) for each in wide]
    if not np.array_equal(finite[0], finite[1]) or not np.array_equal(
        wide[0][~finite[0]], wide[1][~finite[0]], equal_nan=True
    ):
        return Difference(float("inf"), allowed, is_in_steps)
    largest = float(np.abs(wide[0][finite[0]]).max(initial=0.0))
    error = float(np.abs(wide[0][finite[0]] - wide[1][finite[0]]).max(initial=0.0))
    if is_integer:
        return Difference(error, allowed, is_in_steps)
    found = Difference(error / max(largest, _SMALLEST_OUTPUT), tolerance, is_in_steps=False)
    if step is not None:
        steps = Difference(round(error / step, _STEP_DIGITS), allowed, is_in_steps=True)
        found = min(steps, found, key=lambda each: each.share)
    return found


def _numerics(
    core: ArmCore, path: Path, found: Difference | str, progress: Progress, differences: _Compare
) -> Numerics:
    """The result for one file, with the layer where a difference starts that is none of rounding."""
    starts_at, sha256 = "", sha256_of_file(path)
    if isinstance(found, str):
        return Numerics(core.title, None, 0.0, False, starts_at, found, sha256)
    if found.share > 1.0:
        progress.stage(f"{path.name} differs on the {core.title}: looking for the layer where that starts")
        try:
            starts_at, found = _where_it_starts(path, found, differences)
        except ToolError as error:  # that it differs is known all the same
            starts_at = f"a layer that could not be found: {error}"
    value = found.value if np.isfinite(found.value) else None
    return Numerics(core.title, value, found.allowed, found.is_in_steps, starts_at, "", sha256)


def _where_it_starts(path: Path, whole: Difference, differences: _Compare) -> tuple[str, Difference]:
    """Name of the first operator whose outputs differ, and what the difference of the file then is.

    Where only what is computed in floating point behind quantized tensors differs, and these by a step, that is what
    one step comes to and no fault: there is no such operator then, and the difference is that of the tensors.
    """
    with tempfile.TemporaryDirectory(prefix="sepdeploy-arm-") as folder:
        prefixes = write_prefixes(path, Path(folder))
        known: dict[int, Difference | str] = {len(prefixes) - 1: whole}
        low, high = 0, len(prefixes) - 1  # the last differs
        while low < high:
            # A few places between, evenly; then the stretch before the first of them that differs.
            places = sorted({low + (high - low) * i // _AT_ONCE for i in range(_AT_ONCE)})
            found = differences([prefixes[place].path for place in places])
            known |= zip(places, found, strict=True)
            wrong = [place for place in places if _is_wrong(known[place])]
            high = wrong[0] if wrong else high
            low = max([place + 1 for place in places if place < high], default=low)
    before, first = known.get(high - 1), known[high]
    if _is_rounding(before) and isinstance(first, Difference) and not first.is_in_steps:
        return "", before
    return prefixes[high].name, whole


def _is_rounding(found: Difference | str | None) -> TypeGuard[Difference]:
    """Whether quantized outputs differ, by what rounding explains."""
    return isinstance(found, Difference) and found.is_in_steps and 0 < found.share <= 1.0


def _is_wrong(found: Difference | str) -> bool:
    return isinstance(found, str) or found.share > 1.0


def _differences(
    core: ArmCore, paths: Sequence[Path], *, progress: Progress, seed: int, place: GuestPlace | None
) -> list[Difference | str]:
    """The largest difference of each file's outputs, or why it does not run on the core."""
    with tempfile.TemporaryDirectory(prefix="sepdeploy-arm-") as folder:
        here, there = Path(folder) / "here", Path(folder) / "there"
        here.mkdir()
        there.mkdir()
        # The same program with the same seed: inputs agree if numpy does, in the same version.
        guest = run_guest(core, paths, progress, repeats=1, warmup=1, seed=seed, outputs=there, place=place)
        _run_here(paths, here, seed)
        return [
            file.error or _difference(path, here / f"{i}.npz", there / f"{i}.npz")
            for i, (path, file) in enumerate(zip(paths, guest, strict=True))
        ]


def _run_here(paths: Sequence[Path], outputs: Path, seed: int) -> None:
    options = ["--repeats", "1", "--warmup", "1", "--seed", str(seed), "--outputs", str(outputs)]
    command = [sys.executable, str(arm64_files() / "bench.py"), *options, *(str(path.resolve()) for path in paths)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_HOST_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"the files take more than {_HOST_SECONDS} s on this machine") from error
    if done.returncode or not all((outputs / f"{i}.npz").is_file() for i in range(len(paths))):
        why = _error_here(done.stdout) or last_line(done.stderr)
        raise ToolError(
            f"the files do not run on this machine, so there is nothing to compare with: {why}; install the runtime "
            "here (pip install onnxruntime or ai-edge-litert), or let bench leave the comparison out with --no-check",
            stderr=done.stderr,
        )


def _error_here(printed: str) -> str:
    """The first error among the lines of JSON that bench.py prints for files."""
    reports = [json.loads(line) for line in printed.splitlines() if line.startswith("{") and line.endswith("}")]
    return next((str(report["error"]) for report in reports if report.get("error")), "")


def _difference(path: Path, here: Path, there: Path) -> Difference:
    """The one of all outputs that is the largest share of what is allowed."""
    tolerance = _tolerance(path)
    steps = dict(enumerate(output_steps(path))) if path.suffix.lower() == ".onnx" else {}
    with np.load(here) as references, np.load(there) as outputs:
        found = [
            output_difference(references[name], outputs[name], steps.get(int(name)), tolerance)
            for name in references.files
        ]
    return max(found, key=lambda each: each.share)


def _tolerance(path: Path) -> float:
    """What floating-point outputs may differ by, relative to the largest."""
    if path.suffix.lower() != ".onnx":
        return FLOAT_TOLERANCE
    import onnx

    weights = onnx.load(path, load_external_data=False).graph.initializer
    is_float16 = any(each.data_type == onnx.TensorProto.FLOAT16 for each in weights)
    return _FLOAT16_TOLERANCE if is_float16 else FLOAT_TOLERANCE
