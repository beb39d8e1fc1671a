import torch
from torch import nn

from sepdeploy.train.batch_norms import synchronize_batch_norms, train_batch_norms


def test_only_norms_that_nobody_froze_train():
    network = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False), nn.Dropout())
    network[1].requires_grad_(False)
    train_batch_norms(network.train())
    assert [module.training for module in network] == [True, False, True, False]


def test_plain_batch_norms_can_share_their_statistics_under_the_same_names():
    class Activated(nn.BatchNorm2d):
        pass

    network = nn.Sequential(nn.BatchNorm2d(4), Activated(4), nn.Sequential(nn.BatchNorm1d(3)))
    network.append(network[0])
    before = network.state_dict()
    train_batch_norms(network)
    synchronize_batch_norms(network)
    kinds = [type(network[0]), type(network[1]), type(network[2][0]), type(network[3])]
    assert kinds == [nn.SyncBatchNorm, Activated, nn.SyncBatchNorm, nn.SyncBatchNorm]
    assert network[0].weight is network[3].weight
    assert network[0].running_mean is network[3].running_mean
    after = network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
