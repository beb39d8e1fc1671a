"""What separable forms are worth on Arm cores, by modelled cycles.

    python tests/benchmarks/arm.py blocks --results arm.jsonl [--cores cortex-a72,cortex-a76] [--shapes 64@32,256@8]
    python tests/benchmarks/arm.py plans ../shared --results plans.jsonl [--cores cortex-a72] [--nets resnet20,vgg_like]

`blocks`: four units one after the other, each a 3x3 convolution or a separable form of it with a ReLU, on every core,
in both runtimes and precisions, in every lowering that has another result there. The table at the end has the low and
the high estimate; where an earlier measurement of the same units is known, the ratio to dense is compared with it.

`plans`: what `sepdeploy plan` chooses for whole networks in int8 LiteRT, exported and counted as a whole, beside the
original and uniform forms; at the damage of each uniform form and at several points of the front.

Rows are appended as they are finished and not counted again when the script is repeated with the same file. Counts do
not depend on what else runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import selection
import torch
from torch import nn

from sepdeploy.bench.arm_cores import ARM_CORES, find_core
from sepdeploy.bench.arm_counts import count_files
from sepdeploy.core.artifact import Format, Precision
from sepdeploy.core.chain import Chain, ChainSum, Factor, Shuffle
from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.progress import Silent
from sepdeploy.export.onnx import export_onnx
from sepdeploy.export.tflite import export_tflite
from sepdeploy.passes.lower_chains import lower_chains
from sepdeploy.planning.fused_block import dense_form
from sepdeploy.planning.lowering_choices import lowering_choices
from sepdeploy.quantize.onnx_qdq import quantize_onnx
from sepdeploy.quantize.tflite_int8 import quantize_tflite
from sepdeploy.schemes.fresh_weights import draw_weights
from sepdeploy.schemes.module import ChainConv2d

SHAPES = ("64@32", "128@16", "256@8")
UNITS = 4
RUNTIMES = {"ort": Format.ONNX, "litert": Format.TFLITE}

# Measured before this program was written, with other tools:
# core, shape, runtime, precision -> kilocycles (low) of dense, depthwise separable, o-sep g4, g8, g16.
PUBLISHED = {
    ("cortex-a72", "64@32", "litert", "float32"): (39955, 6229, 14130, 9099, 10362),
    ("cortex-a72", "64@32", "litert", "int8"): (20997, 3756, 9203, 6188, 11637),
    ("cortex-a72", "64@32", "ort", "int8"): (23346, 5200),
    ("cortex-a72", "128@16", "litert", "int8"): (19983, 2899, 7055, 4413, 2891),
    ("cortex-a72", "256@8", "litert", "float32"): (38357, 4715, 11369, 6092, 3505),
    ("cortex-a72", "256@8", "litert", "int8"): (19509, 2499, 6104, 3440, 2161),
    ("cortex-a72", "256@8", "ort", "int8"): (19967, 2967),
    ("cortex-a76", "64@32", "litert", "int8"): (5361, 1669, 2945, 4182, 6550),
    ("cortex-a76", "128@16", "litert", "int8"): (5055, 1084, 2041, 1363, 1971),
    ("cortex-a76", "256@8", "litert", "float32"): (19741, 2434, 5822, 3166, 1790),
    ("cortex-a76", "256@8", "litert", "int8"): (4917, 804, 1656, 976, 653),
    ("cortex-a76", "256@8", "ort", "int8"): (5640, 1042),
}
PUBLISHED_FORMS = ("dense", "depthwise separable", "o-sep g4", "o-sep g8", "o-sep g16")
# How those wrote the shuffle down; in ONNX files it was a view in NCHW, which no lowering here writes.
PUBLISHED_LOWERING = {"ort": (), "litert": ("shuffle_channels_last",)}


@dataclass(frozen=True)
class Row:
    """Four units on one core."""

    core: str
    shape: str
    runtime: str
    precision: str
    form: str
    lowering: str
    instructions: int
    macs: int
    l1_misses: int
    l2_misses: int
    kcycles_low: float
    kcycles_high: float
    versions: str

    @property
    def key(self):
        return (self.core, self.shape, self.runtime, self.precision, self.form, self.lowering)


def forms(channels):
    """Name -> form of a 3x3 convolution."""
    spec = ConvSpec(channels, channels, (3, 3), padding=(1, 1, 1, 1))
    pad = (1, 1, 1, 1)
    depthwise = Factor(channels, channels, (3, 3), padding=pad, groups=channels)
    pointwise = Factor(channels, channels, (1, 1))
    middle = channels // 2
    down, along = (
        Factor(channels, middle, (3, 1), padding=(1, 1, 0, 0)),
        Factor(middle, channels, (1, 3), padding=(0, 0, 1, 1)),
    )
    found = {
        "dense": dense_form(spec),
        "depthwise separable": ChainSum((Chain((depthwise, pointwise)),)),
        "depthwise separable T=2": ChainSum((Chain((depthwise, pointwise)),) * 2),
        "spatial separable": ChainSum((Chain((down, along)),)),
    }
    for groups in (4, 8, 16):
        first = Factor(channels, channels, (3, 3), padding=pad, groups=groups)
        last = Factor(channels, channels, (1, 1), groups=groups)
        found[f"o-sep g{groups}"] = ChainSum((Chain((first, Shuffle(groups), last)),))
    return spec, found


def units(spec, form, lowering):
    """Four of them with ReLUs, in eval mode, with weights that keep the values' variance."""
    torch.manual_seed(0)
    layers = []
    for _ in range(UNITS):
        conv = ChainConv2d(form, spec, bias=True)
        draw_weights(conv, 1.0, 0.1 * torch.randn(spec.out_channels))
        layers += [conv, nn.ReLU()]
    network = nn.Sequential(*layers).eval().requires_grad_(False)
    lower_chains(network, lowering)
    return network


