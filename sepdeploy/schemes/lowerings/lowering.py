"""What a lowering must offer, why it may refuse, and the registry of all lowerings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from sepdeploy.errors import UsageError

if TYPE_CHECKING:
    from sepdeploy.schemes.weighted import WeightedSum

__all__ = ["LOWERINGS", "Lowering", "Refusal", "find_lowering"]


class Refusal(Enum):
    """Why a lowering leaves a form as it is; the value is the sentence that the user reads."""

    NOT_GROUPED = "it has no grouped convolution"
    EMPTY_GROUP = "one of its padded groups reads no channel at all, so it cannot be a tower"
    NO_TOWERS = "it has no towers that are concatenated"
    TOWERS_DIFFER = "its towers are not equal convolutions of neighbouring channels"
    UNEVEN_TOWERS = "its towers differ in size in a way that no grouped convolution has"
    NO_ZERO_BLOCKS = "none of its kernels consists of more diagonal blocks than it has groups"
    NO_SHUFFLE = "it has no channel shuffle"
    SHUFFLE_IS_SO = "its channel shuffle is written so already"
    UNEVEN_SHUFFLE = "its channel shuffle has rows of unequal length, which a reshape cannot hold"
    SHUFFLE_BETWEEN_KERNELS = "no 1x1 convolution stands next to its channel shuffle"
    NO_TERMS = "it is no sum of several terms"
    TERMS_DIFFER = "its terms are not depthwise convolutions of one geometry, each followed by a 1x1 convolution"
    TERMS_DO_NOT_GROUP = "the groups of its 1x1 convolution would be of unequal size once terms and channels mix"
    TERMS_END_OTHERWISE = "its terms do not all end in dense 1x1 convolutions of one geometry, with a stage before them"
    NO_MULTIPLIER = "it has no depthwise convolution with a channel multiplier that a 1x1 convolution reads"
    NO_NEIGHBOURS = "it has no two 1x1 convolutions in a row"
    PADDED_NEIGHBOUR = "the second of its two 1x1 convolutions pads, which the first cannot do for it"
    NO_NORM = "it has no batch norm between its stages"
    NORM_STANDS_ALONE = "its batch norm has no convolution before or after it to fold into"
    NORM_BEFORE_PADDING = "its batch norm shifts what the convolution after it pads with zeros"
    NOT_GROUPED_THEN_POINTWISE = "it has no grouped convolution with a 1x1 convolution after it"
    NOT_POINTWISE_THEN_GROUPED = "it has no grouped convolution with a 1x1 convolution before it"


class Lowering(Protocol):
    """One way to write a sum of chains down as another that computes the same."""

    @property
    def name(self) -> str:
        """Key in the registry and on the command line."""

    @property
    def summary(self) -> str:
        """What it does, in one line."""

    def rewrite(self, terms: WeightedSum) -> WeightedSum | Refusal:
        """The same function in the other form, wherever in the chains it applies; why not, if it applies nowhere.

        Nothing of `terms` is changed. Outputs agree to rounding, 1e-5 relative in float32.
        """


def _split_groups() -> Lowering:
    from sepdeploy.schemes.lowerings.group_towers import SPLIT_GROUPS

    return SPLIT_GROUPS


def _merge_towers() -> Lowering:
    from sepdeploy.schemes.lowerings.group_towers import MERGE_TOWERS

    return MERGE_TOWERS


def _block_diagonal() -> Lowering:
    from sepdeploy.schemes.lowerings.diagonal_blocks import BLOCK_DIAGONAL

    return BLOCK_DIAGONAL


def _extract_groups() -> Lowering:
    from sepdeploy.schemes.lowerings.diagonal_blocks import EXTRACT_GROUPS

    return EXTRACT_GROUPS


def _shuffle_gather() -> Lowering:
    from sepdeploy.schemes.lowerings.shuffle_formulation import SHUFFLE_GATHER

    return SHUFFLE_GATHER


def _shuffle_channels_last() -> Lowering:
    from sepdeploy.schemes.lowerings.shuffle_formulation import SHUFFLE_CHANNELS_LAST

    return SHUFFLE_CHANNELS_LAST


def _fold_shuffle() -> Lowering:
    from sepdeploy.schemes.lowerings.fold_shuffle import FOLD_SHUFFLE

    return FOLD_SHUFFLE


def _terms_as_multiplier() -> Lowering:
    from sepdeploy.schemes.lowerings.channel_multiplier import TERMS_AS_MULTIPLIER

    return TERMS_AS_MULTIPLIER


def _terms_as_branches() -> Lowering:
    from sepdeploy.schemes.lowerings.channel_multiplier import TERMS_AS_BRANCHES

    return TERMS_AS_BRANCHES


def _terms_as_concat() -> Lowering:
    from sepdeploy.schemes.lowerings.concat_terms import TERMS_AS_CONCAT

    return TERMS_AS_CONCAT


def _merge_pointwise() -> Lowering:
    from sepdeploy.schemes.lowerings.merge_pointwise import MERGE_POINTWISE

    return MERGE_POINTWISE


def _fold_norm() -> Lowering:
    from sepdeploy.schemes.lowerings.fold_norm import FOLD_NORM

    return FOLD_NORM


def _resnext() -> Lowering:
    from sepdeploy.schemes.lowerings.resnext import RESNEXT

    return RESNEXT


def _inception() -> Lowering:
    from sepdeploy.schemes.lowerings.inception import INCEPTION

    return INCEPTION


def _hybrid() -> Lowering:
    from sepdeploy.schemes.lowerings.hybrid import HYBRID

    return HYBRID


LOWERINGS: Mapping[str, Callable[[], Lowering]] = MappingProxyType(
    {
        "split_groups": _split_groups,
        "merge_towers": _merge_towers,
        "block_diagonal": _block_diagonal,
        "extract_groups": _extract_groups,
        "shuffle_gather": _shuffle_gather,
        "shuffle_channels_last": _shuffle_channels_last,
        "fold_shuffle": _fold_shuffle,
        "terms_as_multiplier": _terms_as_multiplier,
        "terms_as_branches": _terms_as_branches,
        "terms_as_concat": _terms_as_concat,
        "merge_pointwise": _merge_pointwise,
        "fold_norm": _fold_norm,
        "resnext": _resnext,
        "inception": _inception,
        "hybrid": _hybrid,
    }
)


def find_lowering(name: str) -> Lowering:
    """The lowering called `name`.

    Raises:
        UsageError: if there is none; the message lists all.

    >>> find_lowering("fold_shuffle").name
    'fold_shuffle'
    """
    if name not in LOWERINGS:
        raise UsageError(f"there is no lowering '{name}'; choose from {', '.join(LOWERINGS)}")
    return LOWERINGS[name]()
