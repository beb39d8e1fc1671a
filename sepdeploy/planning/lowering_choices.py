"""Which ways to write a form down are worth measuring in which kind of file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from torch import nn

from sepdeploy.core.artifact import Format, Precision
from sepdeploy.core.chain import ChainSum, Norm, Shuffle
from sepdeploy.core.conv import ConvSpec
from sepdeploy.errors import ContractError
from sepdeploy.passes.lower_chains import DEFAULT_LOWERINGS, lower_chains
from sepdeploy.schemes.module import ChainConv2d

__all__ = ["lowering_choices"]

_ALTERNATIVES: Mapping[tuple[Format, Precision], tuple[tuple[str, ...], ...]] = MappingProxyType(
    {
        (Format.ONNX, Precision.FLOAT32): (("fold_shuffle",), ("shuffle_channels_last",), ("terms_as_multiplier",)),
        (Format.ONNX, Precision.INT8): (
            ("shuffle_gather",),
            ("shuffle_channels_last",),
            ("split_groups",),
            ("fold_shuffle", "split_groups"),
            ("terms_as_multiplier",),
        ),
        (Format.TFLITE, Precision.FLOAT32): (("fold_shuffle",), ("terms_as_multiplier",)),
        (Format.TFLITE, Precision.INT8): (("fold_shuffle",), ("terms_as_multiplier",)),
    }
)
"""Besides the default, and after norms are folded.

Towers are for int8 in ONNX Runtime alone: its grouped convolutions are slow there, and in TFLite towers are slower yet.
"""

_MOST_TOWERS = 16
"""More convolutions than this in place of one cost more in calls than they can save."""


@cache
def lowering_choices(form: ChainSum, file_format: Format, precision: Precision) -> tuple[tuple[str, ...], ...]:
    """Ways to write `form` down, each with another result; the first is the default of that kind of file.

    Only lowerings that change something are listed; a form that none of them changes has the one way ().
    """
    possible = _possible(form)
    lowered, applied = _lowered(form, tuple(n for n in DEFAULT_LOWERINGS[file_format, precision] if n in possible))
    choices = {lowered: applied}
    for names in _ALTERNATIVES[file_format, precision]:
        if names[-1] not in possible:
            continue
        start, applied = _lowered(form, tuple(n for n in ("fold_norm", *names[:-1]) if n in possible))
        if names[-1] == "split_groups" and not _suits_towers(start):
            continue
        lowered, changed = _lowered(start, names[-1:])
        # A form whose shuffle is a gather already is lowered to what it is: another result than a folded one.
        if changed or names[-1] == "shuffle_gather":
            choices.setdefault(lowered, (*applied, *changed))
    return tuple(choices.values())


def _possible(form: ChainSum) -> set[str]:
    """Lowerings that have something to change, by a look at the form: trying one takes much longer."""
    stages = [stage for chain in form.terms for stage in chain.leaves()]
    possible = {"terms_as_multiplier", "terms_as_concat"} if len(form.terms) > 1 else set()
    if any(isinstance(stage, Norm) for stage in stages):
        possible.add("fold_norm")
    if any(isinstance(stage, Shuffle) for stage in stages):
        possible |= {"fold_shuffle", "shuffle_gather", "shuffle_channels_last"}
    if any(factor.groups > 1 for chain in form.terms for factor in chain.factors):
        possible.add("split_groups")
    return possible


def _lowered(form: ChainSum, names: tuple[str, ...]) -> tuple[ChainSum, tuple[str, ...]]:
    """The form with the lowerings applied, whatever its weights, and those of them that changed it."""
    if not names:
        return form, ()
    spec = ConvSpec(form.in_channels, form.out_channels, (1, 1))
    network = nn.Sequential(ChainConv2d(form, spec, bias=False))
    (lowered,) = lower_chains(network, names)
    (module,) = network
    if not isinstance(module, ChainConv2d):
        raise ContractError(f"a chain was lowered to a {type(module).__name__}")
    return module.form, lowered.applied


def _suits_towers(form: ChainSum) -> bool:
    """Whether no convolution would become too many, or be cut into single channels, as a depthwise one would."""
    grouped = [factor for chain in form.terms for factor in chain.factors if factor.groups > 1]
    return all(factor.groups <= _MOST_TOWERS and factor.in_per_group > 1 for factor in grouped)
