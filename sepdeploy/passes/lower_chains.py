"""Write the chains of a network down in the form that a runtime is fast with; the function stays the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from sepdeploy.core.artifact import Format, Precision
from sepdeploy.passes.replace_convs import replace_modules
from sepdeploy.schemes.lowerings.lowering import Lowering, Refusal, find_lowering
from sepdeploy.schemes.module import ChainConv2d, chain_class
from sepdeploy.schemes.weighted import WeightedSum

__all__ = ["DEFAULT_LOWERINGS", "LoweredChain", "lower_chains", "lowerings_that_apply", "try_lowerings"]

DEFAULT_LOWERINGS: Mapping[tuple[Format, Precision], tuple[str, ...]] = MappingProxyType(
    {
        (Format.ONNX, Precision.FLOAT32): ("fold_norm", "shuffle_gather"),
        (Format.ONNX, Precision.INT8): ("fold_norm", "fold_shuffle", "terms_as_concat"),
        (Format.TFLITE, Precision.FLOAT32): ("fold_norm", "shuffle_channels_last"),
        (Format.TFLITE, Precision.INT8): ("fold_norm", "shuffle_channels_last", "terms_as_concat"),
    }
)
"""What each kind of file is lowered with unless the user says otherwise.

Measured on x86-64 (AVX512-VNNI, one thread), 128 channels at 28x28, grouped 3x3 (g = 8), shuffle, grouped 1x1 (g = 16).
In ONNX Runtime a shuffle is one Gather; in float32 that is fastest, 0.32 ms against 0.45 ms with the shuffle folded
into a dense 1x1, in int8 grouped 1x1 convolutions are slow and folding brings 0.78 down to 0.39 ms. In TFLite a gather
becomes two transposes and a GATHER_ND, which XNNPACK does not take and NPUs leave to the CPU; channels-last it is
reshape, transpose, reshape. Folding nearly doubles the multiply-accumulates, 15 to 27 million: LiteRT int8 gains by it
on an x86 with matrix units (0.52 to 0.29 ms), but float32 does not (0.49 to 0.56 ms), and what the Arm cores that such
files are made for gain is not known. Rows of unequal length, which no reshape holds, stay a gather.
Terms that are added up are up to 9% faster as branches than concatenated in float32; in int8 they are 2% slower to 9%
faster concatenated, and none is rounded on its own (`tests/benchmarks/term_lowerings.py`). On Arm cores concatenated
terms take 2 to 19% fewer modelled cycles in int8, at the low end (`tests/benchmarks/arm.py`).
`tests/benchmarks/lowerings.py` times all forms side by side.
"""


@dataclass(frozen=True, slots=True)
class LoweredChain:
    """What lowerings did to one convolution.

    Attributes:
        name: Its name in the network.
        applied: Lowerings that changed its form, in order.
        refused: Lowerings that did not, each with the reason.
    """

    name: str
    applied: tuple[str, ...]
    refused: tuple[tuple[str, Refusal], ...]


def lower_chains(
    model: nn.Module, names: Sequence[str], own: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> tuple[LoweredChain, ...]:
    """Rewrite every `ChainConv2d` of a network by the lowerings in turn; in place.

    Lowered modules compute the same in eval mode, and are for export only: training would undo what makes them equal,
    such as the zeros of a block-diagonal kernel.

    Args:
        model: The network.
        names: Lowerings, in the order of their application.
        own: Name of a chain -> the lowerings that it gets instead.

    Returns:
        One entry per `ChainConv2d`, changed or not.

    Raises:
        UsageError: if there is no lowering of one of the names.
    """
    common = [find_lowering(name) for name in names]
    results, replacements = [], {}
    for name, module in _chains(model).items():
        terms, lowered = _lower(name, module.weighted(), _lowerings_of(name, common, own))
        results.append(lowered)
        if lowered.applied:
            dtype = next(module.parameters()).dtype
            replacements[name] = chain_class(module).from_weighted(terms, module.spec, dtype=dtype)
    replace_modules(model, replacements)
    return tuple(results)


def try_lowerings(
    model: nn.Module, names: Sequence[str], own: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> tuple[LoweredChain, ...]:
    """What `lower_chains` would do; nothing is changed."""
    common = [find_lowering(name) for name in names]
    return tuple(
        _lower(name, module.weighted(), _lowerings_of(name, common, own))[1] for name, module in _chains(model).items()
    )


def lowerings_that_apply(
    model: nn.Module, names: Sequence[str], own: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> dict[str, tuple[str, ...]]:
    """Chain -> those of its lowerings that change it; chains that stay as they are are left out."""
    return {chain.name: chain.applied for chain in try_lowerings(model, names, own) if chain.applied}


def _chains(model: nn.Module) -> dict[str, ChainConv2d]:
    """The chains by name; of those whose own convolutions have become chains only the inner ones."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ChainConv2d) and sum(isinstance(part, ChainConv2d) for part in module.modules()) == 1
    }


def _lowerings_of(name: str, common: Sequence[Lowering], own: Mapping[str, Sequence[str]]) -> Sequence[Lowering]:
    return [find_lowering(each) for each in own[name]] if name in own else common


def _lower(name: str, terms: WeightedSum, lowerings: Sequence[Lowering]) -> tuple[WeightedSum, LoweredChain]:
    applied: list[str] = []
    refused: list[tuple[str, Refusal]] = []
    for lowering in lowerings:
        rewritten = lowering.rewrite(terms)
        if isinstance(rewritten, Refusal):
            refused.append((lowering.name, rewritten))
        else:
            terms = rewritten
            applied.append(lowering.name)
    return terms, LoweredChain(name, tuple(applied), tuple(refused))
