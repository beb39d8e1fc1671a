"""Find every convolution of a network, with its call sites, by running it once on one image.

Running beats symbolic tracing here: it works for any Python code in the forward pass, sees functional calls, and
counts a module that is called twice twice. Operators are observed below autograd (`TorchDispatchMode`), modules
through global hooks, so that nothing is ever left on the user's network.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.utils import _pair
from torch.utils._pytree import tree_leaves

from sepdeploy.analyze.batch_norms import has_hooks, is_batchnorm, is_overridden
from sepdeploy.analyze.recorder import Operation, Recorder, following_modules, run_once
from sepdeploy.core.conv import ConvCall, ConvSite, ConvSpec, Trace
from sepdeploy.core.plan import Reason
from sepdeploy.errors import UnsupportedModelError

__all__ = ["conv_spec", "layer_spec", "output_tensors", "trace_network", "weight_owners"]


def trace_network(model: nn.Module, example: Tensor, *, includes_linear: bool = False) -> Trace:
    """Run `model` once and describe its convolutions.

    Args:
        model: The network, in eval mode.
        example: One image as the network takes it, (1, C, H, W) or (1, H, W, C), float32.
        includes_linear: Whether to list nn.Linear layers too, as 1x1 convolutions over their positions.

    Returns:
        Every nn.Conv1d, 2d, 3d and transposed module and every functional convolution; MACs are those of this image.

    Raises:
        UsageError: if the network does not run on an input of this shape.
        UnsupportedModelError: if it returns no tensor.
    """
    recorder = Recorder()
    with torch.no_grad(), following_modules(recorder), recorder:
        returned = run_once(model, example.clone())  # a copy: networks may normalize their input in place
    outputs = output_tensors(returned)
    sites = _module_sites(model, recorder, {id(output) for output in outputs})
    sites += _functional_sites(model, recorder)
    order: dict[str, float] = {name: place for place, name in reversed(list(enumerate(_call_order(model, recorder))))}
    if includes_linear:
        linear_sites = _linear_sites(model, recorder)
        sites += [site for site, _ in linear_sites]
        order |= {site.name: place for site, place in linear_sites if place is not None}
    sites.sort(key=lambda site: order.get(site.name, len(order)))
    return Trace(
        sites=tuple(sites),
        input_shape=tuple(example.shape),
        output_shapes=tuple(tuple(output.shape) for output in outputs),
        total_macs=recorder.total_macs,
        total_params=sum(parameter.numel() for parameter in model.parameters()),
    )


def output_tensors(returned: object) -> list[Tensor]:
    """The tensors in whatever a network returned, in pytree order.

    Raises:
        UnsupportedModelError: if there is none.
    """
    outputs = [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]
    if not outputs:
        raise UnsupportedModelError(f"the network returns no tensor but {type(returned).__name__}")
    return outputs


def conv_spec(conv: nn.Conv2d) -> ConvSpec:
    """The geometry of an nn.Conv2d, with its padding resolved to pixels."""
    # The forward pass goes by the weight's shape and today's stride, padding and dilation; what else the module
    # remembers is from its construction and may be stale (pruned networks, strides turned into dilation).
    out_channels, in_per_group, *kernel_size = conv.weight.shape
    return ConvSpec(
        in_channels=in_per_group * conv.groups,
        out_channels=out_channels,
        kernel_size=_pair(kernel_size),
        stride=_pair(conv.stride),
        padding=_padding_of(conv),
        dilation=_pair(conv.dilation),
        groups=conv.groups,
        has_bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
    )


def layer_spec(layer: nn.Conv2d | nn.Linear) -> ConvSpec:
    """The geometry of an nn.Conv2d, or of an nn.Linear as a 1x1 convolution."""
    if isinstance(layer, nn.Conv2d):
        return conv_spec(layer)
    outputs, inputs = layer.weight.shape
    return ConvSpec(inputs, outputs, (1, 1), has_bias=layer.bias is not None)


def _padding_of(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Pixels that an nn.Conv2d adds at (top, bottom, left, right), with 'same' and 'valid' resolved."""
    if conv.padding_mode != "zeros":
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        return top, bottom, left, right
    if conv.padding == "same":
        extents = zip(conv.weight.shape[2:], _pair(conv.dilation), strict=True)
        height, width = (dilation * (size - 1) for size, dilation in extents)
        return height // 2, height - height // 2, width // 2, width - width // 2
    height, width = (0, 0) if conv.padding == "valid" else _pair(conv.padding)
    return height, height, width, width


