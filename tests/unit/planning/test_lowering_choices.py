from __future__ import annotations

import pytest
import torch
from torch import nn

from sepdeploy.core.artifact import Format, Precision
from sepdeploy.core.chain import Chain, ChainSum, Factor, Norm, Shuffle
from sepdeploy.core.conv import ConvSpec
from sepdeploy.passes.lower_chains import DEFAULT_LOWERINGS, lower_chains
from sepdeploy.planning.lowering_choices import lowering_choices
from sepdeploy.schemes.module import ChainConv2d

KxK = {"kernel_size": (3, 3), "padding": (1, 1, 1, 1)}
FORMS = {
    "dense": ChainSum((Chain((Factor(16, 16, **KxK),)),)),
    "low_rank": ChainSum((Chain((Factor(16, 4, **KxK), Factor(4, 16, (1, 1)))),)),
    "terms": ChainSum((Chain((Factor(16, 16, groups=16, **KxK), Factor(16, 16, (1, 1)))),) * 2),
    "shuffled": ChainSum((Chain((Factor(16, 16, groups=4, **KxK), Shuffle(4), Factor(16, 16, (1, 1), groups=2))),)),
    "normed": ChainSum((Chain((Factor(16, 16, groups=16, **KxK), Norm(16), Factor(16, 16, (1, 1)))),)),
    "many_groups": ChainSum((Chain((Factor(64, 64, groups=32, **KxK), Factor(64, 64, (1, 1)))),)),
    "uneven": ChainSum((Chain((Factor(16, 16, groups=3, **KxK), Shuffle(3), Factor(16, 16, (1, 1), groups=3))),)),
}
KINDS = tuple(DEFAULT_LOWERINGS)


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("dense", (Format.ONNX, Precision.INT8), {()}),
        ("low_rank", (Format.ONNX, Precision.FLOAT32), {()}),
        ("terms", (Format.ONNX, Precision.FLOAT32), {(), ("terms_as_multiplier",)}),
        ("terms", (Format.TFLITE, Precision.INT8), {("terms_as_concat",), ("terms_as_multiplier",)}),
        ("shuffled", (Format.ONNX, Precision.FLOAT32), {(), ("fold_shuffle",), ("shuffle_channels_last",)}),
        ("shuffled", (Format.TFLITE, Precision.FLOAT32), {("shuffle_channels_last",), ("fold_shuffle",)}),
        (
            "shuffled",
            (Format.ONNX, Precision.INT8),
            {(), ("fold_shuffle",), ("shuffle_channels_last",), ("split_groups",), ("fold_shuffle", "split_groups")},
        ),
        ("normed", (Format.ONNX, Precision.INT8), {("fold_norm",)}),
        ("many_groups", (Format.ONNX, Precision.INT8), {()}),
        ("uneven", (Format.TFLITE, Precision.INT8), {(), ("fold_shuffle",)}),
    ],
)
def test_what_makes_sense(name, kind, expected) -> None:
    choices = lowering_choices(FORMS[name], *kind)
    assert set(choices) == expected
    assert len(choices) == len(expected)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_is_what_files_are_made_with_and_all_differ(name, kind) -> None:
    form = FORMS[name]
    spec = ConvSpec(form.in_channels, form.out_channels, (3, 3), padding=(1, 1, 1, 1))
    choices = lowering_choices(form, *kind)

    def lowered(names) -> ChainConv2d:
        torch.manual_seed(0)
        network = nn.Sequential(ChainConv2d(form, spec, bias=True).eval())
        (done,) = lower_chains(network, names)
        assert names == DEFAULT_LOWERINGS[kind] or done.applied == names  # each of them changes something
        return network[0]

    modules = [lowered(names) for names in choices]
    assert modules[0].form == lowered(DEFAULT_LOWERINGS[kind]).form
    assert len({module.form for module in modules}) == len(modules)
    x = torch.randn(1, form.in_channels, 5, 5)
    with torch.no_grad():
        assert all(torch.allclose(module(x), modules[0](x), atol=1e-4) for module in modules)
