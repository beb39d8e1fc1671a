"""How much memory the transfer needs: that of a batch, however many images there are."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.planning.candidates import propose_plan
from sepdeploy.planning.convert import convert_network
from sepdeploy.transfer import refine
from sepdeploy.transfer.anchor import find_anchor
from sepdeploy.transfer.recalibrate import recalibrate

SHAPE = (8, 8, 8)


class PeakBytes(TorchDispatchMode):
    """Most bytes at any one time in tensors that operators returned while the mode was on."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._live = {}
        self._bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(returned):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self._forget(storage._cdata)
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self._bytes += storage.nbytes()
        if self._bytes > self.peak:  # only then does it matter which are gone
            for key in [key for key, (reference, _) in self._live.items() if reference.expired()]:
                self._forget(key)
            self.peak = max(self.peak, self._bytes)
        return returned

    def _forget(self, key):
        self._bytes -= self._live.pop(key, (None, 0))[1]


def random_batches(count, size):
    """A new pass draws the images anew: not even they are all in memory."""

    def start():
        generator = torch.Generator().manual_seed(0)
        for _ in range(count // size):
            yield torch.randn(size, *SHAPE, generator=generator)

    return start


@torch.no_grad()
def peak_bytes(scheme, count, size):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    net.eval()
    trace = trace_network(net, torch.zeros(1, *SHAPE))
    plan = propose_plan(trace, scheme, SchemeOptions(terms=2, rank_ratio=0.3))
    assert len(plan.replaced) == 2
    batches = random_batches(count, size)
    with PeakBytes() as bytes_:
        converted, _ = convert_network(net, trace, plan, batches)
        recalibrate(net, converted, trace, plan, batches, batches)
    return bytes_.peak


@pytest.mark.parametrize("scheme", ["depthwise_separable", "low_rank"])
def test_peak_memory_grows_with_the_batch_and_not_with_the_images(scheme, monkeypatch):
    monkeypatch.setattr(refine, "_MAX_ROUNDS", 1)
    monkeypatch.setattr(refine, "_ITERATIONS_PER_ROUND", 1)
    few, many, wide = (peak_bytes(scheme, count, size) for count, size in ((64, 16), (256, 16), (64, 64)))
    assert many <= 1.02 * few
    assert wide > 2 * few
    patches = 16 * 8 * 9 * 8 * 8 * 4
    assert many < 5 * patches  # those of one batch, their copies and the activations; sums are small


def anchor_peak_bytes(layers):
    net = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(layers))).eval()
    with PeakBytes() as bytes_:
        assert find_anchor(net, "0.0", torch.randn(4, *SHAPE)) is not None
    return bytes_.peak


def test_looking_for_an_anchor_needs_no_more_memory_in_deeper_networks():
    assert anchor_peak_bytes(30) <= anchor_peak_bytes(3)