def write(network, example, base, file_format, precision):
    """Its file."""
    path = base.with_suffix(f".{file_format.value}")
    images = [torch.randn(example.shape, generator=torch.Generator().manual_seed(i)).numpy() for i in range(4)]
    if file_format is Format.ONNX:
        export_onnx(network, example, path)
    else:
        export_tflite(network, example, path, is_channels_last=True)
        images = [image.transpose(0, 2, 3, 1) for image in images]
    if precision is Precision.FLOAT32:
        return path
    quantized = path.with_suffix(f".int8{path.suffix}")
    (quantize_onnx if file_format is Format.ONNX else quantize_tflite)(path, quantized, iter(images))
    return quantized


def written_forms(channels, runtime, precision):
    """(name of a form, lowering) for all that has another result, what PUBLISHED has, and terms as branches."""
    for name, form in forms(channels)[1].items():
        choices = dict.fromkeys(lowering_choices(form, RUNTIMES[runtime], precision))
        if name.startswith("o-sep"):
            choices |= {PUBLISHED_LOWERING[runtime]: None}
        if len(form.terms) > 1:
            choices |= {(): None}
        for lowering in choices:
            yield name, form, lowering


def count_blocks(arguments):
    known = read(arguments.results)
    with tempfile.TemporaryDirectory() as folder:
        for shape in arguments.shapes.split(","):
            channels, size = map(int, shape.split("@"))
            example = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))
            spec, _ = forms(channels)
            for runtime in arguments.runtimes.split(","):
                for precision in map(Precision, arguments.precisions.split(",")):
                    wanted = arguments.forms and arguments.forms.split(",")
                    todo = [e for e in written_forms(channels, runtime, precision) if not wanted or e[0] in wanted]
                    cores = [c for c in arguments.cores.split(",") if not all(
                        (c, shape, runtime, precision.value, name, "+".join(lowering)) in known
                        for name, _, lowering in todo
                    )]  # fmt: skip
                    if not cores:
                        continue
                    print(f"writing {len(todo)} networks: {shape} {runtime} {precision.value}", flush=True)
                    paths = [
                        write(units(spec, form, lowering), example, Path(folder) / str(i), RUNTIMES[runtime], precision)
                        for i, (_, form, lowering) in enumerate(todo)
                    ]
                    for core in cores:
                        print(f"counting on {core}", flush=True)
                        counted = count_files(find_core(core), paths, Silent(), repeats=2, warmup=1)
                        for (name, _, lowering), counts in zip(todo, counted, strict=True):
                            if isinstance(counts, str):
                                print(f"  {name} {lowering}: {counts}")
                                continue
                            append(arguments.results, Row(
                                core, shape, runtime, precision.value, name, "+".join(lowering),
                                counts.instructions, counts.macs, counts.l1_misses, counts.l2_misses,
                                counts.kcycles_low, counts.kcycles_high, counts.environment.runtime,
                            ))  # fmt: skip


