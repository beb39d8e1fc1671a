import pytest

from sepdeploy.core.chain import Activation, Chain, ChainSum, Factor, Norm, Shuffle, Slice, Towers
from sepdeploy.errors import UsageError


def pointwise(inputs, outputs, **options):
    return Factor(inputs, outputs, (1, 1), **options)


def test_chains_must_fit():
    with pytest.raises(UsageError, match="a chain needs at least one convolution"):
        Chain((Shuffle(2), Activation("relu")))
    with pytest.raises(UsageError, match="a stage with 6 outputs cannot feed one with 4 inputs"):
        Chain((pointwise(4, 6), Shuffle(2), pointwise(4, 6)))
    with pytest.raises(UsageError, match="a stage with 6 outputs cannot feed one with 8 inputs"):
        Chain((pointwise(4, 6), Norm(8)))
    with pytest.raises(UsageError, match="a stage with 2 outputs cannot feed one with 4 inputs"):
        Chain((Slice(4, 0, 2), Towers((Chain((pointwise(4, 4),)),), "concat")))
    with pytest.raises(UsageError, match="6 channels cannot be shuffled in 7 groups"):
        Chain((pointwise(4, 6), Shuffle(7)))
    with pytest.raises(UsageError, match="must agree in their input and output channels"):
        ChainSum((Chain((pointwise(4, 6),)), Chain((pointwise(4, 8),))))
    with pytest.raises(UsageError, match="must agree"):
        ChainSum(())


def test_towers_must_fit():
    narrow, wide = Chain((pointwise(4, 6),)), Chain((pointwise(4, 8),))
    assert Towers((narrow, wide), "concat").out_channels == 14
    assert Towers((narrow, narrow), "sum").out_channels == 6
    with pytest.raises(UsageError, match="added up must return as many channels each"):
        Towers((narrow, wide), "sum")
    with pytest.raises(UsageError, match="must read the same channels"):
        Towers((narrow, Chain((pointwise(5, 6),))), "concat")
    with pytest.raises(UsageError, match="must read the same channels"):
        Towers((), "concat")


def test_channels_are_known_from_whatever_fixes_them_first():
    assert Chain((Shuffle(2), Activation("relu"), Norm(6), pointwise(6, 4))).in_channels == 6
    assert Chain((Shuffle(2), Slice(8, 1, 4))).in_channels == 8
    assert Chain((pointwise(3, 5), Shuffle(5), Slice(5, 1, 4), Norm(3))).out_channels == 3


def test_cost_of_a_strided_pair_by_hand():
    depthwise = Factor(8, 8, (3, 3), stride=(2, 2), padding=(1, 1, 1, 1), groups=8)
    form = ChainSum((Chain((depthwise, pointwise(8, 16))),) * 2)
    assert form.output_size((9, 8)) == (5, 4)
    assert form.params == 2 * (8 * 9 + 16 * 8)
    assert form.macs((9, 8)) == 2 * 5 * 4 * (8 * 9 + 16 * 8)
    assert (form.in_channels, form.out_channels) == (8, 16)


def test_asymmetric_padding_and_dilation():
    factor = Factor(1, 1, (4, 2), stride=(1, 3), padding=(1, 2, 0, 5), dilation=(1, 2))
    assert factor.output_size((10, 11)) == (10, 5)


def test_cost_before_and_after_a_stride():
    """The second factor is paid at the size that the first one returns."""
    chain = Chain((Factor(4, 6, (3, 1), stride=(2, 1), groups=2), Shuffle(2), Factor(6, 6, (1, 2), groups=3)))
    assert chain.output_size((7, 5)) == (3, 4)
    assert chain.params == 4 * 6 * 3 // 2 + 6 * 6 * 2 // 3
    assert chain.macs((7, 5)) == (3 * 5) * 36 + (3 * 4) * 24


