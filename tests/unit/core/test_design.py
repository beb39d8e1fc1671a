from dataclasses import replace

import pytest

from sepdeploy.core.chain import Chain, ChainSum, Factor, Shuffle
from sepdeploy.core.describe import describe_form
from sepdeploy.core.design import DesignOptions, with_middle
from sepdeploy.errors import UsageError

CHAIN = Chain(
    (
        Factor(16, 16, (3, 3), groups=4),
        Shuffle(4),
        Factor(16, 12, (1, 1), groups=2),
        Shuffle(2),
        Factor(12, 32, (1, 1), groups=2),
    )
)
PAIR = Chain((Factor(16, 8, (3, 1)), Factor(8, 32, (1, 3))))


@pytest.mark.parametrize(
    ("middle", "text"),
    [
        ("linear", "3x3 g4 16, shuffle 4, 1x1 g2 12, shuffle 2, 1x1 g2 32"),
        ("norm", "3x3 g4 16, norm, shuffle 4, 1x1 g2 12, norm, shuffle 2, 1x1 g2 32"),
        ("norm_activation", "3x3 g4 16, norm, silu, shuffle 4, 1x1 g2 12, norm, silu, shuffle 2, 1x1 g2 32"),
    ],
)
def test_the_middle_leaves_the_last_convolution_linear(middle, text):
    assert describe_form(with_middle(ChainSum((CHAIN,)), middle, "silu")) == text


def test_every_term_gets_its_own_norms():
    form = with_middle(ChainSum((PAIR, PAIR)), "norm")
    assert describe_form(form) == "2 x (3x1 8, norm, 1x3 32)"
    assert form.params == ChainSum((PAIR, PAIR)).params + 2 * 2 * 8


def test_a_single_convolution_has_no_middle():
    form = ChainSum((Chain((Factor(8, 8, (3, 3), groups=8),)),))
    assert with_middle(form, "norm_activation") == form


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("match", "latency", "there is no 'latency'; choose one of macs, params, both"),
        ("middle", "relu", "there is no 'relu'; choose one of linear"),
        ("activation", "tanh", "there is no 'tanh'; choose one of relu"),
        ("input_shape", (3, 0, 32), "--input-shape"),
        ("seed", -1, "--seed"),
        ("multiplier", 0.0, "--multiplier must be above 0"),
        ("multiplier", float("nan"), "--multiplier must be above 0"),
        ("step", -1.0, "--step must be above 0"),
    ],
)
def test_options_are_checked(field, value, part):
    with pytest.raises(UsageError, match=part):
        replace(DesignOptions("a:b"), **{field: value})
