"""Outputs on emulated cores against those here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sepdeploy.bench import arm_numerics
from sepdeploy.bench.arm_cores import ARM_CORES, find_core
from sepdeploy.bench.arm_numerics import (
    Difference,
    agreement_sentence,
    compare_numerics,
    mismatch_sentence,
    output_difference,
    require_same,
)
from sepdeploy.bench.arm_root import missing_tools
from sepdeploy.bench.prefixes import Prefix
from sepdeploy.core.progress import Silent
from sepdeploy.errors import ToolError

emulated = pytest.mark.skipif(bool(missing_tools()), reason=f"needs {', '.join(missing_tools())}")

A72 = find_core("cortex-a72")


@emulated
@pytest.mark.parametrize("core", ARM_CORES)
def test_outputs_are_those_of_this_machine(
    core: str, onnx_file: Path, int8_onnx_file: Path, tflite_file: Path, int8_tflite_file: Path
) -> None:
    paths = [onnx_file, int8_onnx_file, tflite_file, int8_tflite_file]
    found = compare_numerics(find_core(core), paths, Silent(), seed=3)
    assert [each.is_same for each in found] == [True] * 4, found
    assert [each.is_in_steps for each in found[::2]] == [False, False]
    assert found[0].core == find_core(core).title
    assert found[0].difference < 1e-5


def test_differences_are_shares_of_what_is_allowed() -> None:
    values = np.array([1.0, -2.0], np.float32)
    assert output_difference(values, values, None).share == 0
    near = output_difference(values, values + np.float32(1e-4), None)
    assert (near.share, near.value, near.is_in_steps) == (
        pytest.approx(0.5, rel=1e-2), pytest.approx(5e-5, rel=1e-2), False,
    )  # fmt: skip
    step = output_difference(values, values + np.float32(0.1), 0.1)
    assert (step.value, step.is_in_steps) == (1.0, True)
    assert output_difference(values, values + np.float32(0.2), 0.1).value == 2.0
    assert output_difference(values, values + np.float32(1e-7), 1e-9).share < 0.1  # far less than what floats hold
    assert output_difference(np.array([3], np.int8), np.array([5], np.int8), None).value == 2.0
    assert output_difference(np.array([-128], np.int8), np.array([127], np.int8), None).value == 255.0
    assert output_difference(values, np.array([1.0, np.nan], np.float32), None).value == np.inf
    nothing = np.array([np.nan, 1.0], np.float32)
    assert output_difference(nothing, nothing, None).share == 0
    assert output_difference(values, values[:1], None).value == np.inf


class Core:
    """Files of 100 operators of which all from one on are wrong on the core."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.runs: list[int] = []
        self.wrong_from = 0
        self.right: Difference | str = Difference(0.0, 1.0, is_in_steps=True)
        self.wrong: Difference | str = Difference(5.0, 1.0, is_in_steps=True)
        self.path = folder / "99.tflite"
        self.path.touch()
        prefixes = [Prefix(f"operator {i}", Path(f"{i}.tflite")) for i in range(99)]
        monkeypatch.setattr(arm_numerics, "_differences", self.differences)
        monkeypatch.setattr(
            arm_numerics, "write_prefixes", lambda path, folder: [*prefixes, Prefix("operator 99", self.path)]
        )

    def differences(self, core, paths, **options):
        self.runs.append(len(paths))
        return [self.wrong if int(path.stem) >= self.wrong_from else self.right for path in paths]

    def compare(self):
        (found,) = compare_numerics(A72, [self.path], Silent())
        return found


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Core:
    return Core(monkeypatch, tmp_path)


@pytest.mark.parametrize("wrong_from", [0, 1, 37, 99])
def test_a_mismatch_names_where_it_starts(wrong_from: int, core: Core) -> None:
    core.wrong_from = wrong_from
    found = core.compare()
    assert (found.is_same, found.difference, found.starts_at) == (False, 5.0, f"operator {wrong_from}")
    assert len(core.runs) <= 4
    with pytest.raises(
        ToolError, match=r"99\.tflite computes something else on the Cortex-A72 than here: outputs differ by 5 steps, "
        rf"where rounding explains one step; it starts at operator {wrong_from}$"
    ):  # fmt: skip
        require_same([core.path], [found])


def test_what_a_step_comes_to_in_floating_point_is_no_mismatch(core: Core) -> None:
    """Behind int8 layers that differ by a step, a softmax in float differs by more than float sums do."""
    core.wrong_from = 98
    core.wrong = Difference(0.02, 1e-4, is_in_steps=False)
    assert core.compare().starts_at == "operator 98"  # all before is the same to the bit, so it is its own fault
    core.right = Difference(1.0, 1.0, is_in_steps=True)
    found = core.compare()
    assert (found.is_same, found.difference, found.is_in_steps, found.starts_at) == (True, 1.0, True, "")
    core.right = Difference(1e-5, 1e-4, is_in_steps=False)
    assert core.compare().starts_at == "operator 98"


def test_files_that_cannot_be_compared_say_why(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    core.wrong = "the guest crashed (SIGILL) while it ran 99.tflite"
    found = core.compare()
    assert not found.is_same
    assert mismatch_sentence("a.tflite", found) == f"a.tflite does not run on the Cortex-A72: {core.wrong}"
    core.wrong = Difference(float("inf"), 1e-4, is_in_steps=False)

    def refuse(path, folder):
        raise ToolError("it has 2 subgraphs")

    monkeypatch.setattr(arm_numerics, "write_prefixes", refuse)
    found = core.compare()
    assert (found.is_same, found.difference) == (False, None)
    assert mismatch_sentence("a.tflite", found).endswith(
        "values are finite on one of the two only; it starts at a layer that could not be found: it has 2 subgraphs"
    )


def test_agreement_is_said_in_both_units(core: Core) -> None:
    core.wrong = Difference(1.0, 1.0, is_in_steps=True)
    steps = core.compare()
    core.wrong = Difference(3.1e-7, 1e-4, is_in_steps=False)
    assert agreement_sentence([core.compare(), steps, core.compare()]) == (
        "all 3 files compute on the emulated Cortex-A72 what this machine computes: outputs differ by 3.1e-07 of the "
        "largest value and 1 step at most"
    )
