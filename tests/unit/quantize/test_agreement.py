"""Both files and the simulation, made from one set of ranges, give the same outputs."""

import copy

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from sepdeploy.analyze.flow_graph import capture_graph
from sepdeploy.analyze.trace import trace_network
from sepdeploy.bench.session import open_session
from sepdeploy.core.int8 import Int8Options
from sepdeploy.core.onnx_steps import output_steps
from sepdeploy.export.onnx import export_onnx
from sepdeploy.export.tflite import export_tflite
from sepdeploy.passes.convolve_batchnorms import convolve_batchnorms, lone_batchnorms
from sepdeploy.passes.equalize_channels import equalize_channels
from sepdeploy.passes.fold_batchnorm import fold_batchnorm
from sepdeploy.quantize.agreement import (
    affines_of_onnx,
    affines_of_tflite,
    agreement_ratio,
    simulation_of_file,
)
from sepdeploy.quantize.file_ranges import match_places
from sepdeploy.quantize.inspect_int8 import float_ops_of_onnx, float_ops_of_tflite
from sepdeploy.quantize.onnx_qdq import OnnxTensors, quantize_onnx
from sepdeploy.quantize.prepare import prepare_int8, sqnr_db
from sepdeploy.quantize.saturation import saturates_u8s8
from sepdeploy.quantize.simulate import fake_quantized, quantized_places
from sepdeploy.quantize.tflite_int8 import TfliteTensors, quantize_tflite


def prepare(net, calibration, options):
    folded = copy.deepcopy(net)
    images = torch.from_numpy(calibration)
    trace = trace_network(folded, images[:1])
    fold_batchnorm(folded, {site.name: site.norm for site in trace.sites if site.norm})
    convolve_batchnorms(folded, lone_batchnorms(folded, images[:1]))
    fit, held_out = images[:16], images[16:]

    def equalize(network, example, batches):
        return f"{sum(layer.scaled for layer in equalize_channels(network, example, batches))} channels"

    return prepare_int8(
        folded, copy.deepcopy, images[:1], lambda: [fit], lambda: [held_out], len(held_out), options, equalize
    )


class Files:
    """One network as int8 files of both formats."""

    def __init__(self, net, calibration, folder):
        self.prepared = prepare(net, calibration, Int8Options())
        self.images = [calibration[i : i + 1] for i in range(16)]
        self.images_nhwc = [np.ascontiguousarray(x.transpose(0, 2, 3, 1)) for x in self.images]
        self.onnx, self.tflite = folder / "net.onnx", folder / "net.tflite"
        example = torch.from_numpy(self.images[0])
        export_onnx(self.prepared.network, example, self.onnx)
        export_tflite(self.prepared.network, example, self.tflite, is_channels_last=True)
        self.quantize("float32", "int8")

    def quantize(self, onnx_io, tflite_io):
        given = {"places": self.prepared.places, "method": self.prepared.method}
        quantize_onnx(self.onnx, self.int8_onnx, iter(self.images), io=onnx_io, **given)
        quantize_tflite(self.tflite, self.int8_tflite, iter(self.images_nhwc), io=tflite_io, **given)

    @property
    def int8_onnx(self):
        return self.onnx.with_suffix(".int8.onnx")

    @property
    def int8_tflite(self):
        return self.tflite.with_suffix(".int8.tflite")

    def affines(self):
        return affines_of_onnx(self.int8_onnx), affines_of_tflite(self.int8_tflite)

    def outputs(self, batch):
        return (
            open_session(self.int8_onnx).predict(batch),
            open_session(self.int8_tflite, is_channels_last=True).predict(batch),
        )


@pytest.fixture(scope="module")
def plain(net, calibration):
    return prepare(net, calibration, Int8Options("minmax", equalizes=False, corrects_bias=False))


@pytest.fixture(scope="module")
def files(net, calibration, tmp_path_factory):
    pytest.importorskip("litert_torch", reason="needs sepdeploy[tflite]")
    return Files(net, calibration, tmp_path_factory.mktemp("files"))


