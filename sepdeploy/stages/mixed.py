"""`--mixed auto`: some layers of the target's int8 file compute in float; work/mixed.json."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np

from sepdeploy.analyze.activation import find_activations
from sepdeploy.analyze.trace import trace_network
from sepdeploy.bench.accuracy import QualityMeter
from sepdeploy.bench.environment import cpu_name
from sepdeploy.bench.session import open_session
from sepdeploy.core.artifact import Artifact, Format, Precision, Role
from sepdeploy.core.codec import read_json, write_json
from sepdeploy.core.files import replacing, sha256_of_file
from sepdeploy.core.int8 import INT8_RULES
from sepdeploy.core.int8_proof import FloatReason, Int8Proof
from sepdeploy.core.mixed import Arithmetic, MixedPlan, MixReason, is_within
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.plan import Plan
from sepdeploy.core.price_cache import PriceCache
from sepdeploy.core.progress import Progress
from sepdeploy.core.selection import FusedBlock, Price
from sepdeploy.core.stage_store import StageStore
from sepdeploy.planning.evaluate import Evaluator
from sepdeploy.planning.fused_block import blocks_of_site, dense_form
from sepdeploy.planning.mixed import Cost, Kept, MixSearch
from sepdeploy.planning.price import NOT_MEASURED, first_reason, price_blocks
from sepdeploy.planning.target import Target, find_target
from sepdeploy.quantize.mixed_onnx import mix_onnx
from sepdeploy.quantize.mixed_tflite import mix_tflite
from sepdeploy.stages.int8_proof import held_out_images
from sepdeploy.stages.load import Inputs
from sepdeploy.stages.versions import versions
from sepdeploy.version import __version__

__all__ = ["Mixer", "explained", "mixed_notes", "read_mixed"]

_OTHERS = (Arithmetic.FLOAT32, Arithmetic.WEIGHTS_ONLY)
_STAGE = "mixed"

_Reasons = dict[str, dict[Arithmetic, str]]
"""Layer -> arithmetic -> why it has no price."""


@dataclass(frozen=True, slots=True)
class Mixer:
    """Makes the target's int8 file a mixed one.

    Attributes:
        store: Remembers what was made from what.
        options: What is converted and how.
        inputs: The network and its images.
        plan: What became of its layers.
        evaluator: Has the validation images and what the original makes of them.
        progress: Told what is going on.
    """

    store: StageStore
    options: ConvertOptions
    inputs: Inputs
    plan: Plan
    evaluator: Evaluator
    progress: Progress

    def mix(
        self,
        source: Path,
        int8: Path,
        path: Path,
        lowering: Mapping[str, tuple[str, ...]],
        *,
        is_channels_last: bool,
    ) -> None:
        """Write the mixed file to `path`.

        Args:
            source: The float32 file.
            int8: All of it in int8.
            path: The file to write.
            lowering: Layer -> how it is written down in it.
            is_channels_last: Whether the files take NHWC where the network takes NCHW.
        """
        target = find_target(self.options.target, Precision.INT8, self.options.threads)
        files = _Files(self, target, source, int8, is_channels_last=is_channels_last)
        key = {
            **self.inputs.network_key(),
            "seed": self.options.seed,
            "bench_seconds": self.options.bench_seconds,
            "source": sha256_of_file(source),
            "int8": sha256_of_file(int8),
            "target": target.key(),
            "limit": self.options.max_drop_points,
            "lowering": dict(lowering),
            "calibration": self.inputs.calibration.sha256,
            "validation": self.inputs.validation.sha256,
            "seconds": [self.options.selection.seconds_per_block, self.options.selection.pricing_seconds],
            "rules": INT8_RULES,
            "version": __version__,
            "versions": versions(),
            "cpu": cpu_name(),
        }

        made = (path, _record(self.store))
        lacking = self._lacking(key, made)
        if lacking is not None:
            self.store.forget(_STAGE)

        def make() -> None:
            with tempfile.TemporaryDirectory(prefix="sepdeploy-") as folder:
                files.folder = Path(folder)
                mixed = self._chosen(target, files, lowering, lacking)
                if mixed is lacking:  # nothing that could be done better
                    return
                with replacing(path) as temporary:
                    files.write(mixed.kept, temporary)
                    self.store.before_change()
            write_json(_record(self.store), mixed)

        self.store.run(_STAGE, key, made, make)

    def _lacking(self, key: Mapping[str, object], made: tuple[Path, ...]) -> MixedPlan | None:
        """What an earlier run came to, if prices were not measured for want of time, memory or disk: tried once more.

        Not within one run: what files lose would change between the promise and the report.
        """
        if self.store.has_run(_STAGE) or not self.store.is_current(_STAGE, key, made):
            return None
        mixed = read_mixed(self.store)
        reasons = (why for each in mixed.unpriced.values() for why in each.values())
        return mixed if any(why.startswith(NOT_MEASURED) for why in reasons) else None

    def _chosen(
        self,
        target: Target,
        files: _Files,
        lowering: Mapping[str, tuple[str, ...]],
        lacking: MixedPlan | None,
    ) -> MixedPlan:
        """The mix; `lacking` as it is if there are no more prices now than there were for it."""
        blocks = self._blocks(lowering)
        missing = files.write(dict.fromkeys(blocks, Arithmetic.FLOAT32), files.new_path())
        blocks = {name: each for name, each in blocks.items() if name not in missing}
        costs, unpriced, notes = self._costs(target, blocks)
        if lacking is not None and unpriced == lacking.unpriced:
            return lacking
        limit = self.options.max_drop_points
        search = MixSearch(
            costs,
            target.unit,
            drop=files.drop,
            noise=files.noise,
            is_faster=files.is_faster,
            limit_points=limit,
            float_drop_points=None if limit is None else files.drop_of(files.source),
        )
        found = search.result()
        return replace(found, notes=(*notes, *_unpriced_notes(unpriced), *found.notes), unpriced=unpriced)

    def _blocks(self, lowering: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[FusedBlock, ...]]:
        """Layer -> its blocks, one for each call, convolutions and linear layers alike."""
        example = self.inputs.example()
        traced = trace_network(self.inputs.network, example, includes_linear=True)
        activations = find_activations(self.inputs.network, example, traced)
        replaced = self.plan.replaced
        blocks = {}
        for site in traced.sites:
            if site.spec is None or not site.calls:
                continue
            form = replaced[site.name].form if site.name in replaced else dense_form(site.spec)
            written = lowering.get(site.name, ()) if site.name in replaced else ()
            blocks[site.name] = blocks_of_site(site, form, activations.get(site.name, ""), written)
        return blocks

    def _costs(
        self, target: Target, blocks: Mapping[str, tuple[FusedBlock, ...]]
    ) -> tuple[dict[str, dict[Arithmetic, Cost]], _Reasons, tuple[str, ...]]:
        """Layer -> arithmetic -> cost over all calls; why there is none; and what to know of the cache."""
        groups = {
            block: [replace(block, mixed=arithmetic) for arithmetic in _OTHERS]
            for each in blocks.values()
            for block in each
        }
        cache = PriceCache()
        try:
            prices = price_blocks(
                target,
                groups,
                cache,
                seconds_per_block=self.options.selection.seconds_per_block,
                budget_seconds=self.options.selection.pricing_seconds,
                seed=self.options.seed,
                progress=self.progress,
            )
        finally:
            cache.close()
        costs: dict[str, dict[Arithmetic, Cost]] = {}
        unpriced: _Reasons = {}
        for name, own in blocks.items():
            for arithmetic in _OTHERS:
                found = [prices[block, replace(block, mixed=arithmetic)] for block in own]
                known = [price for price in found if isinstance(price, Price)]
                if len(known) == len(found):
                    costs.setdefault(name, {})[arithmetic] = Cost(
                        sum(price.difference for price in known),
                        sum(price.difference_low for price in known),
                        sum(price.difference_high for price in known),
                    )
                else:
                    reasons = [price for price in found if isinstance(price, str)]
                    unpriced.setdefault(name, {})[arithmetic] = first_reason(reasons)
        return costs, unpriced, cache.notes


def _unpriced_notes(unpriced: _Reasons) -> tuple[str, ...]:
    """Which layers have no price, by the reason."""
    layers: dict[str, dict[str, None]] = {}
    for name, reasons in unpriced.items():
        for why in reasons.values():
            layers.setdefault(why, {})[name] = None
    return tuple(
        f"{', '.join(names)} could not be measured in float: {why.removeprefix(NOT_MEASURED)}"
        + ("; the same command run again tries once more" if why.startswith(NOT_MEASURED) else "")
        for why, names in layers.items()
    )


class _Files:
    """Files of mixes, made to be measured."""

    def __init__(self, mixer: Mixer, target: Target, source: Path, int8: Path, *, is_channels_last: bool) -> None:
        self.source = source
        self.folder = int8.parent
        self._mixer, self._target, self._int8 = mixer, target, int8
        self._is_channels_last = is_channels_last
        self._numbers = count()
        self._drops: dict[str, float] = {}

    def new_path(self) -> Path:
        """A file that is not there yet."""
        return self.folder / f"{next(self._numbers)}{self.source.suffix}"

    def write(self, kept: Kept, path: Path) -> frozenset[str]:
        """Write the file of a mix; the layers that it does not have."""
        mix = mix_onnx if self._target.format is Format.ONNX else mix_tflite
        return mix(self.source, self._int8, path, kept)

    def drop(self, kept: Kept) -> float:
        """Points that a mix loses on the validation images."""
        key = repr(sorted((name, arithmetic.value) for name, arithmetic in kept.items()))
        if key not in self._drops:
            self._mixer.progress.stage(f"mixed precisions: measuring {len(kept)} layers in float on validation images")
            self._drops[key] = self.drop_of(self._written(kept))
        return self._drops[key]

    def drop_of(self, path: Path) -> float:
        """Points that a file loses on the validation images."""
        session = open_session(path, threads=self._mixer.options.threads, is_channels_last=self._is_channels_last)
        meter = QualityMeter()
        for batch, reference, labels in self._mixer.evaluator.reference_batches():
            meter.update(reference, session.predict(batch), labels)
        return meter.result(None).drop_points

    def noise(self, kept: Kept) -> float:
        """Noise / signal of a mix's outputs against the float file's, on held-out calibration images."""
        self._mixer.progress.stage(f"mixed precisions: what {', '.join(kept) or 'nothing'} in float changes")
        before, after = (
            open_session(path, is_channels_last=self._is_channels_last) for path in (self.source, self._written(kept))
        )
        signal = error = 0.0
        for batch in self._images():
            for expected, found in zip(before.predict(batch), after.predict(batch), strict=True):
                signal += float(np.sum(np.square(expected, dtype=np.float64)))
                error += float(np.sum(np.square(expected.astype(np.float64) - found)))
        return error / signal if signal else error

    def is_faster(self, kept: Kept) -> bool:
        """Whether a mix is faster as a whole than all in int8, by the whole of the interval."""
        files = [
            Artifact.of_file(
                path,
                format=self._target.format,
                precision=Precision.INT8,
                role=Role.CONVERTED,
                is_channels_last=self._is_channels_last,
            )
            for path in (self._int8, self._written(kept))
        ]
        options = self._mixer.options
        latency = self._target.compare(files, seconds=options.bench_seconds, seed=options.seed)[1]
        return latency.speedup_low is not None and latency.speedup_low > 1

    def _written(self, kept: Kept) -> Path:
        if not kept:
            return self._int8
        path = self.new_path()
        self.write(kept, path)
        return path

    def _images(self) -> Iterator[np.ndarray]:
        for batch, _ in held_out_images(self._mixer.inputs, self._mixer.options.seed)[0].batches(1):
            yield batch


def _record(store: StageStore) -> Path:
    return store.work / "mixed.json"


def read_mixed(store: StageStore) -> MixedPlan:
    """What `Mixer.mix` came to."""
    return read_json(MixedPlan, _record(store))


def explained(proof: Int8Proof, mixed: MixedPlan) -> Int8Proof:
    """The proof with what was chosen as the reason of the layers that it was chosen for."""
    reasons = {MixReason.FASTER: FloatReason.MIXED_FASTER, MixReason.ACCURACY: FloatReason.MIXED_ACCURACY}
    chosen = {layer.name: reasons[layer.reason] for layer in mixed.layers if layer.reason is not None}
    layers = []
    for layer in proof.float_layers:
        reason = next((reason for name, reason in chosen.items() if is_within(layer.name, name)), layer.reason)
        layers.append(replace(layer, reason=reason))
    return replace(proof, float_layers=tuple(layers))


def mixed_notes(mixed: MixedPlan) -> tuple[str, ...]:
    """What `--mixed auto` did, for the user."""
    chosen = [layer for layer in mixed.layers if layer.reason is not None]
    if not chosen:
        return (*mixed.notes, f"--mixed auto: all {len(mixed.layers)} layers stay in int8")
    texts = []
    for layer in chosen:
        text = f"{layer.name} ({layer.arithmetic.value}"
        if layer.difference is not None:
            text += f", {layer.difference:+.3g} {mixed.unit}"
        if layer.sqnr_gain_db is not None and layer.reason is MixReason.ACCURACY:
            text += f", {layer.sqnr_gain_db:+.1f} dB"
        texts.append(f"{text}: {layer.reason.value})" if layer.reason else f"{text})")
    drops = ""
    if mixed.drop_points is not None and mixed.mixed_drop_points is not None:
        drops = f"; the file loses {mixed.mixed_drop_points:.2f} points so, {mixed.drop_points:.2f} all in int8"
    return (
        *mixed.notes,
        f"--mixed auto: {len(chosen)} of {len(mixed.layers)} layers are not in int8: {', '.join(texts)}{drops}",
    )
