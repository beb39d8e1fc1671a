"""Every scheme names the hyper-parameters that it reads: no more, no fewer."""

import dataclasses

import pytest

from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.schemes.scheme import SCHEMES, find_scheme

FIELDS = {field.name for field in dataclasses.fields(SchemeOptions)}
SPECS = (
    ConvSpec(24, 40, (3, 3), padding=(1, 1, 1, 1)),
    ConvSpec(40, 24, (5, 5), stride=(2, 2)),
    ConvSpec(16, 16, (1, 1)),
)


class Watched:
    """`SchemeOptions` that note what is read."""

    def __init__(self, **changes):
        self._options = SchemeOptions(**changes)
        self.read = set()

    def __getattr__(self, name):
        self.read.add(name)
        return getattr(self._options, name)


@pytest.mark.parametrize("name", SCHEMES)
def test_option_names_are_hyper_parameters(name):
    names = find_scheme(name).option_names
    assert set(names) <= FIELDS
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", SCHEMES)
def test_option_names_are_what_the_design_reads(name):
    scheme = find_scheme(name)
    read = set()
    for spec in SPECS:
        for changes in ({}, {"factors": None}, {"group_rounding": "uneven"}):
            options = Watched(**changes)
            if scheme.check(spec) is None:
                scheme.design(spec, options)
                read |= options.read
    assert read == set(scheme.option_names)


def test_every_hyper_parameter_has_a_reader():
    assert {name for scheme in SCHEMES for name in find_scheme(scheme).option_names} == FIELDS
