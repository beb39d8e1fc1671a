"""Fold, export, quantize and compare: from PyTorch networks to files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import nn

from sepdeploy.bench.session import open_session
from sepdeploy.core.artifact import Artifact, Format, Precision, Role
from sepdeploy.core.conv import Trace
from sepdeploy.core.files import replacing, sha256_of_file
from sepdeploy.core.int8 import IoType, PlaceRange, RangeMethod
from sepdeploy.core.onnx_steps import output_steps
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.plan import Plan, lowered_for
from sepdeploy.core.progress import Progress
from sepdeploy.core.report import ArtifactResult
from sepdeploy.core.stage_store import StageStore
from sepdeploy.passes.lower_chains import DEFAULT_LOWERINGS, lower_chains, lowerings_that_apply
from sepdeploy.passes.replace_convs import copy_network
from sepdeploy.quantize.saturation import saturates_u8s8
from sepdeploy.stages.int8 import Int8Network, Int8Record, prepare_network, range_images
from sepdeploy.stages.int8_proof import prove_int8
from sepdeploy.stages.load import Inputs
from sepdeploy.stages.mixed import Mixer, explained, read_mixed
from sepdeploy.stages.numerics import check_numerics, fold_network, numeric_error
from sepdeploy.stages.versions import versions
from sepdeploy.version import __version__

__all__ = ["artifact_path", "deploy", "wanted_lowerings"]

_NUMERIC_IMAGES = 64
"""Images on which the outputs of files are compared with the network's."""

_FOLDING, _JOINING = "fold_norm", "terms_as_concat"
"""The lowerings that join terms: they merge weights, so scales, and with them all that int8 rounds, are others."""


def artifact_path(folder: Path, file_format: Format, precision: Precision, role: Role) -> Path:
    """Where a file of the bundle lies: 'model.int8.onnx', 'original/model.tflite'."""
    infix = "" if precision is Precision.FLOAT32 else f".{precision.value}"
    name = f"model{infix}.{file_format.value}"
    return folder / name if role is Role.CONVERTED else folder / "original" / name


def deploy(
    store: StageStore,
    options: ConvertOptions,
    inputs: Inputs,
    traced: Trace,
    network: nn.Module,
    role: Role,
    weights_sha256: str,
    progress: Progress,
    plan: Plan | None = None,
    settled: tuple[PlaceRange, ...] = (),
    *,
    is_final: bool = False,
    mixer: Mixer | None = None,
) -> list[ArtifactResult]:
    """Export and quantize one network to every format; the files' qualities and latencies are still open.

    The chains of a converted network are lowered for each file (`wanted_lowerings`), in the target's file as `plan` has
    chosen for each. Before, the network is prepared for int8 (`stages/int8.py`), once for all formats. An int8 file is
    quantized from the float32 file where both want the same form, weights and norms, else from a float32 file of its
    own, `work/int8_source.*`. `settled` are the ranges that the network was trained with. Where
    `is_final`, float16 files are made too, and what is reported of int8 files is looked up. A
    `mixer` makes the converted network's int8 file of the target a mixed one.

    Raises:
        UsageError: if `options` name a lowering that does not exist.
        UnsupportedModelError: if the network cannot be exported.
        ToolError: if a file computes something else than the network.
    """
    batch = _first_images(inputs)
    folded = cache(lambda: fold_network(network, traced, batch).network)  # only where there is something to export
    for file_format in options.formats:  # a lowering that does not exist is refused before anything takes long
        _lowering(options, file_format, Precision.FLOAT32, network, plan)
    prepared = Int8Network(Int8Record("minmax", False, None, (), ()), folded)
    joined: dict[str, tuple[str, ...]] = {}
    int8_lowerings = _int8_lowerings(options, network, plan, keeps_terms=bool(settled))
    if Precision.INT8 in options.precisions:
        joined = _joined_terms(int8_lowerings.values())
        written = cache(lambda: _lowered(folded(), joined)) if joined else folded
        prepared = prepare_network(
            store, options.int8, inputs, traced, written, role, weights_sha256, options.seed, progress, settled, joined
        )
    maker = _FileMaker(store, options, inputs, network, folded, prepared, joined, batch, role, weights_sha256, progress)
    results = []
    for file_format in options.formats:
        paths = {precision: artifact_path(store.folder, file_format, precision, role) for precision in Precision}
        float_path = paths[Precision.FLOAT32]
        lowering = _lowering(options, file_format, Precision.FLOAT32, network, plan)
        maker.export(file_format, float_path, lowering)
        results.append(maker.result(file_format, Precision.FLOAT32, float_path))
        if Precision.FLOAT16 in options.precisions and is_final:
            maker.halve(file_format, float_path, paths[Precision.FLOAT16])
            results.append(maker.result(file_format, Precision.FLOAT16, paths[Precision.FLOAT16]))
        if Precision.INT8 not in options.precisions:
            continue
        int8_lowering = int8_lowerings[file_format]
        source = float_path
        if int8_lowering != lowering or prepared.record.has_own_source:
            source = store.work / f"int8_source.{role.value}.{file_format.value}"
            maker.export(file_format, source, int8_lowering)
        is_mixed = mixer is not None and options.is_target_file(file_format, Precision.INT8)
        if mixer is not None and is_mixed:
            all_int8 = store.work / f"all_int8.{file_format.value}"
            maker.quantize(file_format, source, all_int8, int8_lowering)
            mixer.mix(
                source,
                all_int8,
                paths[Precision.INT8],
                int8_lowering,
                is_channels_last=maker.transposes(file_format),
            )
        else:
            maker.quantize(file_format, source, paths[Precision.INT8], int8_lowering)
        int8 = maker.result(file_format, Precision.INT8, paths[Precision.INT8])
        if is_final:
            proof = prove_int8(store, int8.artifact, source, inputs, options.seed, versions(), progress)
            int8 = replace(int8, int8=explained(proof, read_mixed(store)) if is_mixed else proof)
        results.append(int8)
    return maker.with_agreement(results)


