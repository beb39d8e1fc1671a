"""Networks are captured for any number of images, or for one at a time where their code allows no more."""

import copy

import pytest
import torch
from torch import nn

from sepdeploy.analyze.flow_graph import capture_graph, fixed_batch_size
from sepdeploy.core.int8 import PLAIN
from sepdeploy.errors import UnsupportedModelError
from sepdeploy.quantize.prepare import prepare_int8


class OneImage(nn.Module):
    """Flattens as if there were never more than one image."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(64, 5)

    def forward(self, x):
        return self.linear(self.conv(x).reshape(1, -1))


class ByValue(OneImage):
    def forward(self, x):
        if x.sum() > 0:
            return super().forward(x)
        raise RuntimeError("darkness is not supported")


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.rand(6, 3, 6, 6)


@pytest.mark.parametrize("count", [1, 2])
def test_the_number_of_images_may_be_written_into_the_network(images, count):
    network = OneImage().eval()
    graph = capture_graph(network, images[:count])
    assert fixed_batch_size(graph) == 1
    with torch.no_grad():
        assert torch.equal(graph(images[3:4])[0], network(images[3:4]))


def test_any_number_of_images_where_it_is_possible(images):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval()
    graph = capture_graph(network, images[:1])
    assert fixed_batch_size(graph) is None
    assert graph(images)[0].shape == (6, 64)


def test_such_a_network_is_prepared_for_int8_image_by_image(images):
    network = OneImage().eval().requires_grad_(False)
    prepared = prepare_int8(
        network, copy.deepcopy, images[:1], lambda: [images], lambda: [images], len(images), PLAIN, None
    )
    assert prepared.sqnr_db > 20


def test_what_cannot_be_captured_at_all_says_why_at_first(images):
    with pytest.raises(UnsupportedModelError, match=r"data flow of the network cannot be captured: .*data-dependent"):
        capture_graph(ByValue().eval(), images[:1])
