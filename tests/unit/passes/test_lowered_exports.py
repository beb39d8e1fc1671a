"""Every lowering in a file: the runtimes compute what the network did before."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from sepdeploy.bench.session import open_session
from sepdeploy.core.chain import Chain, ChainSum, Factor, Norm, Shuffle
from sepdeploy.core.conv import ConvSpec
from sepdeploy.export.onnx import export_onnx
from sepdeploy.export.tflite import export_tflite
from sepdeploy.passes.lower_chains import lower_chains
from sepdeploy.quantize.inspect_int8 import float_ops_of_tflite
from sepdeploy.schemes.lowerings.lowering import LOWERINGS
from sepdeploy.schemes.module import ChainConv2d

SPEC = ConvSpec(8, 8, (3, 3), padding=(1, 1, 1, 1))
GROUPED = Factor(8, 8, (3, 3), padding=(1, 1, 1, 1), groups=2)
UNEVEN = Factor(8, 8, (3, 3), padding=(1, 0, 1, 2), stride=(1, 1), groups=3)
DEPTHWISE = Factor(8, 8, (3, 3), padding=(1, 1, 1, 1), groups=8)
POINTWISE = Factor(8, 8, (1, 1))


def chain(*stages):
    return ChainSum((Chain(stages),))


CASES = [
    (("split_groups",), chain(UNEVEN)),
    (("split_groups", "merge_towers"), chain(UNEVEN)),
    (("block_diagonal",), chain(GROUPED)),
    (("block_diagonal", "extract_groups"), chain(GROUPED)),
    (("shuffle_channels_last",), chain(GROUPED, Shuffle(4), POINTWISE)),
    (("shuffle_channels_last", "shuffle_gather"), chain(GROUPED, Shuffle(4), POINTWISE)),
    (("fold_shuffle",), chain(UNEVEN, Shuffle(3), Factor(8, 8, (1, 1), groups=3))),
    (("terms_as_multiplier",), ChainSum((Chain((DEPTHWISE, POINTWISE)),) * 2)),
    (("terms_as_concat",), ChainSum((Chain((DEPTHWISE, POINTWISE)),) * 2)),
    (("terms_as_branches",), chain(Factor(8, 16, (3, 3), padding=(1, 1, 1, 1), groups=8), Factor(16, 8, (1, 1)))),
    (("merge_pointwise",), chain(POINTWISE, Shuffle(3), POINTWISE)),
    (("fold_norm",), chain(UNEVEN, Norm(8), Shuffle(2), POINTWISE)),
    (("resnext",), chain(GROUPED, POINTWISE)),
    (("inception",), chain(POINTWISE, GROUPED)),
    (("hybrid",), chain(GROUPED, POINTWISE)),
]


@pytest.fixture(scope="module")
def networks():
    """The forms one after the other, as they were designed and lowered, each by its own."""
    torch.manual_seed(0)
    chains = [ChainConv2d(form, SPEC, bias=True) for _, form in CASES]
    plain = nn.Sequential(*chains).eval()
    lowered = [nn.Sequential(module) for module in chains]
    for (names, _), module in zip(CASES, lowered, strict=True):
        assert lower_chains(module, names)[0].applied == names
    return plain, nn.Sequential(*lowered).eval()


def check(path: Path, plain: nn.Module, is_channels_last: bool) -> None:
    x = torch.randn(1, 8, 10, 10)
    with torch.no_grad():
        expected = plain(x).numpy()
    (found,) = open_session(path, threads=1, is_channels_last=is_channels_last).predict(x.numpy())
    assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-5


def test_every_lowering_has_its_case():
    assert {name for names, _ in CASES for name in names} == set(LOWERINGS)


def test_onnx(networks, tmp_path):
    plain, lowered = networks
    export_onnx(lowered, torch.randn(1, 8, 10, 10), tmp_path / "net.onnx")
    check(tmp_path / "net.onnx", plain, is_channels_last=False)
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node)
    assert ops["Gather"] == 2  # of shuffle_gather and of fold_norm's case
    assert ops["BatchNormalization"] == 0
    assert ops["Transpose"] <= 3  # of shuffle_channels_last


def test_tflite(networks, tmp_path):
    pytest.importorskip("litert_torch", reason="needs sepdeploy[tflite]")
    plain, lowered = networks
    export_tflite(lowered, torch.randn(1, 8, 10, 10), tmp_path / "net.tflite", is_channels_last=True)
    check(tmp_path / "net.tflite", plain, is_channels_last=True)


def test_channels_last_shuffle_is_one_transpose_in_tflite(tmp_path):
    pytest.importorskip("litert_torch", reason="needs sepdeploy[tflite]")
    ops = {}
    for name in ("shuffle_gather", "shuffle_channels_last"):
        network = nn.Sequential(ChainConv2d(chain(GROUPED, Shuffle(4), POINTWISE), SPEC, bias=True)).eval()
        lower_chains(network, (name,))
        export_tflite(network, torch.randn(1, 8, 10, 10), tmp_path / "net.tflite", is_channels_last=True)
        ops[name] = float_ops_of_tflite(tmp_path / "net.tflite")
    assert "GATHER_ND x1" in ops["shuffle_gather"]
    assert ops["shuffle_channels_last"] == ("CONV_2D x2", "TRANSPOSE x1")
