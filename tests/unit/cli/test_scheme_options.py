import click
import pytest
from click.testing import CliRunner

from sepdeploy.cli.scheme_options import scheme_options
from sepdeploy.core.plan import SchemeOptions


def given(*arguments):
    """What a command gets, or the sentence that it is refused with."""
    seen = []

    @click.command()
    @scheme_options(SchemeOptions())
    @click.option("--other", default=3)
    def command(scheme_options, other):
        seen.append((scheme_options, other))

    result = CliRunner().invoke(command, arguments)
    return seen[0][0] if result.exit_code == 0 else result.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--other", "4"], {}),
        (["--terms", "2"], {"terms": 2}),  # the default, but given
        (["--factors", "3"], {"factors": 3}),
        (["--factors", "optimal"], {"factors": None}),
        (["--groups", "8,auto"], {"groups": (8, None)}),
        (["--groups", "16"], {"groups": (16,)}),
        (["--kernel-sizes", "3x1, 1X3"], {"kernel_sizes": ((3, 1), (1, 3))}),
        (["--middle-channels", "32,48"], {"middle_channels": (32, 48)}),
        (["--policy", "bottleneck", "--overlap", "0.25"], {"policy": "bottleneck", "overlap": 0.25}),
        (
            ["--kernel-position", "2", "--min-group-channels", "8", "--group-rounding", "padded"],
            {"kernel_position": 2, "min_group_channels": 8, "group_rounding": "padded"},
        ),
        (["--rank-ratio", "0.5"], {"rank_ratio": 0.5}),
    ],
)
def test_only_what_is_given_reaches_the_command(arguments, expected):
    assert given(*arguments) == expected
    SchemeOptions(**expected)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--factors", "many"], "'many' is not 1 to 12 or optimal"),
        (["--groups", "8,some"], "'8,some' is not G[,G...]"),
        (["--groups", ","], "is not G[,G...]"),
        (["--kernel-sizes", "3"], "'3' is not a list such as 3x1,1x3"),
        (["--kernel-sizes", "3x1x1"], "is not a list such as 3x1,1x3"),
        (["--middle-channels", "half"], "'half' is not N[,N...]"),
        (["--policy", "magic"], "'magic' is not one of"),
        (["--group-rounding", "up"], "'up' is not one of"),
        (["--rank-ratio", "0"], "--rank-ratio"),
        (["--terms", "0"], "--terms"),
    ],
)
def test_what_is_none_is_refused(arguments, part):
    assert part in given(*arguments)
