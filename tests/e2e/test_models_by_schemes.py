"""Every reference network under every scheme: it converts, runs, keeps its outputs' shapes, and its counts add up."""

from functools import lru_cache

import pytest
import torch

from sepdeploy.analyze.trace import output_tensors, trace_network
from sepdeploy.core.plan import Reason, SchemeOptions
from sepdeploy.loading.arch import build_architecture
from sepdeploy.planning.candidates import drop_failing, propose_plan
from sepdeploy.planning.convert import convert_network
from sepdeploy.schemes.module import ChainConv2d
from sepdeploy.schemes.scheme import SCHEMES

MODELS = {
    "models.resnet_cifar:resnet20": 32,
    "models.resnet_cifar:resnet20_imagenet40(num_classes=10, width=0.25)": 32,
    "models.resnet:resnet18(num_classes=10, width=0.25)": 64,
    "models.vgg:vgg16(num_classes=10, width=0.125)": 64,
    "models.mobilenet:mobilenet_v1(num_classes=10, width=0.25)": 64,
    "models.mobilenet:mobilenet_v2(num_classes=10, width=0.25)": 64,
    "models.resnext:resnext29_8x64d(num_classes=10, width=0.25)": 32,
    "models.inception:googlenet(num_classes=10, width=0.25)": 64,
    "models.xception:xception(num_classes=10, width=0.25)": 96,
    "models.darknet:darknet19(num_classes=10, width=0.25)": 64,
    "models.fractalnet:fractalnet_cifar(num_classes=10, width=0.25)": 32,
    "models.darts:darts_cifar(num_classes=10, width=0.25)": 32,
    "models.darts:darts_imagenet(num_classes=10, width=0.25)": 64,
}
NOTHING_TO_REPLACE = {
    # Grouped 3x3 convolutions, or depthwise ones, and 1x1 ones; besides a stem of three channels.
    "models.resnext:resnext29_8x64d": {"depthwise", "spatial_optimized"},
    "models.mobilenet:mobilenet_v1": {"depthwise", "depthwise_separable", "spatial_separable", "spatial_optimized"},
    "models.mobilenet:mobilenet_v2": {"depthwise", "depthwise_separable", "spatial_separable", "spatial_optimized"},
    "models.darts:darts_cifar": {"depthwise", "depthwise_separable", "spatial_separable", "spatial_optimized"},
}
OPTIONS = SchemeOptions(terms=1, rank_ratio=0.1)


@lru_cache(maxsize=1)
def traced_network(spec):
    torch.manual_seed(0)
    network = build_architecture(spec).module.eval()
    example = torch.randn(1, 3, MODELS[spec], MODELS[spec])
    return network, example, trace_network(network, example)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "dense"])
@pytest.mark.parametrize("spec", MODELS)
@torch.no_grad()
def test_converts_runs_and_counts(spec, scheme):
    network, example, trace = traced_network(spec)
    plan = drop_failing(network, trace, propose_plan(trace, scheme, OPTIONS, network), example)
    assert [decision.name for decision in plan.decisions] == [site.name for site in trace.sites]
    assert len(plan.replaced) + len(plan.kept) == len(trace.sites)
    assert not {kept.reason for kept in plan.kept.values()} & {Reason.REPLACEMENT_FAILS, Reason.OPTIONS_DO_NOT_FIT}
    replaces_nothing = scheme in NOTHING_TO_REPLACE.get(spec.partition("(")[0], set())
    assert bool(plan.replaced) != replaces_nothing

    converted, transfers = convert_network(network, trace, plan, list, method="data-free")
    assert [transfer.name for transfer in transfers] == list(plan.replaced)
    outputs = output_tensors(converted(example))
    assert tuple(tuple(output.shape) for output in outputs) == trace.output_shapes
    assert all(bool(torch.isfinite(output).all()) for output in outputs)

    after = trace_network(converted, example)
    saved = sum(trace.site(name).macs - candidate.macs for name, candidate in plan.replaced.items())
    assert after.total_macs == trace.total_macs - saved
    assert saved > 0 or replaces_nothing
    forms = {name: module for name, module in converted.named_modules() if isinstance(module, ChainConv2d)}
    assert {name: module.form.params for name, module in forms.items()} == {
        name: candidate.form.params + (candidate.form.out_channels if trace.site(name).spec.has_bias else 0)
        for name, candidate in plan.replaced.items()
    }
