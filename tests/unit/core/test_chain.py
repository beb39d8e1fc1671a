import pytest

from sepdeploy.core.chain import Chain, ChainSum, Factor, Shuffle
from sepdeploy.errors import UsageError


@pytest.mark.parametrize(
    "change",
    [{"in_channels": 0}, {"out_channels": -4}, {"kernel_size": (0, 3)}, {"stride": (1, 0)}, {"dilation": (0, 1)},
     {"groups": 0}, {"padding": (0, 0, -1, 0)}],
)  # fmt: skip
def test_sizes_that_are_not_positive(change):
    with pytest.raises(UsageError, match="every size of a convolution must be positive"):
        Factor(**({"in_channels": 4, "out_channels": 4, "kernel_size": (3, 3)} | change))


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 6), (6, 4)])
def test_groups_must_divide(inputs, outputs):
    with pytest.raises(UsageError, match=f"4 groups do not divide {inputs} input and {outputs} output"):
        Factor(inputs, outputs, (1, 1), groups=4)


def test_chains_must_fit():
    with pytest.raises(UsageError, match="a chain needs at least one convolution"):
        Chain((Shuffle(2),))
    with pytest.raises(UsageError, match="a factor with 6 outputs cannot feed one with 4 inputs"):
        Chain((Factor(4, 6, (1, 1)), Shuffle(2), Factor(4, 6, (1, 1))))
    with pytest.raises(UsageError, match="must agree in their input and output channels"):
        ChainSum((Chain((Factor(4, 6, (1, 1)),)), Chain((Factor(4, 8, (1, 1)),))))
    with pytest.raises(UsageError, match="must agree"):
        ChainSum(())


def test_cost_of_a_strided_pair_by_hand():
    depthwise = Factor(8, 8, (3, 3), stride=(2, 2), padding=(1, 1, 1, 1), groups=8)
    form = ChainSum((Chain((depthwise, Factor(8, 16, (1, 1)))),) * 2)
    assert form.output_size((9, 8)) == (5, 4)
    assert form.params == 2 * (8 * 9 + 16 * 8)
    assert form.macs((9, 8)) == 2 * 5 * 4 * (8 * 9 + 16 * 8)
    assert (form.in_channels, form.out_channels) == (8, 16)


def test_asymmetric_padding_and_dilation():
    factor = Factor(1, 1, (4, 2), stride=(1, 3), padding=(1, 2, 0, 5), dilation=(1, 2))
    assert factor.output_size((10, 11)) == (10, 5)