def test_towers_cost_what_their_branches_cost():
    stem = Factor(6, 8, (2, 2), stride=(2, 2))
    branches = (Chain((Slice(8, 0, 5), pointwise(5, 3, has_bias=True))), Chain((Slice(8, 5, 8), Factor(3, 2, (1, 1)))))
    chain = Chain((stem, Towers(branches, "concat"), Norm(5)))
    assert chain.out_channels == 5
    assert chain.params == 6 * 8 * 4 + (15 + 3) + 6 + 10
    assert chain.macs((8, 6)) == (4 * 3) * (6 * 8 * 4 + 15 + 6)
    assert chain.factors == (stem, branches[0].factors[0], branches[1].factors[0])
    assert [type(stage) for stage in chain.leaves()] == [Factor, Slice, Factor, Slice, Factor, Norm]


def test_every_intermediate_is_written_but_norms_and_activations_are_fused():
    stages = (Factor(4, 8, (2, 2)), Norm(8), Activation("relu"), Shuffle(2), pointwise(8, 2))
    chain = Chain(stages)
    written = 8 * 16 + 8 * 16 + 2 * 16  # a 5x5 input gives 4x4
    assert chain.activation_bytes((5, 5)) == 4 * written
    assert chain.activation_bytes((5, 5), bytes_per_value=1) == written
    assert chain.peak_activation_bytes((5, 5), bytes_per_value=1) == 8 * 16 + 8 * 16
    assert Chain(stages[:1]).peak_activation_bytes((5, 5), 1) == 4 * 25 + 8 * 16


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_sum_writes_and_keeps_as_much_as_its_terms_as_towers(count):
    term = Chain((Factor(4, 4, (3, 3), padding=(1, 1, 1, 1), groups=4), pointwise(4, 16)))
    form, chain = ChainSum((term,) * count), Chain((Towers((term,) * count, "sum"),))
    assert form.activation_bytes((2, 3), 1) == 6 * (count * (4 + 16) + (count - 1) * 16)
    assert chain.activation_bytes((2, 3), 1) == form.activation_bytes((2, 3), 1)
    # The pointwise of the last but one term runs beside the sum so far and the input, which the last one still reads.
    peak = 6 * {1: 4 + 16, 2: 16 + 4 + 16, 3: 16 + 4 + 4 + 16}[count]
    assert form.peak_activation_bytes((2, 3), 1) == chain.peak_activation_bytes((2, 3), 1) == peak


def test_the_input_stays_until_the_last_term_has_read_it():
    term = Chain((pointwise(10, 40), pointwise(40, 40), pointwise(40, 1)))
    assert term.peak_activation_bytes((1, 1), 1) == 80
    assert ChainSum((term,)).peak_activation_bytes((1, 1), 1) == 80
    assert ChainSum((term, term)).peak_activation_bytes((1, 1), 1) == 10 + 80
    # Towers inside the first of two terms do not free the input for the second.
    nested = Chain((Towers((term,), "concat"),))
    assert ChainSum((nested, Chain((pointwise(10, 1),)))).peak_activation_bytes((1, 1), 1) == 10 + 80


def test_concatenation_needs_its_parts_and_the_whole():
    towers = Towers((Chain((pointwise(2, 30),)), Chain((pointwise(2, 50),))), "concat")
    assert Chain((towers,)).activation_bytes((1, 1), 1) == 30 + 50 + 80
    assert Chain((towers,)).peak_activation_bytes((1, 1), 1) == 160
    first_large = Towers((Chain((pointwise(9, 100), pointwise(100, 1))), Chain((pointwise(9, 1),))), "concat")
    assert Chain((first_large,)).peak_activation_bytes((1, 1), 1) == 9 + 100 + 1
    second_large = Towers((Chain((pointwise(2, 30),)), Chain((pointwise(2, 100), pointwise(100, 1)))), "concat")
    assert Chain((second_large,)).peak_activation_bytes((1, 1), 1) == 30 + 2 + 100


def test_bias_goes_to_the_last_factor_of_the_first_term():
    term = Chain((pointwise(4, 4, groups=2), Shuffle(2), pointwise(4, 6)))
    form = ChainSum((term, term)).with_output_bias()
    assert [[factor.has_bias for factor in chain.factors] for chain in form.terms] == [[False, True], [False, False]]
    assert form.params == 2 * term.params + 6
    assert form.with_output_bias() == form
    with pytest.raises(UsageError, match="whose first term ends in a convolution"):
        ChainSum((Chain((*term.stages, Norm(6))),)).with_output_bias()
