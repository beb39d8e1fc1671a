import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from sepdeploy.core.artifact import Format, Precision, Role
from sepdeploy.core.chain import Chain, ChainSum, Factor, Shuffle
from sepdeploy.core.conv import ConvSpec, Trace
from sepdeploy.core.int8 import Int8Options
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.plan import Candidate, Decision, Plan, Replaced, SchemeOptions
from sepdeploy.core.stage_store import StageStore
from sepdeploy.errors import ContractError, ToolError, UnsupportedModelError, UsageError
from sepdeploy.schemes.module import ChainConv2d
from sepdeploy.stages import deploy
from sepdeploy.stages.deploy import _check_numerics, _largest_error, _numeric_error, fold_network
from sepdeploy.stages.report import _lowering_notes

NAN, INF = math.nan, math.inf
BATCH = np.ones((2, 3), np.float32)
NO_SITES = Trace(sites=(), input_shape=(1, 3), output_shapes=((1, 3),), total_macs=0, total_params=0)


def error(expected, found):
    return _largest_error((np.array(expected, np.float32),), (np.array(found, np.float32),))


def test_error_is_relative_to_the_largest_value_of_the_output():
    assert error([0.0, -200.0], [1.0, -200.0]) == pytest.approx(1 / 200)
    assert error([0.02, 0.04], [0.02, 0.03]) == pytest.approx(0.25)
    assert error([3e38], [-3e38]) == pytest.approx(2)  # no overflow


def test_small_outputs_may_be_off_by_rounding_only():
    tolerance = deploy._NUMERIC_TOLERANCE
    assert error([0.0, 0.0], [0.0, 0.0]) == 0
    assert error([0.0, 0.0], [0.9e-6, 0.0]) <= tolerance
    assert error([0.0, 0.0], [1.1e-6, 0.0]) > tolerance
    assert error([1e-3], [2e-3]) > tolerance


def test_nan_is_never_equal_and_never_lost_among_outputs():
    assert math.isnan(error([NAN], [NAN]))
    assert math.isnan(error([1.0, 2.0], [1.0, NAN]))
    fine, broken = np.ones(2), np.array([1.0, NAN])
    assert math.isnan(_largest_error((fine, fine), (fine, broken)))
    assert math.isnan(_largest_error((fine, fine), (broken, fine)))


def test_infinities_are_equal_to_themselves_and_leave_the_range_alone():
    assert error([-INF, 1.0], [-INF, 1.0]) == 0
    assert error([-INF, 1.0], [-INF, 1.5]) == 0.5
    assert error([-INF, 1.0], [INF, 1.0]) == INF
    assert error([-INF, 1.0], [-1e38, 1.0]) == INF


class Sum(nn.Module):
    """Adds a constant to each output value."""

    def __init__(self, *values):
        super().__init__()
        self.values = torch.tensor(values)

    def forward(self, x):
        return x + self.values


def sum_file(path, *values):
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "c"], ["y"])],
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor("c", TensorProto.FLOAT, [3], values)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


@pytest.mark.parametrize("values", [(0.0, 0.0, 0.5), (0.0, 0.0, NAN), (0.0, 0.0, INF)])
def test_file_that_computes_something_else_is_refused(tmp_path, values):
    path = sum_file(tmp_path / "net.onnx", *values)
    with pytest.raises(ToolError, match=r"exported \.onnx file computes something else"):
        _check_numerics(path, Sum(0.0, 0.0, 0.0), BATCH, is_channels_last=False)


def test_reported_error_is_absolute_and_finite(tmp_path):
    path = sum_file(tmp_path / "net.onnx", 99.0, -INF, 0.0)
    _check_numerics(path, Sum(99.0, -INF, 0.0), BATCH, is_channels_last=False)
    assert _numeric_error(path, Sum(99.0, -INF, 0.5), BATCH, is_channels_last=False) == 0.5
    for values in ((99.0, 0.0, 0.0), (99.0, -INF, NAN)):
        with pytest.raises(ToolError, match=r"net\.onnx gives NaN or infinite values"):
            _numeric_error(path, Sum(*values), BATCH, is_channels_last=False)


def test_network_that_gives_nan_is_refused_before_it_is_compared():
    with pytest.raises(UnsupportedModelError, match="gives NaN on validation images"):
        fold_network(Sum(0.0, 0.0, NAN), NO_SITES, BATCH)


