"""Linear layers go all the way, from the plan to a loaded bundle; and the notes on what a conversion costs."""

import numpy as np
import onnxruntime
import pytest
import torch

import sepdeploy
from sepdeploy.analyze.liveness import measure_memory
from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.planning.candidates import propose_plan
from sepdeploy.planning.convert import convert_network
from sepdeploy.schemes.module import ChainLinear
from sepdeploy.stages.report import _field_notes, _memory_notes


@pytest.fixture(scope="module")
def converted(workplace):
    options = workplace.options("Flattened", scheme="grouped", includes_linear=True)
    return options, sepdeploy.convert(options)


def test_the_linear_layer_is_replaced_and_comes_back(workplace, converted):
    options, report = converted
    assert {"features.1.0", "linear"} <= set(report.plan.replaced)
    assert report.converted.params < report.original.params
    network = sepdeploy.load(options.output_folder)
    assert isinstance(network.linear, ChainLinear)
    x = np.random.default_rng(0).random((1, 3, 16, 16), np.float32)
    session = onnxruntime.InferenceSession(options.output_folder / "model.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"input": x})
    with torch.no_grad():
        np.testing.assert_allclose(output, network(torch.from_numpy(x)).numpy(), atol=1e-4, rtol=1e-4)


def test_without_the_option_it_stays(workplace):
    report = sepdeploy.convert(workplace.options("Flattened", scheme="grouped", output=workplace.folder / "plain"))
    assert "linear" not in {decision.name for decision in report.plan.decisions}


def test_a_broken_receptive_field_is_noted(converted):
    _, report = converted
    (note,) = [note for note in report.notes if "no longer see every channel" in note]
    assert note.startswith("2 of 2 replaced convolutions")
    assert "sees 25% of them" in note


@pytest.mark.parametrize(
    ("scheme", "options", "share"),
    [
        ("optimized_separable", SchemeOptions(), None),
        ("optimized_separable", SchemeOptions(overlap=0.25), "25%"),
        ("depthwise", SchemeOptions(), "6.25%"),
    ],
)
def test_only_forms_that_see_less_are_noted(scheme, options, share):
    network, example = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, padding=1)).eval(), torch.zeros(1, 16, 8, 8)
    trace = trace_network(network, example)
    notes = _field_notes(trace, propose_plan(trace, scheme, options, network))
    assert len(notes) == (share is not None)
    assert all(f"sees {share} of them" in note for note in notes)


def test_more_memory_is_noted_with_the_worst_layer_and_less_is_not(workplace):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Conv2d(16, 16, 3, padding=1)).eval()
    example = torch.zeros(1, 3, 8, 8)
    trace = trace_network(network, example)
    before = measure_memory(network, example)

    def notes(scheme, options):
        plan = propose_plan(trace, scheme, options, network)
        after = measure_memory(convert_network(network, trace, plan, list, method="data-free")[0], example)
        return _memory_notes(workplace.options("Classifier"), plan, before, after)

    # 3 channels of the image, then 16 in and 16 out; with two terms the running sum, a middle and an output.
    (note,) = notes("depthwise_separable", SchemeOptions(terms=2))
    assert "1 of 1 separable forms keep more alive while they run, 1 1.46x as much" in note
    assert notes("low_rank", SchemeOptions(rank_ratio=0.1)) == ()
