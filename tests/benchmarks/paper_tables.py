"""The tables of "Optimized Separable Convolution: Yet Another Efficient Convolution Operator", computed anew.

    python tests/benchmarks/paper_tables.py [--search]

Prints parameters and multiply-accumulates beside those of the paper with the relative difference; for o- rows also what
groups of uneven size cost beside the authors' groups padded to equal size. Table 1 compares formulas with designs.
With --search: all choices among those that the paper leaves open that come within 2% of both numbers of o-DARTS and
o-MobileNet.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from paper_networks import (
    O_DARTS_CIFAR,
    O_DARTS_IMAGENET,
    OSEP,
    TABLES,
    UNEVEN_OSEP,
    Replacement,
    Row,
    network_cost,
    o_mobilenet,
)

from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.core.receptive_field import receptive_field
from sepdeploy.schemes.scheme import find_scheme

CHANNELS, KERNEL, SIZE = 256, 3, 14
"""Of the convolution in table 1: input and output channels, kernel and side of the image in pixels."""

GROUPS = 4

TABLE_1 = (
    ("conventional", "C**2 * K**2", "dense", KERNEL, SchemeOptions()),
    ("grouped", "C**2 * K**2 / g", "grouped", KERNEL, SchemeOptions(groups=(GROUPS,))),
    ("depth-wise", "C * K**2", "depthwise", KERNEL, SchemeOptions()),
    ("point-wise", "C**2", "dense", 1, SchemeOptions()),
    ("depth separable", "C * (C + K**2)", "depthwise_separable", KERNEL, SchemeOptions(terms=1)),
    ("spatial separable", "2 * C**2 * K", "spatial_separable", KERNEL, SchemeOptions(rank_ratio=1 / KERNEL)),
    ("optimized, N = 2, padded", "2 * C**1.5 * K", OSEP.scheme, KERNEL, OSEP.options),
    ("optimized, N = 2, uneven", "2 * C**1.5 * K", OSEP.scheme, KERNEL, UNEVEN_OSEP.options),
    (
        "optimized, optimal N, uneven",
        "e * C * log(C * K**2)",
        OSEP.scheme,
        KERNEL,
        SchemeOptions(factors=None, group_rounding="uneven"),
    ),
)
"""Name, weights as printed, scheme, kernel and options of ours."""

SEARCH_LIMIT = 0.02


def main() -> None:
    if sys.argv[1:] == ["--search"]:
        print_search()
        return
    print_table_1()
    for title, rows in TABLES.items():
        print(f"\n{title}\n{'':31s}{'params M':>9s}{'printed':>9s}{'':>8s}{'GMACs':>10s}{'printed':>9s}")
        for row in rows:
            print(line(row), flush=True)


def print_table_1() -> None:
    print(f"Table 1: {CHANNELS} channels, {KERNEL}x{KERNEL} kernel, {SIZE}x{SIZE} pixels, {GROUPS} groups")
    print(f"{'':31s}{'weights':>9s}{'formula':>9s}{'':>8s}{'MMACs':>10s}{'formula':>9s}{'':>8s}  volumetric field")
    replaced = receptive_field(square_conv(KERNEL).as_factor())
    for name, formula, scheme, kernel, options in TABLE_1:
        form = find_scheme(scheme).design(square_conv(kernel), options)
        names = {"C": CHANNELS, "K": KERNEL, "g": GROUPS, "e": math.e, "log": math.log}
        weights = float(eval(formula, names))
        macs, printed_macs = form.macs((SIZE, SIZE)), weights * SIZE**2
        field = "whole" if receptive_field(form).covers(replaced) else "part of it"
        print(
            f"{name:31s}{form.params:9d}{weights:9.0f}{form.params / weights - 1:+8.1%}"
            f"{macs / 1e6:10.2f}{printed_macs / 1e6:9.2f}{macs / printed_macs - 1:+8.1%}  {field}"
        )


def square_conv(kernel: int) -> ConvSpec:
    return ConvSpec(CHANNELS, CHANNELS, (kernel, kernel), padding=(kernel // 2,) * 4)


def line(row: Row) -> str:
    cost = network_cost(row, row.replacement)
    params_error, *macs_errors = cost.errors(row)
    text = f"{row.name:31s}{cost.params / 1e6:9.3f}{row.params_m:9.3f}{params_error:+8.2%}{cost.macs / 1e9:10.5f}"
    if row.macs_g:
        text += f"{row.macs_g:9.5f}{macs_errors[0]:+8.2%}"
    if row.replacement == OSEP:
        uneven = network_cost(row, UNEVEN_OSEP)
        text += (
            f"  uneven groups: params {uneven.params / cost.params - 1:+.2%}, MACs {uneven.macs / cost.macs - 1:+.2%}"
        )
    return f"{text}  {row.note}".rstrip()


def print_search() -> None:
    widths = (eighths / 8 for eighths in range(8, 21))
    rows = [O_DARTS_CIFAR, O_DARTS_IMAGENET, *(o_mobilenet(*choice) for choice in product(widths, (None, 1024)))]
    for row in rows:
        for replacement in replacements():
            errors = network_cost(row, replacement).errors(row)
            if max(map(abs, errors)) <= SEARCH_LIMIT:
                choices, negation = replacement.options, "" if replacement.has_middle_norm else "no "
                print(
                    f"{row.name}: policy {choices.policy}, kernel in factor {choices.kernel_position}, "
                    f"{negation}middle norm: params {errors[0]:+.2%}, MACs {errors[1]:+.2%}",
                    flush=True,
                )


def replacements() -> Iterator[Replacement]:
    for policy, position, has_norm in product(("normal", "linear", "inverted", "bottleneck"), (1, 2), (False, True)):
        yield Replacement(OSEP.scheme, replace(OSEP.options, policy=policy, kernel_position=position), has_norm)


if __name__ == "__main__":
    main()
