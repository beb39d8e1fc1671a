import pytest
from torch import nn

from sepdeploy.core.training import TrainOptions
from sepdeploy.train.optimization import learning_rate, make_optimizer


def test_learning_rate_rises_and_falls():
    options = TrainOptions(learning_rate=1.0, warmup_ratio=0.1)
    rates = [learning_rate(options, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 1e-3
    assert learning_rate(TrainOptions(warmup_ratio=0.0), 0, 1) == 3e-3
    assert learning_rate(TrainOptions(optimizer="sgd"), 0, 1) == 0.05


def test_only_matrices_and_kernels_decay():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    for options, decay in (
        (TrainOptions(), 1e-2),
        (TrainOptions(optimizer="sgd"), 5e-4),
        (TrainOptions(weight_decay=0.3), 0.3),
    ):
        decaying, others = make_optimizer(network, options).param_groups
        assert (decaying["weight_decay"], others["weight_decay"]) == (decay, 0.0)
        assert {id(p) for p in decaying["params"]} == {id(p) for p in network.parameters() if p.dim() > 1}
        assert len(decaying["params"]) + len(others["params"]) == len(list(network.parameters()))
