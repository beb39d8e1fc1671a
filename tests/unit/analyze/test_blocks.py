import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from models.resnet_cifar import resnet20
from sepdeploy.analyze.blocks import Block, find_blocks
from sepdeploy.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # PyTorch's own


class Net(nn.Module):
    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.run(self, x)


def conv(inputs=8, outputs=8):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def blocks_of(model, *layers, shape=(1, 8, 6, 6)):
    torch.manual_seed(0)
    return [(block.name, block.layers) for block in find_blocks(model.eval(), torch.randn(shape), layers)]


def test_residual_blocks_are_blocks_and_the_stem_and_classifier_are_in_none():
    model = resnet20().eval()
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    blocks = find_blocks(model, torch.zeros(1, 3, 32, 32), convs[1:])
    assert len(blocks) == 9
    assert blocks[0] == Block("layer1.0", ("layer1.0.conv1", "layer1.0.conv2"))
    # Stages return what their last block returns; the outermost name is used.
    assert [block.name for block in blocks[2::3]] == ["layer1", "layer2", "layer3"]
    assert [name for block in blocks for name in block.layers] == convs[1:]


def test_a_projection_shortcut_is_in_its_block():
    model = resnet20(shortcut="projection").eval()
    layers = ("layer2.0.shortcut.0", "layer2.0.conv2", "layer2.1.conv1")
    assert find_blocks(model, torch.zeros(1, 3, 32, 32), layers) == (
        Block("layer2.0", ("layer2.0.conv2", "layer2.0.shortcut.0")),
        Block("layer2.1", ("layer2.1.conv1",)),
    )


def test_a_block_ends_before_the_next_product_whether_that_is_replaced_or_not():
    model = nn.Sequential(
        conv(), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), conv(), nn.ReLU(), conv(), nn.ReLU()
    )
    assert blocks_of(model, "0", "6") == [("3", ("0",)), ("", ("6",))]
    assert blocks_of(model, "0", "4", "6") == [("3", ("0",)), ("5", ("4",)), ("", ("6",))]


def test_functional_activations_leave_the_norm_as_the_end():
    model = Net(lambda n, x: n.b(F.relu(n.bn(n.a(x)))), a=conv(), bn=nn.BatchNorm2d(8), b=conv())
    assert blocks_of(model, "a", "b") == [("bn", ("a",)), ("", ("b",))]


def test_branches_share_a_block_that_ends_where_they_are_joined():
    join = Net(lambda n, x: torch.cat([n.a(x), n.b(x), x], 1), a=conv(), b=conv())
    model = nn.Sequential(join, nn.ReLU(), conv(24, 8))
    assert blocks_of(model, "0.a", "0.b", "2") == [("1", ("0.a", "0.b")), ("", ("2",))]
    functional = Net(lambda n, x: n.c(n.a(x) + n.b(x)), a=conv(), b=conv(), c=conv())
    assert blocks_of(functional, "a", "b", "c") == [("", ("a", "b", "c"))]  # no module returns the sum


def test_what_is_needed_to_the_end_cannot_be_cut():
    def run(n, x):
        deep = n.b(n.a(x))
        deeper = n.c(deep)
        return {"deep": deep, "deeper": deeper, "sum": deep + F.interpolate(n.d(deeper), 6)}

    model = Net(run, a=conv(), b=conv(), c=conv(), d=conv())
    assert blocks_of(model, "a", "b", "c", "d") == [("a", ("a",)), ("b", ("b",)), ("", ("c", "d"))]
    dense = Net(lambda n, x: n.b(x + n.a(x)) + x, a=conv(), b=conv())
    assert blocks_of(dense, "a", "b") == [("", ("a", "b"))]


def test_an_output_that_nobody_reads_keeps_nothing_alive():
    def run(n, x):
        early = n.a(x)
        late = n.c(n.b(early))
        n.unused(early)
        return late

    model = Net(run, a=conv(), b=conv(), c=conv(), unused=conv())
    assert [name for name, _ in blocks_of(model, "a", "b", "c")] == ["a", "b", ""]


