import pytest

from sepdeploy.errors import UsageError
from sepdeploy.loading.arch import build_architecture
from sepdeploy.loading.width_argument import WIDTH_NAMES, scaled_architecture

CODE = """
from torch import nn

def factor(classes=10, width_mult=1.0):
    return nn.Conv2d(3, int(8 * width_mult), 3)

def count(width=16):
    return nn.Conv2d(3, width, 3)

def half(multiplier=0.5):
    return nn.Conv2d(3, int(16 * multiplier), 3)

def whole_factor(width=1):
    return nn.Conv2d(3, int(8 * width), 3)

def required(width):
    return nn.Conv2d(3, int(8 * width), 3)

def own_name(base=8):
    return nn.Conv2d(3, base, 3)

def anything(**options):
    return nn.Conv2d(3, int(8 * options.get("alpha", 1)), 3)

def fixed():
    return nn.Conv2d(3, 8, 3)

built = fixed()
"""


@pytest.fixture(autouse=True)
def nets(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("spec", "name", "multiplier", "scaled", "channels"),
    [
        ("nets.py:factor", None, 2.5, "nets.py:factor(width_mult=2.5)", 20),
        ("nets.py:factor(classes=3)", None, 2.5, "nets.py:factor(classes=3, width_mult=2.5)", 20),
        ("nets.py:factor(width_mult=2.0)", None, 1.5, "nets.py:factor(width_mult=3.0)", 24),
        ("nets.py:count", None, 2.625, "nets.py:count(width=42)", 42),
        ("nets.py:count", None, 0.01, "nets.py:count(width=1)", 1),
        ("nets.py:half", None, 3, "nets.py:half(multiplier=1.5)", 24),
        ("nets.py:whole_factor", None, 1.5, "nets.py:whole_factor(width=1.5)", 12),
        ("nets.py:whole_factor", None, 3.0, "nets.py:whole_factor(width=3)", 24),
        ("nets.py:required(width=1)", None, 1.5, "nets.py:required(width=1.5)", 12),
        ("nets.py:own_name", "base", 1.5, "nets.py:own_name(base=12)", 12),
        ("nets.py:anything", "alpha", 1.5, "nets.py:anything(alpha=1.5)", 12),
        ("nets:factor", None, 2.5, "nets:factor(width_mult=2.5)", 20),
    ],
)
def test_scaled_specs_build_scaled_networks(spec, name, multiplier, scaled, channels):
    found = scaled_architecture(spec, name).at(multiplier)
    assert found == scaled
    network = build_architecture(found).module
    assert network.out_channels == channels


@pytest.mark.parametrize("spec", ["nets.py:factor", "nets.py:fixed", "nets.py:built"])
def test_multiplier_one_is_the_spec_itself(spec):
    assert scaled_architecture(spec).at(1) == spec


@pytest.mark.parametrize("spec", ["nets.py:fixed", "nets.py:own_name", "nets.py:built", "nets.py:anything"])
def test_without_such_an_argument_the_sentence_says_what_to_add(spec):
    with pytest.raises(UsageError, match=r"no argument that scales its channels .*--width-argument.*--multiplier 1"):
        scaled_architecture(spec).at(1.5)


def test_an_argument_that_is_not_there():
    with pytest.raises(UsageError, match="has no argument 'width'; it takes classes, width_mult"):
        scaled_architecture("nets.py:factor", "width")


def test_timm_names_are_scaled_by_the_named_argument():
    assert scaled_architecture("timm:resnet18").width_name is None
    assert scaled_architecture("timm:mobilenet", "channel_multiplier").at(0.75) == (
        "timm:mobilenet(channel_multiplier=0.75)"
    )
    assert "channel_multiplier" in WIDTH_NAMES
