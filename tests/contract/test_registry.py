import inspect
import math
import pkgutil

import pytest
import torch

import sepdeploy.schemes
from sepdeploy.core.chain import ChainSum
from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.options import TARGET_TITLES, TARGETS
from sepdeploy.core.plan import Reason, SchemeOptions
from sepdeploy.planning.target import TARGETS_BY_NAME
from sepdeploy.schemes.scheme import SCHEMES, Scheme, find_scheme

SPEC = ConvSpec(8, 8, (3, 3), padding=(1, 1, 1, 1))


@pytest.mark.parametrize("name", SCHEMES)
def test_key_is_the_schemes_name(name):
    scheme = find_scheme(name)
    assert scheme.name == name
    assert scheme is find_scheme(name)
    assert scheme.summary
    assert "\n" not in scheme.summary
    assert scheme.prefix == "" or scheme.prefix.endswith("-")


@pytest.mark.parametrize("name", SCHEMES)
def test_complexity_is_a_formula(name):
    names = {"C": 64, "K": 3, "T": 2, "r": 16, "g": 4, "e": math.e, "log": math.log}
    assert eval(find_scheme(name).complexity, {"__builtins__": {}}, names) > 0


@pytest.mark.parametrize("name", SCHEMES)
def test_scheme_satisfies_the_protocol(name):
    scheme = find_scheme(name)
    for method in ("check", "design", "alternatives", "factorize"):
        ours, theirs = (inspect.signature(getattr(owner, method)) for owner in (type(scheme), Scheme))
        assert list(ours.parameters) == list(theirs.parameters)
        assert [p.default for p in ours.parameters.values()] == [p.default for p in theirs.parameters.values()]
    reason = scheme.check(SPEC)
    assert reason is None or isinstance(reason, Reason)
    form = scheme.design(SPEC, SchemeOptions())
    assert isinstance(form, ChainSum)
    assert all(isinstance(other, ChainSum) for other in scheme.alternatives(SPEC, SchemeOptions()))
    weights = scheme.factorize(torch.ones(8, 8, 3, 3), form)
    assert [len(term) for term in weights] == [len(chain.factors) for chain in form.terms]


def test_every_scheme_file_is_registered():
    files = {module.name for module in pkgutil.iter_modules(sepdeploy.schemes.__path__)}
    with_scheme = {
        name for name in files if hasattr(__import__(f"sepdeploy.schemes.{name}", fromlist=["SCHEME"]), "SCHEME")
    }
    assert with_scheme == set(SCHEMES)


def test_registry_is_read_only():
    with pytest.raises(TypeError):
        SCHEMES["mine"] = None


def test_targets_have_the_same_names_everywhere():
    assert set(TARGETS) == set(TARGET_TITLES) == set(TARGETS_BY_NAME)
    for name, file_format in TARGETS.items():
        kind = TARGETS_BY_NAME[name]()
        assert (kind.name, kind.format) == (name, file_format)
