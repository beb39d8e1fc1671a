from __future__ import annotations

import errno
import subprocess

import pytest

from sepdeploy.core.passing_errors import is_passing
from sepdeploy.errors import ToolError, UnsupportedModelError


def raised(first: BaseException, *, is_chained: bool = True) -> ToolError:
    """An error of ours about another one, two exceptions later."""
    try:
        try:
            try:
                raise first
            except BaseException:
                raise RuntimeError("a library gave up")  # noqa: B904
        except RuntimeError as error:
            raise ToolError("it failed") from (error if is_chained else None)
    except ToolError as error:
        return error


@pytest.mark.parametrize(
    "first",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        MemoryError(),
        ModuleNotFoundError("No module named 'onnx'"),
        subprocess.TimeoutExpired("export", 5),
        RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_what_the_machine_lacks_passes(first: Exception) -> None:
    assert is_passing(raised(first))


def test_what_is_refused_does_not() -> None:
    assert not is_passing(raised(ValueError("Conv has no implementation for these types")))
    assert not is_passing(UnsupportedModelError("the network cannot be exported"))
    assert not is_passing(raised(MemoryError(), is_chained=False)), "what is suppressed is not its cause"