@pytest.mark.parametrize("wrong", [0.5, NAN])
def test_fold_that_changes_the_outputs_is_a_bug(monkeypatch, wrong):
    monkeypatch.setattr(deploy, "fold_batchnorm", lambda network, norms: network.values.fill_(wrong))
    with pytest.raises(ContractError, match="folding the batch norms changed the outputs"):
        fold_network(Sum(0.0, 0.0, 0.0), NO_SITES, BATCH)


SPEC = ConvSpec(8, 8, (3, 3), padding=(1, 1, 1, 1))
SHUFFLED = ChainSum(
    (Chain((Factor(8, 8, (3, 3), padding=(1, 1, 1, 1), groups=2), Shuffle(2), Factor(8, 8, (1, 1), groups=4))),)
)
PLAIN = ChainSum((Chain((Factor(8, 8, (3, 3), padding=(1, 1, 1, 1), groups=8), Factor(8, 8, (1, 1)))),))


UNCHANGED = Int8Options(equalizes=False, corrects_bias=False)


class Images:
    """What deploy asks of a set of images."""

    sha256 = "images"
    preprocess = SimpleNamespace(layout="NCHW")
    pixels = np.random.default_rng(0).standard_normal((8, 8, 6, 6)).astype(np.float32)

    def head(self, count):
        return self

    def split(self, ratio, seed):
        return self, self

    def __len__(self):
        return len(self.pixels)

    def batches(self, size):
        for start in range(0, len(self.pixels), size):
            yield self.pixels[start : start + size], None


