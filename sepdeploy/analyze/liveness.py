"""Peak activation memory by liveness: which activations are alive while each operator of a network runs.

One real run is observed below autograd, as in `trace.py`, and turned into the operators that an inference runtime would
run, by the rules that the TFLite files of litert-torch and LiteRT's memory planner follow:

- The input lives from the start to the end and outputs live to the end; neither is overwritten.
- Batch norm, ReLU, ReLU6 and biases fuse into the operator before them if they alone read its output.
- Addition, subtraction, multiplication, division and softmax write over an input of the size of their output that
  nothing else reads. Every other operator needs its output beside its inputs.
- Reshapes, copies and the change between NCHW and NHWC need no memory. Slices and other transposes do, and so does a
  concatenation, beside all its inputs.
- A convolution or max pooling pads by itself only if the padding is TFLite's SAME for that input size; otherwise a
  padded copy of the input comes first. 3x3 at stride 1 is SAME; 3x3 with padding 1 at stride 2 is on inputs of odd size
  only. A zero pad right before a convolution without padding of its own counts as that convolution's padding.
- What depends on no input, such as weights, is constant and not counted; what no output depends on never runs.

The peak is a lower bound of an arena: it has no gaps between tensors, and what the exporter decomposes (PReLU, ELU,
group norm) counts as one operator. Scratch memory inside a kernel, such as im2col, is the runtime's own choice and not
counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from sepdeploy.analyze.recorder import run_once, watching_modules
from sepdeploy.analyze.trace import output_tensors
from sepdeploy.core.memory import MemoryProfile, MemoryStep

__all__ = ["measure_memory"]

_OVERWRITING = frozenset({"add", "sub", "rsub", "mul", "div", "hardsigmoid", "_softmax"})
"""Operators that write over an input which nothing else reads."""

_FREE_COPIES = frozenset({"clone", "_to_copy", "_unsafe_view"})
"""Operators that are no views in PyTorch, and nothing in an exported file."""

_POOLINGS = MappingProxyType(
    {"max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3, "avg_pool2d": 2, "avg_pool3d": 3}
)
"""Operator -> spatial dimensions."""

_LAYOUT_CHANGES = ((0, 2, 3, 1), (0, 3, 1, 2))
"""NCHW to NHWC and back: a runtime holds images in one layout throughout."""

_Sides = tuple[tuple[int, int], ...]
"""Elements added (before, after), per spatial dimension."""


def measure_memory(model: nn.Module, example: Tensor) -> MemoryProfile:
    """Run `model` once and say which activations are alive while each of its operators runs.

    Args:
        model: The network, in eval mode; batch norms may be folded or not, convolutions converted or not.
        example: One image as the network takes it, (1, C, H, W) or (1, H, W, C), float32.

    Returns:
        The operators of the path that this image takes, in order, each under the name of its module.

    Raises:
        UsageError: if the network does not run on an input of this shape.
        UnsupportedModelError: if it returns no tensor.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten())
    >>> [(step.module, step.live_values) for step in measure_memory(model, torch.zeros(1, 3, 4, 4)).steps]
    [('', 48), ('0', 176)]
    """
    image = example.clone()  # a copy: networks may normalize their input in place
    recorder = _Recorder(model, image)
    with torch.no_grad(), _following_modules(recorder), recorder:
        returned = run_once(model, image)
    outputs = [recorder.values[tensor] for tensor in output_tensors(returned) if tensor in recorder.values]
    return MemoryProfile(tuple(_steps(recorder.operations, recorder.input, outputs)))


@dataclass(slots=True, eq=False)
class _Value:
    """An activation; equal only to itself.

    Attributes:
        real_values: Its floating-point elements, whose size depends on the precision.
        other_bytes: Its bytes if it holds integers or booleans.
    """

    real_values: int
    other_bytes: int = 0

    @classmethod
    def of(cls, tensor: Tensor) -> _Value:
        if tensor.is_floating_point():
            return cls(tensor.numel())
        return cls(0, tensor.numel() * tensor.element_size())

    def has_size_of(self, other: _Value) -> bool:
        return (self.real_values, self.other_bytes) == (other.real_values, other.other_bytes)


@dataclass(slots=True)
class _Operation:
    """An operator of the exported network."""

    module: str
    operator: str
    reads: list[_Value]
    writes: list[_Value]
    may_overwrite: list[_Value] = field(default_factory=list)
    is_fusible: bool = False


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operators that depend on `image`, as an exported network would run them."""

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {id(module): name for name, module in model.named_modules()}
        self.stack = [""]
        self.operations: list[_Operation] = []
        self.input = _Value.of(image)
        self.values = WeakTensorKeyDictionary({image: self.input})  # weak: watching must not keep activations alive
        self._viewed = WeakTensorKeyDictionary()  # view -> the tensor that it shows a part of
        self._padded: dict[_Value, tuple[_Value, tuple[int, ...], _Sides]] = {}  # by zeros: what, its sizes, how much

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if func.is_view:
            self._viewed.update(dict.fromkeys(outputs, args[0]))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf in self.values]
        if inputs and outputs:
            self._record(func, args, inputs, outputs)
        return result

    def _record(self, func: Any, args: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        operator = func._overloadpacket.__name__
        if _is_free(func, operator, args, outputs[0]):
            self.values[outputs[0]] = self.values[inputs[0]]
            return
        reads = [self.values[tensor] for tensor in inputs]
        window = _window(operator, args, outputs[0])
        if window is not None and inputs[0] is args[0]:
            reads[0] = self._padded_for(window, reads[0], tuple(args[0].shape))
        is_in_place = func._schema.is_mutable
        is_fusible = _is_fusible(operator.rstrip("_"), args)
        overwrites = is_fusible or is_in_place or operator in _OVERWRITING
        writes = [_Value.of(output) for output in outputs]
        self._add(operator, reads, writes, may_overwrite=reads if overwrites else [], is_fusible=is_fusible)
        self.values.update(zip(outputs, writes, strict=True))
        if is_in_place:
            self._write_through(outputs[0])
        if operator == "constant_pad_nd" and not any(args[2:]):
            rank = args[0].dim() - 2
            if len(args[1]) <= 2 * rank:
                self._padded[writes[0]] = (reads[0], tuple(args[0].shape[2:]), _sides(args[1], rank))

    def _add(self, operator: str, reads: list[_Value], writes: list[_Value], **options: Any) -> None:
        self.operations.append(_Operation(self.stack[-1], operator, reads, writes, **options))

    def _write_through(self, view: Tensor) -> None:
        """What an operator writes into a view is in the tensor behind it from then on."""
        while view in self._viewed:
            base = self._viewed[view]
            reads = [self.values[tensor] for tensor in (base, view) if tensor in self.values]
            after = _Value.of(base)
            self._add("copy", reads, [after], may_overwrite=reads)
            self.values[base] = after
            view = base

    def _padded_for(self, window: _Window, value: _Value, shape: tuple[int, ...]) -> _Value:
        """What an operator with this window reads in place of `value`: a padded copy if it cannot pad by itself."""
        rank = len(window.padding)
        sizes = shape[-rank:]
        if not any(map(any, window.padding)):
            if value in self._padded and window.pads_itself:
                source, source_sizes, padding = self._padded[value]
                return source if window.is_same(source_sizes, padding) else value
            return value
        if window.pads_itself and window.is_same(sizes, window.padding):
            return value
        padded_sizes = (before + size + after for size, (before, after) in zip(sizes, window.padding, strict=True))
        padded = _Value(prod(shape[:-rank]) * prod(padded_sizes))
        self._add("pad", [value], [padded])
        return padded


@contextmanager
def _following_modules(recorder: _Recorder) -> Iterator[None]:
    """Keep `recorder.stack` at the names of the modules that are running."""

    def enter(module: nn.Module) -> None:
        recorder.stack.append(recorder.names.get(id(module), recorder.stack[-1]))

    def leave(_module: nn.Module, _output: object) -> None:
        recorder.stack.pop()

    with watching_modules(enter, leave):
        yield


def _is_free(func: Any, operator: str, args: Any, output: Tensor) -> bool:
    """Whether the output is the first input to a runtime, only seen or stored otherwise."""
    if not (func.is_view or operator in _FREE_COPIES):
        return False
    tensor: Tensor = args[0]
    if operator in ("permute", "transpose", "t"):
        order = list(range(tensor.dim()))
        if operator == "permute":
            order = [dim % tensor.dim() for dim in args[1]]
        elif order:
            first, second = args[1:] or (0, -1)
            order[first], order[second] = order[second], order[first]
        moved = [dim for dim in order if tensor.shape[dim] > 1]
        return moved == sorted(moved) or tuple(order) in _LAYOUT_CHANGES
    return operator == "expand" or _Value.of(tensor).has_size_of(_Value.of(output))


def _is_fusible(operator: str, args: Any) -> bool:
    """Whether it can become part of the operator before it: batch norm, ReLU, ReLU6, and clamping to [-1, 1]."""
    if operator in ("hardtanh", "clamp"):
        limits = tuple(args[1:3]) or (-1, 1)  # the defaults of hardtanh; clamp has none
        return (*limits, None)[:2] in ((0, 6), (-1, 1), (0, None))
    return "batch_norm" in operator or operator == "relu" or (operator == "clamp_min" and args[1] == 0)


@dataclass(frozen=True, slots=True)
class _Window:
    """The sliding window of a convolution or a pooling, per spatial dimension.

    Attributes:
        extent: Input elements from the first to the last that one output sees.
        stride: Input elements between two outputs.
        padding: What the operator adds around its input.
        pads_itself: Whether the runtime's operator can add SAME padding.
    """

    extent: tuple[int, ...]
    stride: tuple[int, ...]
    padding: _Sides
    pads_itself: bool

    def is_same(self, sizes: tuple[int, ...], padding: _Sides) -> bool:
        """Whether `padding` is TFLite's SAME on an input of these sizes: ceil(size / stride) outputs, surplus last."""
        for size, extent, stride, sides in zip(sizes, self.extent, self.stride, padding, strict=True):
            total = max((-(-size // stride) - 1) * stride + extent - size, 0)
            if sides != (total // 2, total - total // 2):
                return False
        return True


def _window(operator: str, args: Any, output: Tensor) -> _Window | None:
    """The window of a convolution (not a transposed one) or a 2-D or 3-D pooling; None of anything else."""
    if operator == "convolution" and not args[6]:
        kernel, stride, padding, dilation = args[1].shape[2:], args[3], args[4], args[5]
    elif operator in _POOLINGS:
        given = dict(enumerate(args))  # arguments at their defaults may be missing at the end
        kernel, stride, padding, dilation = given[1], given.get(2) or given[1], given.get(3, (0,)), given.get(4, (1,))
        if operator.startswith("avg"):
            dilation = (1,)  # averages are over neighbours only; their argument 4 means something else
    else:
        return None
    rank = _POOLINGS.get(operator, len(kernel))
    kernel, stride, padding, dilation = (_repeated(each, rank) for each in (kernel, stride, padding, dilation))
    extent = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    # With ceil_mode the last window may hang over the padded input; TFLite then needs more padding there.
    reach = ((n - 1) * s + e for n, s, e in zip(output.shape[-rank:], stride, extent, strict=True))
    sizes = args[0].shape[-rank:]
    sides = tuple((p, max(p, r - size - p)) for p, r, size in zip(padding, reach, sizes, strict=True))
    return _Window(extent, stride, sides, pads_itself=not operator.startswith("avg"))


def _repeated(values: Sequence[int], rank: int) -> tuple[int, ...]:
    return tuple(values) * rank if len(values) == 1 else tuple(values)


def _sides(pads: Sequence[int], rank: int) -> _Sides:
    """PyTorch's flat list of pads, last dimension first, per dimension in order."""
    pairs = list(zip(pads[::2], pads[1::2], strict=True))
    return (*[(0, 0)] * (rank - len(pairs)), *pairs[::-1])


def _steps(operations: Sequence[_Operation], image: _Value, outputs: Sequence[_Value]) -> Iterator[MemoryStep]:
    """What is alive at each operator that the outputs depend on, by the buffers that the values are in."""
    needed = set(outputs)
    kept: list[_Operation] = []
    for operation in reversed(operations):
        operation.writes = [value for value in operation.writes if value in needed]
        if operation.writes:
            needed.update(operation.reads)
            kept.insert(0, operation)
    buffers, fused = _shared_buffers(kept, {image, *outputs})
    steps = [operation for operation in kept if id(operation) not in fused]
    last_use = {
        buffers.get(value, value): place
        for place, operation in enumerate(steps)
        for value in (*operation.writes, *operation.reads)
    }
    forever = {image, *(buffers.get(value, value) for value in outputs)}
    alive = {image}
    yield _step("", "input", alive)
    for place, operation in enumerate(steps):
        alive.update(buffers.get(value, value) for value in operation.writes)
        yield _step(operation.module, operation.operator, alive)
        alive = {buffer for buffer in alive if buffer in forever or last_use[buffer] > place}


def _shared_buffers(
    operations: Sequence[_Operation], preserved: set[_Value]
) -> tuple[dict[_Value, _Value], frozenset[int]]:
    """Value -> the earlier one that it is written over; and the operations, by id, that are part of the one before."""
    readers = Counter(value for operation in operations for value in operation.reads)
    buffers: dict[_Value, _Value] = {}
    fused = set()
    for operation in operations:
        written = operation.writes[0]
        for value in operation.may_overwrite:
            if readers[value] == 1 and value not in preserved and value.has_size_of(written):
                buffers[written] = buffers.get(value, value)
                if operation.is_fusible:
                    fused.add(id(operation))
                break
    return buffers, frozenset(fused)


def _step(module: str, operator: str, alive: set[_Value]) -> MemoryStep:
    return MemoryStep(
        module, operator, sum(value.real_values for value in alive), sum(value.other_bytes for value in alive)
    )
