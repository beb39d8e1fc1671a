"""What one run of a network shows below autograd: its convolutions, who reads their outputs, and which module runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sepdeploy.core.quiet import error_summary
from sepdeploy.errors import UsageError

__all__ = ["LinearCall", "Operation", "Recorder", "following_modules", "run_once", "watching_modules"]


@dataclass(slots=True)
class Operation:
    """One convolution operator that ran."""

    enclosing: nn.Module | None
    conv_module: nn.Module | None
    weight: Tensor
    output: Tensor
    input_shape: tuple[int, ...]
    macs: int
    operator: str
    readers: list[nn.Module | None] = field(default_factory=list)


@dataclass(slots=True)
class LinearCall:
    """One call of an nn.Linear, and how many convolutions had run before it."""

    module: nn.Linear
    output_shape: tuple[int, ...]
    convolutions_before: int


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records convolutions, who reads their outputs, and the multiply-accumulates of everything."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack: list[nn.Module] = []
        self.operations: list[Operation] = []
        self.module_calls: Counter[int] = Counter()
        self.parameter_readers: dict[int, set[int]] = {}  # parameter -> modules that ran an operator on it, by id
        self.linear_calls: list[LinearCall] = []
        self.total_macs = 0
        self._by_output: dict[int, Operation] = {}  # the operations keep the tensors alive, so ids stay unique

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        enclosing = self.stack[-1] if self.stack else None
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, nn.Parameter):
                self.parameter_readers.setdefault(id(leaf), set()).add(id(enclosing))
            elif isinstance(leaf, Tensor) and (operation := self._by_output.get(id(leaf))):
                operation.readers.append(enclosing)
        packet = func._overloadpacket
        if packet in flop_registry:
            macs = int(flop_registry[packet](*args, **kwargs, out_val=result)) // 2
            self.total_macs += macs
            if packet in (torch.ops.aten.convolution, torch.ops.aten._convolution):
                self._record(args, result, macs)
        return result

    def _record(self, args: Any, result: Tensor, macs: int) -> None:
        is_transposed = bool(args[6])
        operation = Operation(
            enclosing=self.stack[-1] if self.stack else None,
            conv_module=next((m for m in reversed(self.stack) if isinstance(m, _ConvNd)), None),
            weight=args[1],
            output=result,
            input_shape=tuple(args[0].shape),
            macs=macs,
            operator=f"conv{'_transpose' if is_transposed else ''}{args[1].dim() - 2}d",
        )
        self.operations.append(operation)
        self._by_output[id(result)] = operation


def run_once(model: nn.Module, image: Tensor) -> object:
    """What the network returns for its first image.

    Args:
        model: In eval mode.
        image: (1, C, H, W) or (1, H, W, C); a copy where it matters, for networks may normalize it in place.

    Raises:
        UsageError: if the network does not run on an input of this shape.
    """
    try:
        return model(image)
    except Exception as error:
        raise UsageError(
            f"the network does not run on an input of shape {tuple(image.shape)}: {error_summary(error)}; "
            "check --input-shape C,H,W and the preprocess file"
        ) from error


@contextmanager
def following_modules(recorder: Recorder) -> Iterator[None]:
    """Keep `recorder.stack` at the modules that are running."""

    def enter(module: nn.Module) -> None:
        recorder.module_calls[id(module)] += 1
        recorder.stack.append(module)

    def leave(module: nn.Module, output: object) -> None:
        if isinstance(module, nn.Linear) and isinstance(output, Tensor):
            recorder.linear_calls.append(LinearCall(module, tuple(output.shape), len(recorder.operations)))
        if recorder.stack and recorder.stack[-1] is module:
            recorder.stack.pop()

    with watching_modules(enter, leave):
        yield


@contextmanager
def watching_modules(enter: Callable[[nn.Module], None], leave: Callable[[nn.Module, object], None]) -> Iterator[None]:
    """Call `enter` before each module of any network runs, and `leave` with its output (None after an error)."""
    handles = (
        module_hooks.register_module_forward_pre_hook(lambda module, _args: enter(module)),
        module_hooks.register_module_forward_hook(
            lambda module, _args, output: leave(module, output), always_call=True
        ),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
