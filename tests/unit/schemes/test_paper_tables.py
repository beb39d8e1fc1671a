"""The networks of "Optimized Separable Convolution" have the parameters and MACs that its tables print."""

import paper_networks as paper
import pytest

TOLERANCE = 0.005
"""The tables round to three or four digits, or cut them off."""

EXCEPTIONS = {
    "d-ResNet20 x2.75": 0.025,  # the parameters fit, the MACs are 2.4% less; the paper prints it as x2.72
    "o-ResNet32 x5.75": 0.0125,  # 0.7% and 1.2% less: nothing was found that fits this row and the others
    "o-DARTS, 42 channels": 0.0175,  # 1.0% and 1.6% less; with 56 channels, on ImageNet, it fits
    "MobileNet": 0.0125,  # MobileNet's own paper counts 569 M MACs, which are met exactly, not 575
}

ROWS = [row for rows in paper.TABLES.values() for row in rows]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_params_and_macs_are_those_printed(row) -> None:
    errors = paper.network_cost(row, row.replacement).errors(row)

    assert max(map(abs, errors)) <= EXCEPTIONS.get(row.name, TOLERANCE), errors


def test_all_rows_are_there() -> None:
    """Table 6 and one row from section 3.1."""
    counts = {title.partition(":")[0]: len(rows) for title, rows in paper.TABLES.items()}

    assert counts == {"Table 3": 2, "Table 5": 4, "Table 6": 12 + 1, "Table 7": 8}
    assert set(EXCEPTIONS) < {row.name for row in ROWS}


@pytest.mark.parametrize("row", [row for row in ROWS if row.replacement == paper.OSEP], ids=str)
def test_groups_of_uneven_size_take_fewer_macs_than_padded_ones(row) -> None:
    uneven = paper.network_cost(row, paper.UNEVEN_OSEP)

    assert uneven.macs < paper.network_cost(row, paper.OSEP).macs


def test_a_middle_norm_adds_a_scale_and_a_shift_per_channel() -> None:
    """That is what makes the d- rows fit."""
    row = next(row for row in ROWS if row.replacement == paper.DSEP)
    without = paper.Replacement(paper.DSEP.scheme, paper.DSEP.options)

    with_norm, plain = paper.network_cost(row, paper.DSEP), paper.network_cost(row, without)

    read = 7 * 44 + 6 * 88 + 5 * 176  # input channels of the 18 convolutions
    assert with_norm.params - plain.params == 2 * read
    assert with_norm.macs == plain.macs
