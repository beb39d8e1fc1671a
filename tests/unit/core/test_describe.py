import pytest

from sepdeploy.core.chain import Activation, Chain, ChainSum, Factor, Norm, Shuffle, Slice, Towers
from sepdeploy.core.describe import describe_field, describe_form

GROUPED = Chain((Factor(16, 16, (3, 3), groups=4), Shuffle(4), Factor(16, 32, (1, 1))))
SPATIAL = Chain((Factor(16, 8, (3, 1)), Factor(8, 32, (1, 3))))


@pytest.mark.parametrize(
    ("terms", "text"),
    [
        ((GROUPED,), "3x3 g4 16, shuffle 4, 1x1 32"),
        ((SPATIAL, SPATIAL), "2 x (3x1 8, 1x3 32)"),
        ((GROUPED, SPATIAL), "(3x3 g4 16, shuffle 4, 1x1 32) + (3x1 8, 1x3 32)"),
        (
            (Chain((Factor(8, 8, (3, 3), groups=8), Norm(8), Activation("relu6"), Factor(8, 4, (1, 1)))),),
            "3x3 dw 8, norm, relu6, 1x1 4",
        ),
        (
            (Chain((Factor(10, 10, (3, 3), groups=4), Factor(10, 7, (1, 1), groups=3, pads_groups=True))),),
            "3x3 g4 uneven 10, 1x1 g3 padded 7",
        ),
    ],
)
def test_forms_in_words(terms, text):
    assert describe_form(ChainSum(terms)) == text


@pytest.mark.parametrize(
    ("join", "text"),
    [
        ("concat", "concat[2 x (slice 8, 3x3 4)], 1x1 6"),
        ("sum", "sum[2 x (slice 8, 3x3 4)], 1x1 6"),
    ],
)
def test_towers_in_words(join, text):
    branches = tuple(Chain((Slice(16, start, start + 8), Factor(8, 4, (3, 3)))) for start in (0, 8))
    out_channels = 8 if join == "concat" else 4
    form = ChainSum((Chain((Towers(branches, join), Factor(out_channels, 6, (1, 1)))),))
    assert describe_form(form) == text


def test_unequal_branches_are_all_named():
    branches = (Chain((Factor(4, 2, (1, 1)),)), Chain((Factor(4, 3, (3, 3), padding=(1, 1, 1, 1)),)))
    assert describe_form(ChainSum((Chain((Towers(branches, "concat"),)),))) == "concat[(1x1 2) | (3x3 3)]"


@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        (Chain((Factor(8, 8, (3, 3), groups=8), Factor(8, 8, (1, 1)))), "sees all 8 channels in a 3x3 window"),
        (Factor(8, 8, (3, 3), groups=4), "sees 2 of 8 channels: the receptive field is broken"),
        (Factor(8, 8, (3, 1)), "misses pixels of the 3x3 window: the receptive field is broken"),
    ],
)
def test_receptive_field_in_words(form, sentence):
    assert describe_field(form, Factor(8, 8, (3, 3))) == sentence
