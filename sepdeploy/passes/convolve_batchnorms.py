"""Write batch norms that no convolution precedes as depthwise 1x1 convolutions, exact in inference.

Pre-activation ResNets and DenseNets have norms behind additions and concatenations, other networks at their input.
Runtimes compute such a norm in float beside int8 convolutions, or as a multiplication and an addition that are each
rounded. A depthwise 1x1 convolution is one int8 operator, an activation is fused to it, and its weights lose nothing:
each channel has a single one and a scale of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from sepdeploy.analyze.batch_norms import behind_norm, is_batchnorm, norm_parts
from sepdeploy.analyze.flow_graph import operator
from sepdeploy.analyze.trace import weight_owners
from sepdeploy.passes.replace_convs import replace_modules
from sepdeploy.schemes.module import ChainConv2d, batchnorm_affine

__all__ = ["ConvolvedNorm", "convolve_batchnorms", "lone_batchnorms", "norms_behind_layers"]


class ConvolvedNorm(nn.Conv2d):
    """A batch norm in eval mode as a depthwise 1x1 convolution, and what the norm holds besides.

    Args:
        norm: With running statistics.

    Raises:
        ContractError: if it has none.
    """

    def __init__(self, norm: nn.Module) -> None:
        scale, shift = batchnorm_affine(norm)
        parts = norm_parts(norm)
        dtype = parts.mean.dtype if parts else scale.dtype
        super().__init__(len(scale), len(scale), 1, groups=len(scale))
        learns = any(weight.requires_grad for weight in norm.parameters(recurse=False))
        self.weight = nn.Parameter(scale[:, None, None, None].to(dtype), learns)
        self.bias: nn.Parameter = nn.Parameter(shift.to(dtype), learns)
        behind = behind_norm(norm)
        self._runs_children = isinstance(behind, nn.Sequential)
        for name, child in behind.named_children():
            self.add_module(name, child)
        self.eval()

    def affine(self) -> tuple[Tensor, Tensor]:
        """Its scale and shift (C,) in float64."""
        return self.weight.flatten().double(), self.bias.double()

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift (N, C), (N, C, L) or (N, C, H, W)."""
        missing = 4 - x.dim()
        result = super().forward(x[(..., *[None] * missing)])
        result = result.flatten(1 + (missing == 1), 3) if missing else result
        for child in self.children() if self._runs_children else ():
            result = child(result)
        return result


@torch.no_grad()
def lone_batchnorms(network: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Names of the batch norms that run and can be written as convolutions.

    Those in training mode stay, those that share weights or statistics, those with a factor but no bias, and those
    inside of other norms or of the forms of replaced convolutions, which lowerings fold.

    Args:
        network: In eval mode, the norms behind convolutions folded.
        example: One image, (1, ...).
    """
    owners = Counter(
        id(tensor)
        for module in network.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    )
    inside = {id(part) for chain in network.modules() if isinstance(chain, ChainConv2d) for part in chain.modules()}
    names: dict[str, nn.Module] = {}
    for name, module in network.named_modules():  # what holds a module comes before it
        parts = norm_parts(module) if name and id(module) not in inside and is_batchnorm(module) else None
        if parts is None or any(owners[id(tensor)] > 1 for tensor in parts.tensors if tensor is not None):
            continue
        is_held = any(name.startswith(f"{other}.") for other in names)
        if not is_held and (parts.weight is None or parts.bias is not None):
            names[name] = module
    ran: set[int] = set()
    hooks = [module.register_forward_hook(lambda module, *_: ran.add(id(module))) for module in names.values()]
    try:
        network(example.clone())  # networks may normalize their input in place
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(name for name, module in names.items() if id(module) in ran)


def norms_behind_layers(network: nn.Module, names: Collection[str], graph: GraphModule) -> dict[str, str]:
    """Layer -> the norm that alone reads it, which `fold_batchnorm` may have instead.

    Linear layers, 1-d and transposed convolutions; Conv2d layers have theirs from the trace. Transposed ones with
    groups stay as they are: onnxruntime's quantizer fails at their biases.

    Args:
        network: In eval mode.
        names: Norms as `lone_batchnorms` gives them.
        graph: Of the network (`capture_graph`).
    """
    modules, owners = dict(network.named_modules()), weight_owners(network)
    found = {}
    for node in graph.graph.nodes:
        if "batch_norm" not in operator(node):
            continue
        before, statistics = node.args[0], node.args[3]
        if operator(before) not in ("linear", "conv1d", "conv_transpose2d"):
            continue
        layer, norm = _owner(before.args[1]), _owner(statistics)
        if norm not in names or not isinstance(modules.get(layer), nn.Linear | nn.Conv1d | nn.ConvTranspose2d):
            continue
        is_alone = len(before.users) == len(before.args[1].users) == len(statistics.users) == 1
        is_by_channel = before.meta["val"].dim() == {"linear": 2, "conv1d": 3, "conv_transpose2d": 4}[operator(before)]
        is_grouped = operator(before) == "conv_transpose2d" and getattr(modules[layer], "groups", 1) > 1
        is_own = all(owners[id(weight)] == 1 for weight in modules[layer].parameters())
        is_own &= not nn.utils.parametrize.is_parametrized(modules[layer])
        if is_alone and is_by_channel and is_own and not is_grouped:
            found[layer] = norm
    return found


def _owner(node: object) -> str:
    """Name of the module whose weight a node is; empty where it is none."""
    return str(node.target).rpartition(".")[0] if isinstance(node, Node) and node.op == "get_attr" else ""


@torch.no_grad()
def convolve_batchnorms(network: nn.Module, names: Iterable[str]) -> None:
    """Put a depthwise 1x1 convolution in the place of each of some batch norms, in place, under the same name.

    Args:
        network: The network.
        names: Norms as `lone_batchnorms` gives them.

    Raises:
        ContractError: if one of them is none.
    """
    replacements = {}
    for name in names:
        replacements[name] = ConvolvedNorm(network.get_submodule(name))
    replace_modules(network, replacements)