def _int8_lowerings(
    options: ConvertOptions, network: nn.Module, plan: Plan | None, *, keeps_terms: bool
) -> dict[Format, dict[str, tuple[str, ...]]]:
    """Format -> layer -> how it is written down in its int8 file.

    Weights that were trained through rounding are on the grid of each term: merged, they would be rounded once more. So
    with `keeps_terms` terms stay apart, unless the user wants otherwise.
    """
    found = {each: _lowering(options, each, Precision.INT8, network, plan) for each in options.formats}
    if not keeps_terms or options.lowering is not None:
        return found
    return {each: _without(lowering, dict.fromkeys(lowering, (_JOINING,))) for each, lowering in found.items()}


def _joined_terms(lowerings: Iterable[Mapping[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    """Layer -> what all int8 files do to join its terms: that is done before its ranges and roundings are found."""
    first, *others = lowerings
    return {
        name: tuple(each for each in names if each in (_FOLDING, _JOINING))
        for name, names in first.items()
        if all(_JOINING in lowering.get(name, ()) for lowering in (first, *others))
    }


def _without(
    lowering: Mapping[str, tuple[str, ...]], done: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """What is left of a lowering once something is done; layers of which nothing is left are left out."""
    left = {name: tuple(each for each in names if each not in done.get(name, ())) for name, names in lowering.items()}
    return {name: names for name, names in left.items() if names}


def _lowered(network: nn.Module, lowering: Mapping[str, tuple[str, ...]]) -> nn.Module:
    copy = copy_network(network)
    lower_chains(copy, (), lowering)
    return copy


def _lowering(
    options: ConvertOptions, file_format: Format, precision: Precision, network: nn.Module, plan: Plan | None
) -> dict[str, tuple[str, ...]]:
    """Layer -> how it is written down in one kind of file."""
    wanted = wanted_lowerings(options, file_format, precision)
    return lowerings_that_apply(network, wanted, _chosen_lowerings(options, file_format, precision, plan))


def wanted_lowerings(options: ConvertOptions, file_format: Format, precision: Precision) -> tuple[str, ...]:
    """The lowerings that one kind of file is to have: the user's, or the best known ones."""
    return DEFAULT_LOWERINGS[file_format, precision] if options.lowering is None else options.lowering


def _chosen_lowerings(
    options: ConvertOptions, file_format: Format, precision: Precision, plan: Plan | None
) -> dict[str, tuple[str, ...]]:
    """Layer -> how the plan wants it written down in this file; nothing where the user said how, or it is another.

    A plan that was made for another target, precision or by hand has nothing to say of this one's files.
    """
    if (
        plan is None
        or options.lowering is not None
        or plan.lowered_for != lowered_for(options.target, options.precision)
    ):
        return {}
    if not options.is_target_file(file_format, precision):
        return {}
    return {name: c.lowering for name, c in plan.replaced.items() if c.lowering is not None}


class _QuantizeArguments(TypedDict):
    places: tuple[PlaceRange, ...]
    method: RangeMethod
    io: IoType


@dataclass(frozen=True, slots=True)
class _FileMaker:
    """Makes the files of one network, each as a stage of the run.

    Attributes:
        store: Remembers what was made from what.
        options: How files are made.
        inputs: Images and the original network.
        network: The network.
        folded: Gives it with the batch norms behind convolutions folded.
        int8: The same as it is quantized.
        batch: Real images to compare outputs on.
        role: Which network it is.
        weights_sha256: Hash of its weights.
        progress: Told what is going on.
    """

    store: StageStore
    options: ConvertOptions
    inputs: Inputs
    network: nn.Module
    folded: Callable[[], nn.Module]
    int8: Int8Network
    joined: Mapping[str, tuple[str, ...]]
    batch: np.ndarray
    role: Role
    weights_sha256: str
    progress: Progress

    def export(self, file_format: Format, path: Path, lowering: Mapping[str, tuple[str, ...]]) -> None:
        """Write the network in float32, its chains lowered."""
        is_source = path.parent == self.store.work
        key = {
            **self.inputs.network_key(),
            "weights": self.weights_sha256,
            "versions": versions(),
            "lowering": dict(lowering),
            "int8": asdict(self.int8.record) if is_source else None,
            "joined": dict(self.joined) if is_source else {},
        }

        def make() -> None:
            purpose = ", to be quantized" if is_source else ""
            self.progress.stage(f"exporting the {self.role.value} network to {file_format.value}{purpose}")
            designed = self.int8.network() if is_source else self.folded()
            left = _without(lowering, self.joined if is_source else {})
            network = _lowered(designed, left) if left else designed
            transposes = self.transposes(file_format)
            with replacing(path) as temporary:
                _export(network, self.batch[:1], temporary, file_format, is_channels_last=transposes)
                # Against the network before its chains were lowered: so the lowering is checked too.
                check_numerics(temporary, designed, self.batch, is_channels_last=transposes)
                if not is_source:
                    self.store.before_change()

        name = f"export {self.role.value} {file_format.value}{' for int8' if is_source else ''}"
        self.store.run(name, key, (path,), make)

    def halve(self, file_format: Format, source: Path, path: Path) -> None:
        """Write the float16 file that the float32 file `source` becomes."""
        key = {"source": sha256_of_file(source), "version": __version__, "versions": versions()}

        def make() -> None:
            from sepdeploy.quantize.float16 import convert_to_float16

            self.progress.stage(f"converting the {self.role.value} {file_format.value} file to float16")
            with replacing(path) as temporary:
                convert_to_float16(source, temporary, file_format)
                self.store.before_change()

        self.store.run(f"float16 {self.role.value} {file_format.value}", key, (path,), make)

    def quantize(self, file_format: Format, source: Path, path: Path, lowering: Mapping[str, tuple[str, ...]]) -> None:
        """Write the int8 file that the float32 file `source` becomes."""
        key = {
            "source": sha256_of_file(source),
            "images": self.inputs.calibration.sha256,
            "version": __version__,
            "versions": versions(),
            "saturates": saturates_u8s8(),
            "lowering": dict(lowering),
            "int8": asdict(self.int8.record),
            "io": self.options.int8.io,
            "seed": self.options.seed,
        }

        def make() -> None:
            self.progress.stage(f"quantizing the {self.role.value} {file_format.value} file to int8")
            with replacing(path) as temporary:
                transposes = self.transposes(file_format)
                self._quantize(source, temporary, file_format, is_channels_last=transposes)
                self.store.before_change()

        purpose = ", to be mixed" if path.parent == self.store.work else ""
        self.store.run(f"quantize {self.role.value} {file_format.value}{purpose}", key, (path,), make)

    def result(self, file_format: Format, precision: Precision, path: Path) -> ArtifactResult:
        """The file with how far its outputs are from the network's."""
        transposes = self.transposes(file_format)
        artifact = Artifact.of_file(
            path, format=file_format, precision=precision, role=self.role, is_channels_last=transposes
        )
        error = numeric_error(path, self.network, self.batch, is_channels_last=transposes)
        if precision is not Precision.INT8:
            return ArtifactResult(artifact, None, None, error)
        record = self.int8.record
        return ArtifactResult(artifact, None, None, error, _float_ops(artifact), record.steps, record.note)

    def with_agreement(self, results: list[ArtifactResult]) -> list[ArtifactResult]:
        """The same with how far the int8 TFLite file agrees with the int8 ONNX file, if there are both."""
        from sepdeploy.quantize.agreement import agreement_ratio

        files = {r.artifact.format: r.artifact for r in results if r.artifact.precision is Precision.INT8}
        if len(files) < len(Format):
            return results
        found = output_steps(Path(files[Format.ONNX].path))
        steps = [step for step in found if step is not None]
        if len(steps) < len(found):  # an output in float has no step to agree within
            return results
        of_onnx, of_tflite = (
            open_session(Path(file.path), threads=1, is_channels_last=file.is_channels_last).predict(self.batch)
            for file in (files[Format.ONNX], files[Format.TFLITE])
        )
        ratio = agreement_ratio(of_onnx, of_tflite, steps)
        return [replace(r, int8_agreement_ratio=ratio) if r.artifact is files[Format.TFLITE] else r for r in results]

    def _quantize(self, source: Path, path: Path, file_format: Format, *, is_channels_last: bool) -> None:
        record = self.int8.record
        fit, _ = range_images(self.inputs, self.options.seed)

        def images() -> Iterator[np.ndarray]:
            for batch, _ in fit.batches(1):
                yield batch.transpose(0, 2, 3, 1) if is_channels_last else batch

        given = _QuantizeArguments(places=record.places, method=record.method, io=self.options.int8.io)
        if file_format is Format.ONNX:
            from sepdeploy.quantize.onnx_qdq import quantize_onnx

            quantize_onnx(source, path, images(), **given)
        else:
            from sepdeploy.quantize.tflite_int8 import quantize_tflite

            quantize_tflite(source, path, images(), **given)

    def transposes(self, file_format: Format) -> bool:
        """Whether the file takes NHWC where the network takes NCHW."""
        return file_format is Format.TFLITE and self.inputs.calibration.preprocess.layout == "NCHW"


def _first_images(inputs: Inputs) -> np.ndarray:
    batch, _ = next(inputs.validation.batches(_NUMERIC_IMAGES))
    return batch


def _export(
    network: nn.Module, example: np.ndarray, path: Path, file_format: Format, *, is_channels_last: bool
) -> None:
    if file_format is Format.ONNX:
        from sepdeploy.export.onnx import export_onnx

        export_onnx(network, torch.from_numpy(example), path)
    else:
        from sepdeploy.export.tflite import export_tflite

        export_tflite(network, torch.from_numpy(example), path, is_channels_last=is_channels_last)


def _float_ops(artifact: Artifact) -> tuple[str, ...]:
    from sepdeploy.quantize.inspect_int8 import float_ops_of_onnx, float_ops_of_tflite

    reader = float_ops_of_onnx if artifact.format is Format.ONNX else float_ops_of_tflite
    return reader(Path(artifact.path))
