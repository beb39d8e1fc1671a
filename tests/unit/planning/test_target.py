from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sepdeploy.bench.differences import Difference
from sepdeploy.bench.onnxruntime import OrtSession
from sepdeploy.bench.session import Session, open_session
from sepdeploy.core.artifact import Format, Precision
from sepdeploy.core.chain import Chain, ChainSum, Factor, Slice
from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.int8_proof import FloatReason
from sepdeploy.core.measurement import Method
from sepdeploy.core.mixed import Arithmetic
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.core.price_cache import PriceCache
from sepdeploy.core.progress import Silent
from sepdeploy.core.selection import FusedBlock, Price, Unpriced
from sepdeploy.errors import ToolError, UsageError
from sepdeploy.planning import block_files, local_target
from sepdeploy.planning.block_files import write_block_files
from sepdeploy.planning.fused_block import build_block, dense_block, example_of
from sepdeploy.planning.price import NOT_MEASURED, price_blocks
from sepdeploy.planning.target import TARGETS_BY_NAME, find_target
from sepdeploy.quantize.int8_share import int8_share_of_onnx, int8_share_of_tflite
from sepdeploy.schemes.scheme import find_scheme

SPEC = ConvSpec(32, 32, (3, 3), padding=(1, 1, 1, 1))
DENSE = dense_block(SPEC, (6, 6), activation="relu")
SEPARABLE = replace(DENSE, form=find_scheme("depthwise_separable").design(SPEC, SchemeOptions(terms=1)))
SHUFFLED = replace(DENSE, form=find_scheme("optimized_separable").design(SPEC, SchemeOptions()))
# It ends in no convolution, so that it has no place for a bias.
UNBUILDABLE = replace(DENSE, form=ChainSum((Chain((Factor(32, 40, (1, 1)), Slice(40, 0, 32))),)))


def operators(path: Path, tmp_path: Path) -> list[str]:
    """What ONNX Runtime makes of a file."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def expected(block: FusedBlock) -> np.ndarray:
    """The block's output for its example."""
    return build_block(block)(example_of(block)).numpy()


@pytest.fixture(scope="module")
def onnx_files(tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, list[Path | Unpriced]]:
    blocks = (DENSE, UNBUILDABLE, SEPARABLE, SHUFFLED)
    return {
        precision: write_block_files(blocks, tmp_path_factory.mktemp("onnx"), Format.ONNX, precision)
        for precision in (Precision.FLOAT32, Precision.INT8)
    }


def test_one_export_gives_a_file_for_each_block(onnx_files: dict[Precision, list[Path | Unpriced]]) -> None:
    for precision, (dense, reason, separable, shuffled) in onnx_files.items():
        assert "ends in a convolution" in reason.reason
        for path, block in ((dense, DENSE), (separable, SEPARABLE), (shuffled, SHUFFLED)):
            # The frame scales before and after; the blocks have small biases, so not by its square.
            wanted = 0.875 * build_block(block)(0.875 * example_of(block)).numpy()
            (output,) = OrtSession(path).predict(example_of(block).numpy())
            error = np.abs(output - wanted).max() / np.abs(wanted).max()
            assert error < (1e-5 if precision is Precision.FLOAT32 else 0.1)


def test_layouts_change_outside_of_the_frame(
    onnx_files: dict[Precision, list[Path | Unpriced]], tmp_path: Path
) -> None:
    dense, _, separable, _ = onnx_files[Precision.INT8]
    outside = ["QuantizeLinear", "Transpose"], ["Transpose", "DequantizeLinear"]
    convs = {path: operators(path, tmp_path) for path in (dense, separable)}
    for count, path in ((3, dense), (4, separable)):
        assert convs[path] == [*outside[0], *["QLinearConv"] * count, *outside[1]]
    float_dense, _, float_separable, _ = onnx_files[Precision.FLOAT32]
    for count, path in ((3, float_dense), (4, float_separable)):
        inner = [name for name in operators(path, tmp_path) if not name.startswith("Reorder")]
        assert inner == ["Conv"] * count
        names = operators(path, tmp_path)
        assert names.index("Conv") <= 1  # nothing but the one way in comes before the frame
        assert len(names) - names[::-1].index("Conv") >= len(names) - 1  # nor but the way out after it


def test_one_that_cannot_be_exported_refuses_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sepdeploy.export import onnx as exporter

    export = exporter.export_onnx

    def picky(model: torch.nn.Module, example: torch.Tensor, path: Path) -> None:
        if len(model.blocks) > 1 or any(type(m).__name__ == "ChannelShuffle" for m in model.modules()):
            raise ToolError("no shuffles, and one at a time")
        export(model, example, path)

    monkeypatch.setattr(exporter, "export_onnx", picky)
    separable, shuffled = write_block_files((SEPARABLE, SHUFFLED), tmp_path, Format.ONNX, Precision.FLOAT32)
    assert shuffled == Unpriced("no shuffles, and one at a time", is_lasting=True)
    assert OrtSession(separable).predict(example_of(SEPARABLE).numpy())[0].shape == (1, 32, 6, 6)