def test_files_and_simulation_agree(files, validation):
    if saturates_u8s8():
        pytest.skip("this processor needs 7-bit weights in ONNX files, so the two files differ by design")
    graph = capture_graph(files.prepared.network, torch.from_numpy(files.images[0]))
    affines = files.affines()
    tensors = OnnxTensors(onnx.load(str(files.onnx)), "input"), TfliteTensors(files.tflite)
    probes = files.images[:2], files.images_nhwc[:2]
    simulated = []
    for format_tensors, format_affines, images in zip(tensors, affines, probes, strict=True):
        network = simulation_of_file(graph, files.prepared.places, format_tensors, format_affines, images)
        with torch.no_grad():
            simulated.append([output.numpy() for output in network(torch.from_numpy(validation))])
    step = output_steps(files.int8_onnx)
    assert step == pytest.approx([files.prepared.places[-1].affine.scale])
    of_onnx, of_tflite = files.outputs(validation)
    assert np.array_equal(*(each[0] for each in simulated))  # the scales in both files are the same
    assert agreement_ratio(of_onnx, of_tflite, step) >= 0.99
    assert agreement_ratio(of_onnx, simulated[0], step) >= 0.99
    assert agreement_ratio(of_tflite, simulated[1], step) >= 0.99


class Joined(nn.Module):
    """Concatenations of what only they read, of what others read too, of a sigmoid, and of enlarged maps."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.down, self.gate = nn.Conv2d(12, 6, 3, stride=2, padding=1), nn.Conv2d(6, 4, 1)
        self.enlarge = nn.Upsample(scale_factor=2, mode="nearest")
        self.last = nn.Conv2d(30, 5, 1)

    def forward(self, x):
        x = self.first(x).relu()
        y = torch.cat([self.left(x).relu(), self.right(10 * x)], 1)
        z = self.down(y)
        z = self.enlarge(torch.cat([z, self.gate(z).sigmoid()], 1))
        return self.last(torch.cat([x, y, z], 1)).mean((2, 3))


def test_what_is_joined_has_one_scale_in_both_files(calibration, validation, tmp_path):
    pytest.importorskip("litert_torch", reason="needs sepdeploy[tflite]")
    torch.manual_seed(0)
    net = Joined().eval()
    found = Files(net, calibration, tmp_path)
    of_onnx, of_tflite = ({round(each.scale, 9) for each in affines.values()} for affines in found.affines())
    assert of_onnx == of_tflite
    if not saturates_u8s8():
        assert agreement_ratio(*found.outputs(validation), output_steps(found.int8_onnx)) >= 0.99


class PreActivation(nn.Module):
    """Norms that no convolution precedes, channels with a factor of 0 or nearly so, and a SiLU."""

    def __init__(self):
        super().__init__()
        self.first, self.block = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.norm, self.last, self.joined = nn.BatchNorm2d(12), nn.BatchNorm2d(12), nn.BatchNorm2d(24)
        self.dead, self.head = nn.Sequential(nn.Conv2d(24, 12, 1), nn.BatchNorm2d(12)), nn.Linear(12, 5)
        with torch.no_grad():
            for norm in (self.norm, self.last, self.joined, self.dead[1]):
                norm.running_mean.normal_(0, 0.3)
                norm.running_var.uniform_(0.05, 0.5)
                norm.weight.uniform_(-1.5, 1.5)
            for norm in (self.norm, self.dead[1]):
                norm.weight[:3] = torch.tensor([0.0, 1e-13, 1e-8])
                norm.bias[:3] = torch.tensor([0.6, 0.4, 0.8])

    def forward(self, x):
        x = self.first(x)
        y = self.last(x + self.block(self.norm(x).relu()))
        return self.head(nn.functional.silu(self.dead(self.joined(torch.cat([x, y], 1)).relu())).mean((2, 3)))


def test_lone_norms_dead_channels_and_sigmoids_inside_are_the_same_in_both_files(calibration, validation, tmp_path):
    pytest.importorskip("litert_torch", reason="needs sepdeploy[tflite]")
    torch.manual_seed(0)
    net = PreActivation().eval()
    images = torch.from_numpy(validation)
    wanted = net(images).detach().numpy()
    found = Files(net, calibration, tmp_path)
    assert found.prepared.is_changed
    of_onnx, of_tflite = ({round(each.scale, 9) for each in affines.values()} for affines in found.affines())
    assert of_onnx == of_tflite
    assert float_ops_of_onnx(found.int8_onnx) == float_ops_of_tflite(found.int8_tflite) == ()
    for (output,) in found.outputs(validation):
        assert 10 * np.log10(np.sum(wanted**2) / np.sum((wanted - output) ** 2)) > 25
    if not saturates_u8s8():
        assert agreement_ratio(*found.outputs(validation), output_steps(found.int8_onnx)) >= 0.99


def test_files_have_the_ranges_of_the_network(files):
    wanted = {(round(p.affine.scale, 9), p.affine.zero_point) for p in files.prepared.places}
    for found in files.affines():
        assert {(round(each.scale, 9), each.zero_point) for each in found.values()} >= wanted


def test_a_file_takes_and_returns_what_is_asked_for(files, validation):
    before = files.outputs(validation)
    sizes = {"float32": "FLOAT", "int8": "INT8", "uint8": "UINT8"}
    for io in ("int8", "uint8", "float32"):
        files.quantize(io, io)
        graph = onnx.load(str(files.int8_onnx)).graph
        ends = {onnx.TensorProto.DataType.Name(end.type.tensor_type.elem_type) for end in (*graph.input, *graph.output)}
        assert ends == {sizes[io]}
        interpreter = open_session(files.int8_tflite, is_channels_last=True)._interpreter
        details = (*interpreter.get_input_details(), *interpreter.get_output_details())
        assert {np.dtype(detail["dtype"]).name for detail in details} == {io}
        for found, wanted in zip(files.outputs(validation), before, strict=True):
            assert np.allclose(found[0], wanted[0], atol=1e-6)
    files.quantize("float32", "int8")


def test_the_simulation_says_what_the_file_loses(files, net, validation):
    images = torch.from_numpy(validation)
    graph = capture_graph(files.prepared.network, images[:1])
    simulated = fake_quantized(graph, {place.name: place.affine for place in files.prepared.places})
    predicted = sqnr_db(graph, simulated, [images])
    wanted = net(images).detach().numpy()
    (found,) = files.outputs(validation)[0]
    assert 10 * np.log10(np.sum(wanted**2) / np.sum((wanted - found) ** 2)) == pytest.approx(predicted, abs=0.5)


def test_auto_takes_the_best_method(net, calibration, plain):
    best = prepare(net, calibration, Int8Options("auto", equalizes=False, corrects_bias=False))
    assert best.sqnr_db >= plain.sqnr_db
    assert f"minmax {plain.sqnr_db:.1f} dB" in best.steps[0].detail
    assert best.steps[0].detail.startswith(f"{best.method}: ")
    assert not best.is_changed


def test_activations_are_rounded_once_where_they_are_fused(net, calibration):
    graph = capture_graph(copy.deepcopy(net), torch.from_numpy(calibration[:1]))
    names = [node.name for node in quantized_places(graph)]
    assert "relu" in names
    assert sum(name.startswith(("hardtanh", "relu6")) for name in names) == 1
    assert "conv2d" not in names or "_native_batch_norm_legit_no_training" not in names


def test_gradients_pass_through_the_rounding_and_end_at_the_clip(plain, calibration):
    graph = capture_graph(copy.deepcopy(plain.network), torch.from_numpy(calibration[:1]))
    network = fake_quantized(graph, {place.name: place.affine for place in plain.places})
    x = torch.from_numpy(calibration[:4]).requires_grad_()
    network(x)[0].square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in graph.parameters())
    assert bool(x.grad.abs().sum() > 0)
    far = (torch.ones_like(x) * 1e4).requires_grad_()
    network(far)[0].sum().backward()
    assert not far.grad.any()


def test_tensors_of_zeros_and_of_other_sizes_match_nothing(plain):
    places = plain.places
    prints = places[1].fingerprints
    other = tuple((count + 1, *rest) for count, *rest in prints)
    zeros = tuple((count, 0.0, 0.0, 0.0, 0.0, 0.0) for count, *_ in prints)
    assert match_places(places, {"same": prints, "other": other, "zeros": zeros}) == {"same": places[1]}