def _call_of(operation: Operation) -> ConvCall:
    """The call as its module sees it: PyTorch pads in an operator of its own unless it is with equal zeros."""
    shape = operation.input_shape
    conv = operation.conv_module
    if isinstance(conv, _ConvNd) and not isinstance(conv, _ConvTransposeNd):
        if conv.padding == "same":
            shape = (*shape[:2], *operation.output.shape[2:])
        elif conv.padding_mode != "zeros":
            pads = conv._reversed_padding_repeated_twice  # last dimension first
            sides = zip(pads[::2], pads[1::2], strict=True)
            both = [before + after for before, after in sides][::-1]
            shape = (*shape[:2], *(size - pad for size, pad in zip(shape[2:], both, strict=True)))
    return ConvCall(shape, tuple(operation.output.shape), operation.macs)


def _module_sites(model: nn.Module, recorder: Recorder, output_ids: set[int]) -> list[ConvSite]:
    """One site per convolution module, called or not."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    convs = [module for module in model.modules() if isinstance(module, _ConvNd)]
    owners = weight_owners(model)
    norms = _following_batchnorms(recorder, output_ids)
    sites = []
    for conv in convs:
        operations = [operation for operation in recorder.operations if operation.conv_module is conv]
        is_plain = isinstance(conv, nn.Conv2d)
        reason = _structural_reason(conv, bool(operations), owners, recorder)
        # Folding changes the weight, which must then be the convolution's own.
        norm = norms.get(id(conv)) if reason is None else None
        sites.append(
            ConvSite(
                name=names[id(conv)][0],
                module_type=type(conv).__name__,
                spec=conv_spec(conv) if is_plain else None,  # type: ignore[arg-type]
                calls=tuple(map(_call_of, operations)),
                params=sum(parameter.numel() for parameter in conv.parameters()),
                aliases=tuple(names[id(conv)][1:]),
                norm=names[id(norm)][0] if norm is not None and id(norm) in names else None,
                reason=reason,
            )
        )
    return sites


def _linear_sites(model: nn.Module, recorder: Recorder) -> list[tuple[ConvSite, float | None]]:
    """One site per nn.Linear, and its place among the convolutions in the order of calls; None if never called."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    owners = weight_owners(model)
    sites = []
    for linear in (module for module in model.modules() if isinstance(module, nn.Linear)):
        numbered = [(i, call) for i, call in enumerate(recorder.linear_calls) if call.module is linear]
        inputs, calls = linear.weight.shape[1], []
        for _, call in numbered:
            # Positions of any number of dimensions, as an image of one column: (N, F, P, 1).
            images, positions = call.output_shape[0], math.prod(call.output_shape[1:-1])
            if len(call.output_shape) == 1:
                images = 1
            outputs = call.output_shape[-1]
            calls.append(
                ConvCall(
                    (images, inputs, positions, 1),
                    (images, outputs, positions, 1),
                    images * positions * inputs * outputs,
                )
            )
        site = ConvSite(
            name=names[id(linear)][0],
            module_type=type(linear).__name__,
            spec=layer_spec(linear),
            calls=tuple(calls),
            params=sum(parameter.numel() for parameter in linear.parameters()),
            aliases=tuple(names[id(linear)][1:]),
            reason=_structural_reason(linear, bool(numbered), owners, recorder),
        )
        # After the convolutions before it, before the next: half a place, and in the order of calls.
        place = numbered[0][1].convolutions_before - 0.5 + numbered[0][0] * 1e-6 if numbered else None
        sites.append((site, place))
    return sites