def test_a_layer_called_twice_is_in_the_block_of_its_last_call(make_net):
    for name, layers in (("twice", ("conv",)), ("list_reused", ("layers.0",)), ("aliased", ("inner.a",))):
        net, x = make_net(name)
        assert find_blocks(net, x, layers) == (Block("", layers),), name
    model = Net(lambda n, x: n.c(n.a(n.b(n.a(x)))), a=conv(), b=conv(), c=conv())
    assert blocks_of(model, "a", "b", "c") == [("", ("a", "b", "c"))]  # only 'a', called twice, ends before 'c'
    model = Net(lambda n, x: n.c(n.act(n.a(n.b(n.a(x))))), a=conv(), b=conv(), c=conv(), act=nn.ReLU())
    assert blocks_of(model, "a", "b", "c") == [("act", ("a", "b")), ("", ("c",))]


def test_in_place_writes_and_views_are_followed(make_net):
    net, x = make_net("relu_in_place")
    assert find_blocks(net, x, ("1", "4")) == (Block("3", ("1",)), Block("", ("4",)))

    def fills(n, x):
        joined = x.new_zeros(len(x), 16, 6, 6)
        joined[:, :8] = n.a(x)
        joined[:, 8:] = n.b(x)
        return n.c(n.act(joined))

    model = Net(fills, a=conv(), b=conv(), c=conv(16, 8), act=nn.ReLU(inplace=True))
    assert blocks_of(model, "a", "b", "c") == [("act", ("a", "b")), ("", ("c",))]
    changed = Net(lambda n, x: n.b(n.a(x).mul_(2)), a=conv(), b=conv())
    assert blocks_of(changed, "a", "b") == [("a", ("a",)), ("", ("b",))]  # before it is changed
    changed = Net(lambda n, x: n.b(n.same(y := n.a(x)) + y.relu_()), a=conv(), b=conv(), same=conv())
    assert blocks_of(changed, "same", "b") == [("", ("same", "b"))]


def test_a_slice_does_not_stand_for_the_whole():
    first = Net(lambda n, x: x[:, :4])
    model = Net(lambda n, x: n.b(n.first(2 * n.a(x))), first=first, a=conv(), b=conv(4))
    assert blocks_of(model, "a", "b") == [("a", ("a",)), ("", ("b",))]
    flat = Net(lambda n, x: n.b(n.flat(2 * n.a(x))), flat=nn.Flatten(), a=conv(), b=nn.Linear(288, 4))
    assert blocks_of(flat, "a", "b") == [("flat", ("a",)), ("", ("b",))]


def test_names_exist_in_both_networks_and_mean_the_same_in_training():
    layer = nn.Sequential(conv(), nn.ReLU())
    model = Net(lambda n, x: n.b(n.drop(n.layer(x))), drop=nn.Dropout(), layer=layer, b=conv())
    # Not 'drop', which returns the same now; not 'layer.1', which goes with the layer.
    assert blocks_of(model, "layer", "b") == [("layer", ("layer",)), ("", ("b",))]


def test_layers_that_never_run_are_in_no_block(make_net):
    net, x = make_net("never_called")
    assert find_blocks(net, x, ("conv", "unused")) == (Block("", ("conv",)),)
    assert find_blocks(net, x, ("unused",)) == ()
    net, x = make_net("mixed_dimensions")
    assert find_blocks(net, x, ()) == ()


def test_every_called_layer_of_the_nasty_nets_is_in_one_block(make_net, net_name):
    net, x = make_net(net_name)
    before = x.clone()
    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    blocks = find_blocks(net, x, layers)
    found = [name for block in blocks for name in block.layers]
    assert len(found) == len(set(found))
    assert set(layers) - set(found) <= {"unused", *(layers if net_name == "called_past_hooks" else ())}
    names = dict(net.named_modules())
    assert all(block.name in names for block in blocks)
    assert torch.equal(x, before)


def test_a_network_that_does_not_run_is_refused():
    with pytest.raises(UsageError, match=r"does not run on an input of shape \(1, 3, 6, 6\)"):
        blocks_of(conv(), "", shape=(1, 3, 6, 6))
