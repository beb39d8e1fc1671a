from __future__ import annotations

import errno
import subprocess

import pytest
import torch

from sepdeploy.core.passing_errors import is_out_of_memory, is_passing
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


@pytest.mark.parametrize(
    "first",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_a_lack_of_memory_is_known_whoever_is_blamed_for_it(first: Exception) -> None:
    assert is_out_of_memory(first)
    assert is_out_of_memory(raised(first))


def test_other_lacks_are_none_of_memory() -> None:
    assert not is_out_of_memory(raised(OSError(errno.ENOSPC, "No space left on device")))
    assert not is_out_of_memory(FileNotFoundError(errno.ENOENT, "No such file", "out of memory/a.png"))
    assert not is_out_of_memory(ToolError("the board said: std::bad_alloc")), "that is the board's memory"


def test_what_torch_itself_says_is_understood() -> None:
    with pytest.raises(RuntimeError) as raised_by_torch:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised_by_torch.value)
