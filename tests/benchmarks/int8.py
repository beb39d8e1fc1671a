"""What int8 costs: float, the libraries' own defaults, and ours, for ONNX and TFLite.

python tests/benchmarks/int8.py ../shared --results int8.jsonl --mobilenet mobilenet_v2.pt

Rows are ResNet-20 and ResNet-56, dense and with every 3x3 after the stem in depthwise-separable form with one and two
terms and in optimized-separable form, filled by the anchored transfer, and a MobileNetV2 that `train_mobilenet.py` has
trained. Columns:

- float: the float32 file.
- naive: onnxruntime's `quantize_static` and ai-edge-quantizer's `Quantizer.calibrate` as they come.
- ours: `--calibration-method auto` with everything that is on by default.
- adaptive: ours with `--adaptive-rounding`.
- plain: ours with minima and maxima and no other step.
- balanced: plain with channels rescaled, whether that pays or not.

Accuracy is on test images with labels, SQNR against the float network on the same images. Every number is one line of
--results as soon as it is there, and is not computed again. Needs the folder with data/cifar10_jpeg_*.npz and
weights/resnet*_jpeg.pt.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from transfer_quality import ARCHITECTURES, unpack

from sepdeploy.analyze.trace import trace_network
from sepdeploy.bench.accuracy import QualityMeter
from sepdeploy.bench.session import open_session
from sepdeploy.core.artifact import Format, Precision
from sepdeploy.core.int8 import Int8Options
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.core.quiet import quiet
from sepdeploy.data.images import open_images
from sepdeploy.data.preprocess import read_preprocess
from sepdeploy.export.onnx import export_onnx
from sepdeploy.export.tflite import export_tflite
from sepdeploy.loading.model import load_model
from sepdeploy.passes.equalize_channels import equalize_channels
from sepdeploy.passes.fold_batchnorm import fold_batchnorm
from sepdeploy.passes.lower_chains import DEFAULT_LOWERINGS, lower_chains
from sepdeploy.passes.replace_convs import copy_network
from sepdeploy.planning.candidates import propose_plan
from sepdeploy.planning.convert import convert_network
from sepdeploy.planning.evaluate import run_network, tensor_batches
from sepdeploy.quantize.onnx_qdq import quantize_onnx
from sepdeploy.quantize.prepare import prepare_int8
from sepdeploy.quantize.tflite_int8 import quantize_tflite
from sepdeploy.stages.int8 import prepare_for_int8, range_images

FORMS = {
    "dense": None,
    "T=1": ("depthwise_separable", SchemeOptions(terms=1)),
    "T=2": ("depthwise_separable", SchemeOptions(terms=2)),
    "optimized": ("optimized_separable", SchemeOptions()),
}
MOBILENET = "models.mobilenet:mobilenet_v2(num_classes=10,width=0.5,stem_stride=1)"
COLUMNS = ("float", "naive", "ours", "adaptive", "plain", "balanced")
SUFFIXES = {Format.ONNX: ".onnx", Format.TFLITE: ".tflite"}


class Results:
    """Lines of a file, by what they are about."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = {self._key(row): row for row in map(json.loads, lines)}

    def has(self, **row) -> bool:
        return self._key(row) in self.rows

    def add(self, **row) -> None:
        self.rows[self._key(row)] = row
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)

    def _key(self, row):
        return tuple(row[name] for name in ("net", "form", "column", "format", "test", "calibration"))