def _functional_sites(model: nn.Module, recorder: Recorder) -> list[ConvSite]:
    """One site per weight that a functional convolution uses outside any convolution module."""
    by_name: dict[str, list[Operation]] = {}
    for name, operation in _named_functional_operations(model, recorder):
        by_name.setdefault(name, []).append(operation)
    return [
        ConvSite(
            name=name,
            module_type=f"functional {operations[0].operator}",
            spec=None,
            calls=tuple(map(_call_of, operations)),
            params=operations[0].weight.numel(),
            reason=Reason.FUNCTIONAL,
        )
        for name, operations in by_name.items()
    ]


def _named_functional_operations(model: nn.Module, recorder: Recorder) -> list[tuple[str, Operation]]:
    """Functional convolutions, named after the module that runs them and numbered by weight."""
    names = {id(module): name for name, module in model.named_modules()}
    numbers: dict[tuple[str, int], int] = {}
    per_module: Counter[str] = Counter()
    named = []
    for operation in recorder.operations:
        if operation.conv_module is not None and id(operation.conv_module) in names:
            continue
        owner = names.get(id(operation.enclosing), "")
        key = (owner, operation.weight.data_ptr())
        if key not in numbers:
            numbers[key] = per_module[owner]
            per_module[owner] += 1
        named.append((f"{owner}:{operation.operator}[{numbers[key]}]", operation))
    return named


def _call_order(model: nn.Module, recorder: Recorder) -> list[str]:
    """Names of the sites in the order of their calls, with repeats."""
    functional = {id(operation): name for name, operation in _named_functional_operations(model, recorder)}
    names = {id(module): name for name, module in model.named_modules()}
    return [functional.get(id(o)) or names[id(o.conv_module)] for o in recorder.operations]


def weight_owners(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by id."""
    return Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))


def _structural_reason(
    conv: _ConvNd | nn.Linear, is_called: bool, owners: Counter[int], recorder: Recorder
) -> Reason | None:
    """Why no scheme can replace this module; None if schemes may try."""
    if isinstance(conv, _ConvTransposeNd):
        return Reason.TRANSPOSED
    if not isinstance(conv, nn.Conv2d | nn.Linear):
        return Reason.NOT_CONV2D
    if not is_called:
        return Reason.NOT_CALLED
    if nn.utils.parametrize.is_parametrized(conv) or not isinstance(conv._parameters.get("weight"), nn.Parameter):
        return Reason.PARAMETRIZED
    base = nn.Linear if isinstance(conv, nn.Linear) else nn.Conv2d
    methods = [name for name in ("__call__", "forward", "_conv_forward") if hasattr(base, name)]
    if any(is_overridden(conv, base, method) for method in methods):
        return Reason.CUSTOM_FORWARD
    if has_hooks(conv):
        return Reason.HAS_HOOKS
    for parameter in conv.parameters():
        if owners[id(parameter)] > 1 or recorder.parameter_readers.get(id(parameter), set()) - {id(conv)}:
            return Reason.SHARED_WEIGHT
    if not conv.weight.is_floating_point():
        return Reason.QUANTIZED_OR_NOT_FLOAT
    if not all(bool(torch.isfinite(parameter).all()) for parameter in conv.parameters()):
        return Reason.NOT_FINITE
    return None


def _following_batchnorms(recorder: Recorder, output_ids: set[int]) -> dict[int, nn.Module]:
    """Convolution id -> the batch norm that alone reads every output of it, and reads nothing else."""
    found: dict[int, nn.Module] = {}
    calls: Counter[int] = Counter()
    rejected: set[int] = set()
    for operation in recorder.operations:
        conv = operation.conv_module
        if conv is None:
            continue
        calls[id(conv)] += 1
        reader = operation.readers[0] if len(operation.readers) == 1 else None
        if reader is None or id(operation.output) in output_ids or found.setdefault(id(conv), reader) is not reader:
            rejected.add(id(conv))
    return {
        conv: norm
        for conv, norm in found.items()
        if conv not in rejected and recorder.module_calls[id(norm)] == calls[conv] and is_batchnorm(norm)
    }