class Exporter:
    """Exports all but shuffles, where it raises `error` from `cause`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sepdeploy.export import onnx as exporter

        self.error, self.cause, self.calls = ToolError("no such operator"), None, 0
        self.export = exporter.export_onnx
        monkeypatch.setattr(exporter, "export_onnx", self)

    def __call__(self, model: torch.nn.Module, example: torch.Tensor, path: Path) -> None:
        self.calls += 1
        if any(type(module).__name__ == "ChannelShuffle" for module in model.modules()):
            raise self.error from self.cause
        self.export(model, example, path)


def prices_of_two(cache: Path) -> list[Price | str]:
    target = find_target("ort", Precision.FLOAT32, 1)
    prices = price_blocks(target, {DENSE: (SEPARABLE, SHUFFLED)}, PriceCache(cache), seconds_per_block=0.01)
    return [prices[DENSE, SEPARABLE], prices[DENSE, SHUFFLED]]


def test_a_second_run_builds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = Exporter(monkeypatch)
    first = prices_of_two(tmp_path / "prices")
    assert isinstance(first[0], Price)
    assert first[1] == "no such operator"
    calls = exporter.calls
    assert prices_of_two(tmp_path / "prices") == first
    assert exporter.calls == calls
    PriceCache(tmp_path / "prices").clear()
    prices_of_two(tmp_path / "prices")
    assert exporter.calls == 2 * calls


def test_what_the_machine_lacked_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = Exporter(monkeypatch)
    exporter.cause = OSError(errno.ENOSPC, "No space left on device")
    price, reason = prices_of_two(tmp_path / "prices")
    assert reason == f"{NOT_MEASURED}no such operator"
    calls, exporter.cause = exporter.calls, None
    assert prices_of_two(tmp_path / "prices") == [price, "no such operator"]
    assert exporter.calls > calls


def test_a_full_disk_ends_the_run_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = Exporter(monkeypatch)
    exporter.error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space"):
        prices_of_two(tmp_path / "prices")
    assert PriceCache(tmp_path / "prices").summary() == ()


def test_linear_layers_stand_alone(tmp_path: Path) -> None:
    spec = ConvSpec(32, 24, (1, 1))
    dense = dense_block(spec, (1, 1), positions=3, is_linear=True)
    form = find_scheme("optimized_separable").design(spec, SchemeOptions())
    paths = write_block_files((dense, replace(dense, form=form)), tmp_path, Format.ONNX, Precision.INT8)
    for path, block in zip(paths, (dense, replace(dense, form=form)), strict=True):
        (output,) = OrtSession(path).predict(example_of(block).numpy())
        assert np.median(np.abs(output - expected(block))) < 0.1  # random calibration inputs clip a few


def test_blocks_in_litert(tmp_path: Path) -> None:
    pytest.importorskip("litert_torch", reason="needs sepdeploy[tflite]")
    uneven = replace(DENSE, form=ChainSum((Chain((replace(SPEC.as_factor(), groups=5),)),)))
    blocks = (SEPARABLE, uneven, UNBUILDABLE, replace(SHUFFLED, lowering=("shuffle_channels_last",)))
    *paths, reason, last = write_block_files(blocks, tmp_path, Format.TFLITE, Precision.INT8)
    assert "ends in a convolution" in reason.reason
    for path, block in zip((*paths, last), (SEPARABLE, uneven, SHUFFLED), strict=True):
        session = open_session(path, is_channels_last=True)
        (output,) = session.predict(example_of(block).numpy())
        wanted = expected(block)
        assert np.abs(output - wanted).max() / wanted.max() < 0.1
    assert Path(last).stat().st_size < (tmp_path / "common.int8.tflite").stat().st_size / 2


def test_prices_of_real_blocks(
    onnx_files: dict[Precision, list[Path | Unpriced]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_files, "write_block_files", lambda *args: onnx_files[Precision.INT8][:3])
    target = find_target("ort", Precision.INT8, 1)
    reason, price = target.measure(DENSE, [UNBUILDABLE, SEPARABLE], seconds=0.01, seed=0, progress=Silent())
    assert price.value > 0
    assert price.dense_value > 0
    assert price.difference_low <= price.difference <= price.difference_high
    assert (price.unit, price.method) == (target.unit, target.method) == ("ms", Method.WALL_CLOCK)
    assert price.repeats >= 24
    assert "ends in a convolution" in reason.reason
    assert reason.is_lasting


def test_prices_go_to_their_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Opened:
        def __init__(self, path: Path) -> None:
            self.path = path

        def set_random_input(self, seed: int) -> None:
            assert seed == 7
            if self.path.name == "fails":
                raise ToolError("it fails to run") from MemoryError()

    def timed(reference: Session, others: Sequence[Session], *, seconds: float, seed: int) -> list[Difference]:
        assert (reference.path.name, seconds, seed) == ("dense", 0.5, 7)
        return [Difference(ms, 9.0, ms - 9, ms - 9.5, ms - 8.5, 24) for ms in (float(o.path.name) for o in others)]

    refused = Unpriced("not exported", is_lasting=True)
    files: list[Path | Unpriced] = [Path("dense"), Path("1"), refused, Path("fails"), Path("2")]
    monkeypatch.setattr(block_files, "write_block_files", lambda *args: files)
    monkeypatch.setattr("sepdeploy.bench.session.open_session", lambda path, **options: Opened(path))
    monkeypatch.setattr("sepdeploy.bench.differences.measure_differences", timed)
    target = find_target("litert", Precision.INT8, 1)
    first, *reasons, last = target.measure(DENSE, [SEPARABLE] * 4, seconds=0.5, seed=7, progress=Silent())
    assert first == Price(1.0, 9.0, -8.0, -8.5, -7.5, "ms", 24, Method.WALL_CLOCK)
    assert last.value == 2.0
    assert reasons == [refused, Unpriced("it fails to run", is_lasting=False)]
    files[0] = Unpriced("too large", is_lasting=True)
    assert set(target.measure(DENSE, [SEPARABLE] * 4, seconds=0.5, seed=7, progress=Silent())) == {
        Unpriced("the layer as it is cannot be measured: too large", is_lasting=True)
    }


@pytest.mark.parametrize("name", ["ort", "litert"])
def test_the_key_has_all_that_prices_depend_on(name: str) -> None:
    key = find_target(name, Precision.INT8, 2).key()
    assert json.loads(json.dumps(key)) == key
    assert (key["target"], key["precision"], key["threads"]) == (name, "int8", 2)
    assert {"cpu", "cores", "block_version"} <= set(key)
    assert any(character.isdigit() for character in key["runtime"])
    assert any(package.startswith("torch ") for package in key["made_with"])
    assert key != find_target(name, Precision.INT8, 1).key()
    assert key != find_target(name, Precision.FLOAT32, 2).key()


@pytest.mark.parametrize("name", TARGETS_BY_NAME)
def test_registry(name: str) -> None:
    kind = TARGETS_BY_NAME[name]()
    assert kind.name == name
    assert "\n" not in kind.summary
    target = kind.make(Precision.INT8, 1)
    assert (target.name, target.format, target.unit, target.method) == (name, kind.format, kind.unit, kind.method)
    with pytest.raises(TypeError):
        TARGETS_BY_NAME["mine"] = None


def test_lowerings_are_those_of_its_files() -> None:
    form = SHUFFLED.form
    assert find_target("litert", Precision.INT8, 1).lowerings(form)[0] == ("shuffle_channels_last",)
    assert find_target("ort", Precision.INT8, 1).lowerings(form)[0] == ("fold_shuffle",)


def test_wrong_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no target 'npu'; choose one of ort, litert"):
        find_target("npu", Precision.INT8, 1)
    with pytest.raises(UsageError, match="--threads must be at least 1, got 0"):
        find_target("ort", Precision.INT8, 0)
    kind = local_target._kind("ort", "", Format.ONNX, ("onnxruntime", "no_such_module"), "pip install it")
    monkeypatch.setattr(local_target, "ORT", kind)
    with pytest.raises(ToolError, match="target ort needs no_such_module: run pip install it"):
        find_target("ort", Precision.INT8, 1)


@pytest.mark.parametrize("name", ["ort", "litert"])
def test_a_block_in_float_inside_an_int8_file_pays_for_the_conversions(name: str, tmp_path: Path) -> None:
    if name == "litert":
        pytest.importorskip("litert_torch", reason="needs sepdeploy[tflite]")
    kept = [replace(DENSE, mixed=arithmetic) for arithmetic in (Arithmetic.FLOAT32, Arithmetic.WEIGHTS_ONLY)]
    target = find_target(name, Precision.INT8, 1)
    files = write_block_files((DENSE, *kept), tmp_path, target.format, Precision.INT8)
    assert all(isinstance(file, Path) for file in files)
    share = int8_share_of_onnx if target.format is Format.ONNX else int8_share_of_tflite
    int8, *others = (share(Path(file)) for file in files)
    assert int8.ratio == 1
    frame = int8.macs - 36 * 9 * 32 * 32  # the convolutions around the block
    assert [proof.int8_macs for proof in others] == [frame, frame]
    reasons = [layer.reason for proof in others for layer in proof.float_layers]
    assert reasons == [FloatReason.WEIGHTS, FloatReason.WEIGHTS_ONLY]
    expected, *found = (
        open_session(Path(file), is_channels_last=name == "litert").predict(example_of(DENSE).numpy())[0]
        for file in files
    )
    for each in found:
        np.testing.assert_allclose(each, expected, atol=0.06 * np.abs(expected).max())
