"""Whether files compute the same on an emulated Arm core as on this machine, and if not, where it starts."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sepdeploy.bench.arm_cores import ArmCore
from sepdeploy.bench.arm_guest import run_guest
from sepdeploy.bench.arm_root import arm64_files
from sepdeploy.bench.outside_programs import last_line
from sepdeploy.bench.prefixes import write_prefixes
from sepdeploy.core.progress import Progress
from sepdeploy.errors import ToolError

__all__ = ["FLOAT_TOLERANCE", "check_numerics", "output_difference"]

FLOAT_TOLERANCE = 1e-4
"""Of floating-point outputs, relative to the largest of them: sums are added up in other orders."""

_FLOAT16_TOLERANCE = 2e-2
"""Of files with float16 weights: some cores compute them in float16 throughout, others widen them first."""

_STEPS = 1.0
"""Of quantized outputs: kernels round halves differently."""

_HOST_SECONDS = 900
_AT_ONCE = 24
"""Prefixes that are looked at in one go for the place where a difference starts."""


def check_numerics(core: ArmCore, path: Path, progress: Progress, *, seed: int = 0) -> float:
    """Run a file on random inputs here and on the emulated core.

    Args:
        core: Where.
        path: ONNX or TFLite file.
        progress: Told what is going on.
        seed: Of the inputs.

    Returns:
        The largest difference: of quantized outputs in steps, of others relative to the largest value.

    Raises:
        ToolError: if it is more than one step, or 1e-4 (2e-2 of files with float16 weights); the message names the
            first layer at which it is.
    """
    progress.stage(f"comparing {path.name} on the {core.title} with this machine")
    difference = _differences(core, [path], progress, seed)[0]
    if difference <= 1.0:
        return difference
    place = _where_it_starts(core, path, progress, seed)
    said = _said(difference, _tolerance(path))
    raise ToolError(f"{path} computes something else on the {core.title} than here: {said}; it starts at {place}")


def output_difference(
    reference: np.ndarray, output: np.ndarray, step: float | None, tolerance: float = FLOAT_TOLERANCE
) -> float:
    """The largest difference of an output, as a share of what is allowed; infinite where one is not finite.

    Args:
        reference: What it should be; integers are steps of the quantization.
        output: What it is.
        step: Of the quantization behind floating-point values; None if there is none.
        tolerance: Of floating-point values, relative to the largest of them.

    >>> output_difference(np.array([3, 4], np.int8), np.array([3, 5], np.int8), None)
    1.0
    """
    if reference.shape != output.shape:
        return float("inf")
    wide = (reference.astype(np.float64), output.astype(np.float64))
    finite = [np.isfinite(each) for each in wide]
    if not np.array_equal(finite[0], finite[1]) or not np.array_equal(
        wide[0][~finite[0]], wide[1][~finite[0]], equal_nan=True
    ):
        return float("inf")
    largest = float(np.abs(wide[0][finite[0]]).max(initial=0.0))
    error = float(np.abs(wide[0][finite[0]] - wide[1][finite[0]]).max(initial=0.0))
    if np.issubdtype(reference.dtype, np.integer):
        return error / _STEPS
    allowed = tolerance * max(largest, 1e-6)
    if step is not None:
        allowed = max(allowed, _STEPS * step * (1 + 1e-5))
    return error / allowed


def _said(difference: float, tolerance: float) -> str:
    if not np.isfinite(difference):
        return "values that are not finite here and are there, or the other way round"
    return (
        f"its outputs differ by {difference:.3g} times what rounding explains ({tolerance:g} of the largest value, or "
        "one step of the quantization)"
    )


def _where_it_starts(core: ArmCore, path: Path, progress: Progress, seed: int) -> str:
    """Name of the first operator whose outputs differ."""
    with tempfile.TemporaryDirectory(prefix="sepdeploy-arm-") as folder:
        prefixes = write_prefixes(path, Path(folder))
        low, high = 0, len(prefixes) - 1  # the last differs
        while low < high:
            # A few places between, evenly; then the stretch before the first of them that differs.
            places = sorted({low + (high - low) * i // _AT_ONCE for i in range(_AT_ONCE)})
            found = _differences(core, [prefixes[place].path for place in places], progress, seed)
            wrong = [place for place, difference in zip(places, found, strict=True) if difference > 1.0]
            high = wrong[0] if wrong else high
            low = max([place + 1 for place in places if place < high], default=low)
        return prefixes[high].name


def _differences(core: ArmCore, paths: Sequence[Path], progress: Progress, seed: int) -> list[float]:
    """The largest difference of each file's outputs, as a share of what is allowed."""
    with tempfile.TemporaryDirectory(prefix="sepdeploy-arm-") as folder:
        here, there = Path(folder) / "here", Path(folder) / "there"
        here.mkdir()
        there.mkdir()
        # The same program with the same seed: inputs agree if numpy does, in the same version.
        guest = run_guest(core, paths, progress, repeats=1, warmup=1, seed=seed, outputs=there)
        for file in guest:
            if file.error:
                raise ToolError(f"{file.path} does not run on the {core.title}: {file.error}")
        _run_here(paths, here, seed)
        return [_difference(path, here / f"{i}.npz", there / f"{i}.npz") for i, path in enumerate(paths)]


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
            "here (pip install onnxruntime or ai-edge-litert), or leave the comparison out with --no-check",
            stderr=done.stderr,
        )


def _error_here(printed: str) -> str:
    """The first error among the lines of JSON that bench.py prints for files."""
    reports = [json.loads(line) for line in printed.splitlines() if line.startswith("{") and line.endswith("}")]
    return next((str(report["error"]) for report in reports if report.get("error")), "")


def _difference(path: Path, here: Path, there: Path) -> float:
    tolerance = _tolerance(path)
    steps = _onnx_steps(path) if path.suffix.lower() == ".onnx" else {}
    with np.load(here) as references, np.load(there) as outputs:
        return max(
            output_difference(references[name], outputs[name], steps.get(int(name)), tolerance)
            for name in references.files
        )


def _tolerance(path: Path) -> float:
    """What floating-point outputs may differ by, relative to the largest."""
    if path.suffix.lower() != ".onnx":
        return FLOAT_TOLERANCE
    import onnx

    weights = onnx.load(path, load_external_data=False).graph.initializer
    is_float16 = any(each.data_type == onnx.TensorProto.FLOAT16 for each in weights)
    return _FLOAT16_TOLERANCE if is_float16 else FLOAT_TOLERANCE


def _onnx_steps(path: Path) -> dict[int, float]:
    """Number of an output -> step of the quantization that it comes from, where it comes from one."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    constants = {each.name: each for each in graph.initializer}
    scales = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "DequantizeLinear"}
    return {
        i: float(numpy_helper.to_array(constants[scales[output.name]]).max())
        for i, output in enumerate(graph.output)
        if output.name in scales and scales[output.name] in constants
    }
