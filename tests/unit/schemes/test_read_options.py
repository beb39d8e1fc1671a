import pytest

from sepdeploy.core.design import FROM_SCRATCH
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.errors import UsageError
from sepdeploy.schemes.read_options import read_options


def test_what_is_not_given_is_the_default():
    assert read_options(["optimized_separable"], {"factors": None, "groups": (8, None)}, FROM_SCRATCH) == SchemeOptions(
        terms=1, rank_ratio=1 / 3, factors=None, groups=(8, None)
    )
    assert read_options(["dense"], {}, SchemeOptions()) == SchemeOptions()


def test_one_reader_among_several_schemes_is_enough():
    assert read_options(["depthwise", "depthwise_separable"], {"terms": 3}, SchemeOptions()).terms == 3


@pytest.mark.parametrize(
    ("schemes", "given", "message"),
    [
        (
            ["depthwise"],
            {"terms": 3},
            "--terms belongs to --scheme depthwise_separable, not to depthwise",
        ),
        (
            ["depthwise_separable", "depthwise"],
            {"rank_ratio": 0.5},
            "--rank-ratio belongs to --scheme spatial_separable or low_rank, not to depthwise_separable, depthwise",
        ),
        (["depthwise"], {"width": 3}, "there is no hyper-parameter 'width'; choose from terms, rank_ratio, factors"),
        (["depthwise_separable"], {"terms": 0}, "--terms must be at least 1"),
        (["magic"], {"terms": 1}, "there is no scheme 'magic'"),
    ],
)
def test_refusals(schemes, given, message):
    with pytest.raises(UsageError) as error:
        read_options(schemes, given, SchemeOptions())
    assert str(error.value).startswith(message)
