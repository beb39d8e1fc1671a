"""The hyper-parameters of the schemes as options of the command line, for every command that has them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click
from click.core import ParameterSource

from sepdeploy.core.plan import MAX_FACTORS, GroupRounding, Policy, SchemeOptions

__all__ = ["scheme_options"]

_T = TypeVar("_T", bound=Callable[..., Any])


class _Words(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers or words that stand for something, separated by commas if there may be several.

    Args:
        name: How the help writes it.
        parse: From one word to its value; ValueError if it is none.
        is_list: Whether there may be several.
    """

    def __init__(self, name: str, parse: Callable[[str], Any], *, is_list: bool = True) -> None:
        self.name = name
        self._parse = parse
        self._is_list = is_list

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse '8,auto'."""
        try:
            words = [word.strip() for word in str(value).split(",")] if self._is_list else [str(value).strip()]
            parsed = tuple(map(self._parse, words))
        except ValueError:
            self.fail(f"{value!r} is not {self.name}", param, ctx)
        return parsed if self._is_list else parsed[0]


def _kernel(word: str) -> tuple[int, int]:
    height, width = word.lower().split("x")
    return int(height), int(width)


def _or_none(name: str) -> Callable[[str], int | None]:
    return lambda word: None if word == name else int(word)


def _choice(alias: Any) -> click.Choice:  # type: ignore[type-arg]
    return click.Choice(get_args(alias))


_OPTIONS: dict[str, tuple[Any, str, str]] = {
    "terms": (click.IntRange(min=1), "T", "Depthwise-separable pairs per convolution"),
    "rank_ratio": (click.FloatRange(0, 1, min_open=True), "R", "Middle channels of a spatial or low-rank pair, as a "
                   "share of the full rank"),
    "factors": (_Words(f"1 to {MAX_FACTORS} or optimal", _or_none("optimal"), is_list=False), "N|optimal",
                "Convolutions in an optimized-separable chain; 'optimal' takes the N with the fewest weights"),
    "overlap": (float, "GAMMA", "Overlap coefficient of an optimized-separable chain; below 1 outputs do not see "
                "every input channel"),
    "policy": (_choice(Policy), "|".join(get_args(Policy)), "Middle channels of an optimized-separable chain: "
               "min(in, out), (in + out) / 2, max(in, out) / 4, 4 * min(in, out)"),
    "middle_channels": (_Words("N[,N...]", int), "N[,N...]", "The middle channels themselves, instead of --policy"),
    "kernel_position": (click.IntRange(min=1), "L", "Which convolution of an optimized-separable chain has the kernel, "
                        "from 1"),
    "kernel_sizes": (_Words("a list such as 3x1,1x3", _kernel), "HxW,HxW...", "Kernel of each convolution of an "
                     "optimized-separable chain"),
    "groups": (_Words("G[,G...] with auto for those to be found", _or_none("auto")), "G[,G...]",
               "Groups of each convolution of the chain, 'auto' where they are to be found: 8,auto"),
    "min_group_channels": (click.IntRange(min=1), "N", "Fewest channels that a group reads or returns"),
    "group_rounding": (_choice(GroupRounding), "|".join(get_args(GroupRounding)), "Groups that do not divide the "
                       "channels: one channel more in some, the nearest divisor, or filled up with zeros"),
}  # fmt: skip
"""Field of `SchemeOptions` -> type, metavar and help of its option."""


def scheme_options(defaults: SchemeOptions) -> Callable[[_T], _T]:
    """Give a command an option for every hyper-parameter of the schemes.

    The command takes `scheme_options`, a dictionary of those that were given: which of them a scheme reads is for
    `sepdeploy.schemes.read_options` to say.

    Args:
        defaults: What the help names as defaults.
    """

    def decorate(command: _T) -> _T:
        @functools.wraps(command)
        def collecting(**arguments: Any) -> Any:
            context = click.get_current_context()
            values = {name: arguments.pop(name) for name in _OPTIONS}
            given = {
                name: value
                for name, value in values.items()
                if context.get_parameter_source(name) is not ParameterSource.DEFAULT
            }
            _require_consistent(given)
            return command(scheme_options=given, **arguments)

        decorated: Any = collecting
        for name, (kind, metavar, text) in reversed(_OPTIONS.items()):
            help_text = f"{text} ({_default_text(getattr(defaults, name), name)})."
            decorated = click.option(_flag(name), type=kind, metavar=metavar, help=help_text)(decorated)
        return decorated  # type: ignore[no-any-return]

    return decorate


def _require_consistent(given: dict[str, Any]) -> None:
    """Refuse options of which one would silently win over another."""
    for name, other in (("policy", "middle_channels"), ("kernel_position", "kernel_sizes")):
        if name in given and other in given:
            raise click.UsageError(f"{_flag(name)} has no effect beside {_flag(other)}: give one of them")
    counts: dict[str, int] = {name: len(given[name]) for name in ("groups", "kernel_sizes") if name in given}
    if given.get("factors") is not None:
        counts["factors"] = given["factors"]
    if len(given.get("middle_channels", ())) > 1:  # one number stands for all
        counts["middle_channels"] = len(given["middle_channels"]) + 1
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{_flag(name)} {count}" for name, count in counts.items())
        raise click.UsageError(f"a chain cannot have different numbers of convolutions: {found}; make them agree")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _default_text(value: Any, name: str) -> str:
    if name == "factors" and value is None:
        return "default optimal"
    if value is None or value == ():
        return "default: found for each convolution"
    return f"default {value:.3g}" if isinstance(value, float) else f"default {value}"