class Study:
    """One network in one form, batch norms folded."""

    def __init__(self, arguments, folder: Path, net: str, form: str) -> None:
        preprocess = read_preprocess(Path("calibration/cifar10.toml"))
        train, test = (str(folder / f"{name}.npz") for name in ("train", "test"))
        given = {"preprocess": preprocess, "seed": 0}
        self.calibration = open_images(train, role="calibration", limit=arguments.calibration, **given)
        self.test = open_images(test, role="validation", limit=arguments.test, **given)
        if net == "mobilenet_v2":
            checkpoint, arch = arguments.mobilenet, MOBILENET
        else:
            checkpoint, arch = arguments.source / "weights" / f"{net}_jpeg.pt", ARCHITECTURES[net]
        original = load_model(checkpoint, arch).module
        self.example = torch.from_numpy(next(self.calibration.batches(1))[0])
        self.trace = trace_network(original, self.example)
        network = original
        if FORMS[form] is not None:
            plan = propose_plan(self.trace, *FORMS[form], original)
            network = convert_network(original, self.trace, plan, tensor_batches(self.calibration, 64))[0]
        self.network = copy_network(network).eval()
        fold_batchnorm(self.network, {site.name: site.norm for site in self.trace.sites if site.norm})
        self.joined = copy_network(self.network)  # as `convert` does before ranges and roundings are found
        lower_chains(self.joined, ("fold_norm", "terms_as_concat"))
        self.fit, self.held_out = range_images(SimpleNamespace(calibration=self.calibration), 0)
        self.folder = folder
        self._prepared = {}

    def prepared(self, column: str):
        """The network as a column quantizes it, once for both formats."""
        if column not in self._prepared:
            self._prepared = {column: self._prepare(column)}
        return self._prepared[column]

    def _prepare(self, column: str):
        if column in ("ours", "adaptive"):
            inputs = SimpleNamespace(calibration=self.calibration, example=lambda: self.example)
            options = Int8Options(rounds_adaptively=column == "adaptive")
            return prepare_for_int8(options, inputs, self.trace, self.joined, 0)
        network = copy_network(self.joined)
        if column == "balanced":
            equalize_channels(network, self.example, tensor_batches(self.fit, 32))
        options = Int8Options("minmax", equalizes=False, corrects_bias=False)
        batches = tensor_batches(self.fit, 32), tensor_batches(self.held_out, 32)
        return prepare_int8(network, copy_network, self.example, *batches, len(self.held_out), options, None)

    def images(self, file_format: Format) -> Iterator[np.ndarray]:
        for image, _ in self.fit.batches(1):
            yield np.ascontiguousarray(image.transpose(0, 2, 3, 1)) if file_format is Format.TFLITE else image

    def export(self, network: nn.Module, file_format: Format, precision: Precision) -> Path:
        path = self.folder / f"net{SUFFIXES[file_format]}"
        lowered = copy_network(network)
        lower_chains(lowered, DEFAULT_LOWERINGS[file_format, precision])
        if file_format is Format.ONNX:
            export_onnx(lowered, self.example, path)
        else:
            export_tflite(lowered, self.example, path, is_channels_last=True)
        return path

    def file(self, column: str, file_format: Format) -> tuple[Path, dict]:
        """The file of a column, and what is to be noted of it."""
        if column in ("float", "naive"):
            precision = Precision.FLOAT32 if column == "float" else Precision.INT8
            source = self.export(self.network, file_format, precision)
            if column == "float":
                return source, {}
            target = source.with_name(f"naive{SUFFIXES[file_format]}")
            naive = naive_onnx if file_format is Format.ONNX else naive_tflite
            naive(source, target, self.images(file_format))
            return target, {}
        prepared = self.prepared(column)
        source = self.export(prepared.network, file_format, Precision.INT8)
        target = source.with_name(f"{column}{SUFFIXES[file_format]}")
        quantize = quantize_onnx if file_format is Format.ONNX else quantize_tflite
        quantize(source, target, self.images(file_format), places=prepared.places, method=prepared.method)
        steps = {
            step.name: [round(step.sqnr_before_db, 2), round(step.sqnr_after_db, 2), step.is_kept]
            for step in prepared.steps
        }
        return target, {"method": prepared.method, "steps": steps, "simulated_db": round(prepared.sqnr_db, 2)}

    def measure(self, path: Path) -> dict:
        """Accuracy and SQNR of a file on the test images."""
        session = open_session(path, is_channels_last=path.suffix == ".tflite")
        meter = QualityMeter()
        for batch, labels in self.test.batches(64):
            meter.update(run_network(self.network, torch.from_numpy(batch)), session.predict(batch), labels)
        quality = meter.result(None)
        return {
            "accuracy": quality.accuracy_ratio,
            "drop_points": quality.drop_points,
            "sqnr_db": None if quality.sqnr_db is None else round(quality.sqnr_db, 2),
            "size_bytes": path.stat().st_size,
        }


def naive_onnx(source: Path, target: Path, images: Iterator[np.ndarray]) -> None:
    """As onnxruntime's documentation shows it: everything but the paths and the images left out."""
    from onnxruntime.quantization import quantize_static

    class Reader:
        def get_next(self):
            image = next(images, None)
            return None if image is None else {"input": image}

    with quiet():
        quantize_static(str(source), str(target), Reader())


def naive_tflite(source: Path, target: Path, images: Iterator[np.ndarray]) -> None:
    """As ai-edge-quantizer's documentation shows it."""
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import quantizer, recipe

    ((signature, ends),) = Interpreter(str(source)).get_signature_list().items()
    with quiet():
        own = quantizer.Quantizer(str(source), recipe.static_wi8_ai8())
        ranges = own.calibrate({signature: [{ends["inputs"][0]: image} for image in images]})
        target.write_bytes(own.quantize(ranges).quantized_model)


def table(rows) -> str:
    """One line per network and form, one column per kind of file: accuracy in % (SQNR in dB)."""
    lines = []
    for file_format in SUFFIXES:
        lines += [
            f"\n{file_format.value}",
            "| net | form | " + " | ".join(COLUMNS) + " |",
            "|---" * (2 + len(COLUMNS)) + "|",
        ]
        keys = dict.fromkeys((row["net"], row["form"]) for row in rows)
        for net, form in keys:
            cells = []
            for column in COLUMNS:
                found = [
                    r for r in rows
                    if (r["net"], r["form"], r["column"], r["format"]) == (net, form, column, file_format.value)
                ]  # fmt: skip
                row = found[-1] if found else None
                sqnr = "" if row is None or row["sqnr_db"] is None else f" ({row['sqnr_db']:.1f})"
                cells.append("" if row is None else f"{100 * row['accuracy']:.2f}{sqnr}")
            lines.append(f"| {net} | {form} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--nets", default="resnet20,resnet56,mobilenet_v2")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--columns", default=",".join(COLUMNS))
    parser.add_argument("--formats", default="onnx,tflite")
    parser.add_argument("--mobilenet", type=Path, help="checkpoint of train_mobilenet.py, for its row")
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("int8.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = Results(arguments.results)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("train", "test"):
            unpack(arguments.source, name, folder)
        for net in arguments.nets.split(","):
            if net == "mobilenet_v2" and arguments.mobilenet is None:
                continue
            for form in ("dense",) if net == "mobilenet_v2" else arguments.forms.split(","):
                run_row(arguments, results, folder, net, form)
    print(table(list(results.rows.values())))


def run_row(arguments, results: Results, folder: Path, net: str, form: str) -> None:
    """All columns of one network in one form that are not there yet."""
    study = None
    for column in arguments.columns.split(","):
        for name in arguments.formats.split(","):
            row = {"net": net, "form": form, "column": column, "format": name,
                   "test": arguments.test, "calibration": arguments.calibration}  # fmt: skip
            if results.has(**row):
                continue
            study = study or Study(arguments, folder, net, form)
            path, notes = study.file(column, Format(name))
            results.add(**row, **study.measure(path), **notes)


if __name__ == "__main__":
    main()