def read(path):
    """Key -> row of what was finished before."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return {row.key: row for row in rows}


def append(path, row):
    with path.open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def show_blocks(arguments):
    rows = read(arguments.results)
    dense = {key[:4]: row for key, row in rows.items() if row.form == "dense"}
    print("| core, shape | runtime | form | lowering | kcycles low | high | times fewer (low) | (high) | known | off |")
    print("|---|---|---|---|--:|--:|--:|--:|--:|--:|")
    offs = []
    for key, row in rows.items():
        reference = dense.get(key[:4])
        if reference is None:
            continue
        low, high = reference.kcycles_low / row.kcycles_low, reference.kcycles_high / row.kcycles_high
        published = PUBLISHED.get(key[:4])
        is_theirs = row.lowering == ("+".join(PUBLISHED_LOWERING[row.runtime]) if row.form.startswith("o-sep") else "")
        theirs = off = ""
        if published and row.form in PUBLISHED_FORMS[1 : len(published)] and is_theirs:
            ratio = published[0] / published[PUBLISHED_FORMS.index(row.form)]
            offs.append(abs(low / ratio - 1))
            theirs, off = f"{ratio:.2f}x", f"{low / ratio - 1:+.1%}"
        print(
            f"| {row.core} {row.shape} | {row.runtime} {row.precision} | {row.form} | {row.lowering or '-'} "
            f"| {row.kcycles_low:.0f} | {row.kcycles_high:.0f} | {low:.2f}x | {high:.2f}x | {theirs} | {off} |"
        )
    if offs:
        within = sum(each <= 0.03 for each in offs)
        print(f"\nratios within 3% of the known ones: {within} of {len(offs)}; largest difference {max(offs):.1%}")


def count_plans(arguments):
    """Automatic plans beside the original and uniform forms, as `selection.py` has them; nothing is timed."""
    arguments.precisions, arguments.threads, arguments.seconds, arguments.seconds_per_block = "int8", "1", 1.0, 0.2
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for net in arguments.nets.split(","):
            for core in arguments.cores.split(","):
                selection.run(arguments, (net, core, "int8", 1), work)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    blocks = commands.add_parser("blocks")
    blocks.add_argument("--cores", default=",".join(ARM_CORES))
    blocks.add_argument("--shapes", default=",".join(SHAPES))
    blocks.add_argument("--runtimes", default="litert,ort")
    blocks.add_argument("--precisions", default="int8,float32")
    blocks.add_argument("--forms", help="'dense,depthwise separable T=2'; default: all")
    plans = commands.add_parser("plans")
    plans.add_argument("source", type=Path)
    plans.add_argument("--cores", default="cortex-a72,cortex-a76")
    plans.add_argument("--nets", default="resnet20,resnet56")
    plans.add_argument("--plans", type=int, default=8, help="points of the front")
    plans.add_argument("--work", type=Path, help="kept between runs; default: a temporary folder")
    for each in (blocks, plans):
        each.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "plans":
        count_plans(arguments)
        return
    count_blocks(arguments)
    show_blocks(arguments)


if __name__ == "__main__":
    main()