class Run:
    """Deploys a network with one convolution of the given form, again and again into the same folder."""

    def __init__(self, folder, form):
        torch.manual_seed(0)
        chain = ChainConv2d(form, SPEC, bias=True)
        self.folder, self.network = folder, nn.Sequential(chain, nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
        self.stages = []

    def stage(self, text):
        self.stages.append(text)

    def step(self, done, total):
        pass

    def deploy(self, lowering=None, role=Role.CONVERTED, plan=None, int8=UNCHANGED):
        self.stages = []
        options = ConvertOptions(
            Path("model.pt"), "a:b", "images", formats=(Format.ONNX,), lowering=lowering, int8=int8
        )
        example = torch.from_numpy(Images.pixels[:1])
        inputs = SimpleNamespace(calibration=Images(), validation=Images(), network_key=dict, example=lambda: example)
        store = StageStore(self.folder, on_change=lambda: None)
        trace = Trace(sites=(), input_shape=(1, 8, 6, 6), output_shapes=((1, 4, 6, 6),), total_macs=0, total_params=0)
        return deploy.deploy(store, options, inputs, trace, self.network, role, "weights", self, plan)

    def ops(self, name):
        return {node.op_type for node in onnx.load(self.folder / name).graph.node}


def test_each_file_is_lowered_as_its_runtime_likes_it(tmp_path):
    run = Run(tmp_path, SHUFFLED)
    float_file, int8_file = run.deploy()
    assert "Gather" in run.ops("model.onnx")
    assert "Gather" not in run.ops("work/int8_source.converted.onnx") | run.ops("model.int8.onnx")
    assert (float_file.artifact.precision, int8_file.artifact.precision) == (Precision.FLOAT32, Precision.INT8)
    assert float_file.max_abs_error < 1e-5 < int8_file.max_abs_error < 0.1
    assert isinstance(run.network[0].form.terms[0].stages[1], Shuffle)  # the network itself stays
    assert len(run.stages) == 4
    run.deploy()
    assert run.stages == []


def test_one_form_for_both_files_needs_no_second_export(tmp_path):
    run = Run(tmp_path, PLAIN)
    run.deploy()
    assert [stage.split()[0] for stage in run.stages] == ["finding", "exporting", "quantizing"]
    assert not (tmp_path / "work" / "int8_source.converted.onnx").exists()
    run.deploy(lowering=("fold_norm", "terms_as_branches"))  # changes nothing here
    assert run.stages == []


def test_another_lowering_makes_the_files_anew(tmp_path):
    run = Run(tmp_path, SHUFFLED)
    run.deploy()
    run.deploy(lowering=("fold_shuffle",))
    assert "Gather" not in run.ops("model.onnx") | run.ops("model.int8.onnx")
    assert run.stages == ["exporting the converted network to onnx"]  # the same bytes as those quantized before
    run.deploy(lowering=("hybrid",))
    assert len(run.stages) == 2
    assert "Concat" in run.ops("model.onnx") & run.ops("model.int8.onnx")
    run.deploy(lowering=())
    assert {"Gather"} == (run.ops("model.onnx") & run.ops("model.int8.onnx") & {"Gather", "Concat"})


def test_a_plan_lowers_the_files_that_it_was_priced_on(tmp_path):
    def plan(lowering, lowered_for):
        candidate = Candidate("any", SHUFFLED, macs=1, params=1, lowering=lowering)
        return Plan("auto", SchemeOptions(), (Decision("0", 9, 9, Replaced(candidate)),), lowered_for)

    run = Run(tmp_path, SHUFFLED)
    run.deploy(plan=plan(("fold_shuffle",), "ort float32"))
    assert "Gather" not in run.ops("model.onnx")
    run.deploy(plan=plan(("fold_shuffle",), "ort float32"), lowering=())  # the user's word counts more
    assert "Gather" in run.ops("model.onnx")
    for other in ("litert float32", "ort int8", ""):
        run.deploy(plan=plan(("fold_shuffle",), other))
        assert "Gather" in run.ops("model.onnx")


def test_unknown_lowering_is_refused_before_anything_is_made(tmp_path):
    run = Run(tmp_path, PLAIN)
    with pytest.raises(UsageError, match="no lowering 'towers'"):
        run.deploy(lowering=("towers",))
    assert run.stages == []


def test_a_lowering_that_computes_something_else_is_found(tmp_path, monkeypatch):
    def wrong(network, names, own):
        network[2].bias.data += 1

    monkeypatch.setattr(deploy, "lower_chains", wrong)
    with pytest.raises(ToolError, match="computes something else"):
        Run(tmp_path, SHUFFLED).deploy(lowering=("fold_shuffle",))
    assert not (tmp_path / "model.onnx").exists()


def test_note_names_lowerings_that_apply_nowhere(tmp_path):
    def notes(form, *names):
        options = ConvertOptions(Path("model.pt"), "a:b", "images", lowering=names or None)
        return _lowering_notes(options, Run(tmp_path, form).network)

    assert notes(SHUFFLED) == notes(SHUFFLED, "fold_shuffle") == ()
    assert notes(PLAIN, "resnext", "fold_norm", "fold_shuffle") == (
        "--lowering fold_norm applies to no convolution: it has no batch norm between its stages",
        "--lowering fold_shuffle applies to no convolution: it has no channel shuffle",
    )
    options = ConvertOptions(Path("model.pt"), "a:b", "images", lowering=("resnext",))
    assert _lowering_notes(options, nn.ReLU()) == ("--lowering resnext applies to no convolution: none is replaced",)


def test_a_lowering_is_named_once():
    with pytest.raises(UsageError, match="--lowering names one twice: resnext,resnext"):
        ConvertOptions(Path("model.pt"), "a:b", "images", lowering=("resnext", "resnext"))


@pytest.mark.parametrize(("target", "fails"), [("cortex-a72", False), ("cortex-a72:ort", True)])
def test_files_of_the_other_format_may_stay_unmeasured(monkeypatch, target, fails):
    def compare(files, **_):
        if files[0].format is Format.ONNX:
            raise ToolError("the board has no onnxruntime")
        return [counts for _ in files]

    counts = SimpleNamespace()
    kind = SimpleNamespace(name="a core", method=None, make=lambda *_: SimpleNamespace(compare=compare))
    monkeypatch.setattr(deploy, "find_kind", lambda _: kind)
    monkeypatch.setattr(deploy, "_with_measured", lambda result, measured: (result, measured))
    results = [
        SimpleNamespace(artifact=SimpleNamespace(format=each, precision=Precision.INT8, role=Role.ORIGINAL))
        for each in (Format.TFLITE, Format.ONNX)
    ]
    options = SimpleNamespace(
        formats=tuple(Format), precisions=(Precision.INT8,), target=target, threads=1, bench_seconds=1.0, seed=0
    )
    said = []
    progress = SimpleNamespace(stage=said.append)
    if fails:
        with pytest.raises(ToolError, match="no onnxruntime"):
            deploy.measure_cost(results, options, progress)
        return
    measured = deploy.measure_cost(results, options, progress)
    assert sorted(measured, key=str) == sorted([results[1], (results[0], counts)], key=str)
    assert any("onnx int8 files stay unmeasured: the board has no onnxruntime" in line for line in said)
