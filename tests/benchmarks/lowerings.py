"""How fast the lowerings of a few separable forms are, as ratios to the form as it was designed.

    python tests/benchmarks/lowerings.py [--seconds S] [--channels N] [--runtime onnx|tflite]

Each block is a 3x3 convolution of a separable form with a ReLU, between two 1x1 convolutions that give it realistic
neighbours. Every lowering of a form computes the same function. Prints, for each runtime and precision, the median
speed-up over the form as it was designed and its 95% interval; all lowerings of a row are interleaved in one run on one
thread. 'dense' is the convolution itself, for comparison.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sepdeploy.bench.environment import environment
from sepdeploy.bench.session import open_session
from sepdeploy.bench.timing import measure
from sepdeploy.core.chain import Chain, ChainSum, Factor, Norm, Shuffle
from sepdeploy.core.conv import ConvSpec
from sepdeploy.export.onnx import export_onnx
from sepdeploy.export.tflite import export_tflite
from sepdeploy.passes.lower_chains import lower_chains
from sepdeploy.quantize.onnx_qdq import quantize_onnx
from sepdeploy.quantize.tflite_int8 import quantize_tflite
from sepdeploy.schemes.module import ChainConv2d

SHAPES = ((64, 32), (128, 28), (256, 14))
KINDS = {"onnx": ("onnx", "int8.onnx"), "tflite": ("tflite", "int8.tflite")}


def shuffled(channels: int) -> ChainSum:
    """Grouped 3x3, batch norm, shuffle, grouped 1x1: an optimized-separable convolution."""
    first = Factor(channels, channels, (3, 3), padding=(1, 1, 1, 1), groups=8)
    last = Factor(channels, channels, (1, 1), groups=channels // 8)
    return ChainSum((Chain((first, Norm(channels), Shuffle(8), last)),))


def uneven(channels: int) -> ChainSum:
    """The same with groups that do not divide the channels."""
    (first, norm, _, last) = shuffled(channels).terms[0].stages
    assert isinstance(first, Factor)
    return ChainSum((Chain((replace(first, groups=7), norm, Shuffle(7), last)),))


def terms(channels: int) -> ChainSum:
    """Two depthwise-separable terms."""
    depthwise = Factor(channels, channels, (3, 3), padding=(1, 1, 1, 1), groups=channels)
    return ChainSum((Chain((depthwise, Factor(channels, channels, (1, 1)))),) * 2)


def grouped(channels: int) -> ChainSum:
    """Grouped 3x3, dense 1x1."""
    first = Factor(channels, channels, (3, 3), padding=(1, 1, 1, 1), groups=8)
    return ChainSum((Chain((first, Factor(channels, channels, (1, 1)))),))


FORMS = {
    "shuffled": (
        shuffled,
        (
            ("fold_norm", "shuffle_gather"),
            ("fold_norm", "shuffle_channels_last"),
            ("fold_norm", "fold_shuffle"),
            ("fold_norm", "split_groups"),
            ("fold_norm", "fold_shuffle", "block_diagonal"),
        ),
    ),
    "uneven": (uneven, (("fold_norm", "shuffle_gather"), ("fold_norm", "fold_shuffle"), ("fold_norm", "split_groups"))),
    "terms": (terms, (("terms_as_multiplier",),)),
    "grouped": (grouped, (("split_groups",), ("block_diagonal",), ("resnext",), ("hybrid",))),
}


def lowered(form: ChainSum, names: tuple[str, ...]) -> nn.Module:
    """The block with one lowering of the form in the middle; the same weights for all."""
    torch.manual_seed(0)
    channels = form.in_channels
    spec = ConvSpec(channels, channels, (3, 3), padding=(1, 1, 1, 1))
    network = block(ChainConv2d(form, spec, bias=True), channels)
    lower_chains(network, names)
    return network


def block(middle: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 1), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(channels, channels, 1)
    ).eval()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=1.0, help="per file")
    parser.add_argument("--channels", type=int, choices=[channels for channels, _ in SHAPES], help="one shape only")
    parser.add_argument("--runtime", choices=KINDS, help="one runtime only")
    options = parser.parse_args()
    print(environment("onnxruntime and ai-edge-litert", 1))
    for channels, size in SHAPES:
        if options.channels in (None, channels):
            for name, (make, lowerings) in FORMS.items():
                networks = {"as designed": lowered(make(channels), ())}
                networks |= {"+".join(names): lowered(make(channels), names) for names in lowerings}
                networks["dense"] = block(nn.Conv2d(channels, channels, 3, padding=1), channels)
                for runtime in [options.runtime] if options.runtime else KINDS:
                    compare(f"{name} {channels} channels {size}x{size}", networks, size, runtime, options.seconds)


def compare(title: str, networks: dict[str, nn.Module], size: int, runtime: str, seconds: float) -> None:
    """Print how fast each network is beside the first, in float32 and int8."""
    with tempfile.TemporaryDirectory() as folder:
        bases = {name: Path(folder) / str(number) for number, name in enumerate(networks)}
        for name, network in networks.items():
            export(network, size, bases[name], runtime)
        for kind in KINDS[runtime]:
            sessions = {name: open_session(Path(f"{base}.{kind}")) for name, base in bases.items()}
            results = measure(sessions, reference="as designed", threads=1, seconds=seconds)
            print(f"{title} {kind}: as designed {results['as designed'].median_ms:.3f} ms")
            for name, latency in results.items():
                if latency.speedup is not None:
                    low, high = latency.speedup_low, latency.speedup_high
                    print(f"    {name:45s} {latency.speedup:.2f}x ({low:.2f}-{high:.2f})", flush=True)


def export(network: nn.Module, size: int, base: Path, runtime: str) -> None:
    channels = network[0].in_channels
    example = torch.randn(1, channels, size, size)
    images = [np.random.default_rng(i).standard_normal((1, channels, size, size)).astype(np.float32) for i in range(4)]
    source, target = (Path(f"{base}.{kind}") for kind in KINDS[runtime])
    if runtime == "onnx":
        export_onnx(network, example, source)
        quantize_onnx(source, target, images)
    else:
        export_tflite(network, example, source, is_channels_last=True)
        quantize_tflite(source, target, [x.transpose(0, 2, 3, 1) for x in images])


if __name__ == "__main__":
    main()
