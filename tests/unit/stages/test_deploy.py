from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.artifact import Format, Precision, Role
from sepdeploy.core.chain import Chain, ChainSum, Factor, Shuffle
from sepdeploy.core.codec import read_json
from sepdeploy.core.conv import ConvSpec, Trace
from sepdeploy.core.int8 import Int8Options
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.plan import Candidate, Decision, Plan, Replaced, SchemeOptions
from sepdeploy.core.stage_store import StageStore
from sepdeploy.errors import ToolError, UsageError
from sepdeploy.schemes.module import ChainConv2d
from sepdeploy.stages import deploy
from sepdeploy.stages.int8 import Int8Record, LoneNorms, without_lone_norms
from sepdeploy.stages.report import _lowering_notes

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


class Half(Images):
    """Some of them, where it is no matter which."""

    pixels = Images.pixels[:4]


class Run:
    """Deploys a network with one convolution of the given form, again and again into the same folder."""

    def __init__(self, folder, form):
        torch.manual_seed(0)
        chain = ChainConv2d(form, SPEC, bias=True)
        self.folder, self.network = folder, nn.Sequential(chain, nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
        shapes = {"input_shape": (1, 8, 6, 6), "output_shapes": ((1, 4, 6, 6),)}
        self.traced, self.stages = Trace(sites=(), total_macs=0, total_params=0, **shapes), []

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
        return deploy.deploy(store, options, inputs, self.traced, self.network, role, "weights", self, plan)

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


def test_terms_are_joined_before_their_weights_are_rounded(tmp_path, monkeypatch):
    """What adaptive rounding put on a grid is on the grid of the file: rounding it again changes nothing."""
    monkeypatch.setattr("sepdeploy.quantize.prepare._MIN_GAIN_DB", -100.0)
    monkeypatch.setattr(Images, "split", lambda *_: (Half(), Half()))
    run = Run(tmp_path, ChainSum(PLAIN.terms * 2))
    with torch.no_grad():
        for weight in run.network[0].parameters():
            weight *= torch.linspace(1, 3, len(weight)).reshape(-1, *[1] * (weight.dim() - 1))
    int8 = Int8Options(equalizes=False, corrects_bias=False, rounds_adaptively=True)
    (tmp_path / "work").mkdir()
    _, result = run.deploy(int8=int8)
    assert "Add" not in run.ops("model.int8.onnx")
    record = read_json(Int8Record, tmp_path / "work" / "int8.converted.json")
    assert len(record.places) == 4  # the input, the joined channels, the layer with its ReLU, the last layer
    prepared = torch.load(tmp_path / "work" / "int8.converted.pt", weights_only=True)
    graph = onnx.load(tmp_path / "model.int8.onnx").graph
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    pairs = [
        (constants[node.input[0]], constants[node.input[1]])
        for node in graph.node
        if node.op_type == "DequantizeLinear" and constants.get(node.input[0], np.zeros(0)).ndim == 4
    ]
    written = [codes * scales.reshape(-1, 1, 1, 1) for codes, scales in pairs]
    for value in (each.numpy() for each in prepared.values() if each.dim() == 4):
        assert min(np.abs(value - each).max() for each in written if each.shape == value.shape) < 1e-6
    assert result.int8_steps[-1].name == "adaptive rounding"
    assert result.int8_steps[-1].is_kept


def test_norms_without_a_convolution_before_them_are_int8_and_stay_norms_in_float(tmp_path):
    run = Run(tmp_path, PLAIN)
    norm = nn.BatchNorm2d(8)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    up = nn.ConvTranspose2d(4, 4, 2, stride=2, bias=False)
    run.network = nn.Sequential(norm, nn.ReLU(), *run.network, up, nn.BatchNorm2d(4, eps=3.0)).eval()
    float_file, int8_file = run.deploy()
    assert "BatchNormalization" in run.ops("model.onnx")
    assert "BatchNormalization" not in run.ops("work/int8_source.converted.onnx") | run.ops("model.int8.onnx")
    assert not any(op.startswith("BatchNorm") for op in int8_file.float_ops)
    assert float_file.max_abs_error < 1e-5 < int8_file.max_abs_error < 0.1
    record = read_json(Int8Record, tmp_path / "work" / "int8.converted.json")
    assert record.norms == LoneNorms({"5": "6"}, ("0",))
    assert not record.is_changed
    assert isinstance(run.network[0], nn.BatchNorm2d)  # the network itself stays
    run.deploy()
    assert run.stages == []


@torch.no_grad()
def test_norms_that_hold_their_activation_are_folded_and_none_stays_float(make_net, tmp_path):
    run = Run(tmp_path, PLAIN)
    first = make_net("norm_with_children", seed=1)[0][1]
    run.network = nn.Sequential(first, make_net("norm_with_children")[0], make_net("frozen_norm")[0]).eval()
    run.traced = trace_network(run.network, torch.from_numpy(Images.pixels[:1]))
    float_file, int8_file = run.deploy()
    assert Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node) == {
        "Conv": 5, "Relu": 4, "PRelu": 1, "BatchNormalization": 1,
    }  # fmt: skip
    assert not {"BatchNormalization", "Mul", "Add"} & run.ops("model.int8.onnx")
    assert float_file.max_abs_error < 1e-5 < int8_file.max_abs_error
    record = read_json(Int8Record, tmp_path / "work" / "int8.converted.json")
    assert record.norms == LoneNorms({}, ("0",))


class Reading(nn.Module):
    """Reads the statistics of a norm besides, which must then stay a norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(x) * self.norm.running_var.reshape(8, 1, 1)


def test_a_norm_that_the_network_reads_otherwise_stays():
    network = Reading().eval()
    assert without_lone_norms(network, torch.from_numpy(Images.pixels[:1])) == (network, LoneNorms())


def test_norms_of_other_classes_that_the_network_looks_into_do_not_keep_plain_ones(make_net):
    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.other = (make_net("norm_with_children")[0][i] for i in (1, 3))
            self.plain.__class__ = nn.BatchNorm2d

        def forward(self, x):
            return self.other(self.plain(x)) * self.other.running_var.sum()

    network, x = Looking().eval(), torch.from_numpy(Images.pixels[:1])
    written, norms = without_lone_norms(network, x)
    assert norms == LoneNorms({}, ("plain",))
    torch.testing.assert_close(written(x), network(x))


class OneSignal(nn.Module):
    """A 1-d convolution without a batch: what follows it takes its channels for images."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(8, 8, 3), nn.BatchNorm1d(62)

    def forward(self, x):
        return self.norm(self.conv(x.flatten(2)[0]))


def test_norms_behind_layers_that_cannot_take_them_become_convolutions():
    parametrized = nn.Sequential(nn.Flatten(), nn.Linear(512, 4), nn.BatchNorm1d(4)).eval()
    nn.utils.parametrize.register_parametrization(parametrized[1], "bias", nn.Identity())
    for network, norm, shape in ((parametrized, "2", (1, 8, 8, 8)), (OneSignal().eval(), "norm", (1, 8, 8, 8))):
        network.get_submodule(norm).running_var.uniform_(0.5, 2)
        written, norms = without_lone_norms(network, torch.randn(shape))
        assert norms == LoneNorms({}, (norm,))
        x = torch.randn(shape)
        torch.testing.assert_close(written(x), network(x))


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
