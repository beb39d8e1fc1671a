import pytest
import torch
from torch import nn

from sepdeploy.analyze.trace import conv_spec, trace_network
from sepdeploy.core.artifact import Format, Precision
from sepdeploy.core.chain import Chain, ChainSum, Factor, Norm, Shuffle
from sepdeploy.core.conv import ConvSpec
from sepdeploy.errors import UsageError
from sepdeploy.passes.fold_batchnorm import fold_batchnorm
from sepdeploy.passes.lower_chains import DEFAULT_LOWERINGS, lower_chains, lowerings_that_apply, try_lowerings
from sepdeploy.schemes.lowerings.lowering import LOWERINGS, Refusal
from sepdeploy.schemes.module import ChainConv2d
from sepdeploy.schemes.separable_conv2d import SeparableConv2d

SPEC = ConvSpec(8, 8, (3, 3), padding=(1, 1, 1, 1))
SHUFFLED = ChainSum(
    (
        Chain(
            (
                Factor(8, 8, (3, 3), padding=(1, 1, 1, 1), groups=2),
                Norm(8),
                Shuffle(2),
                Factor(8, 8, (1, 1), groups=4),
            )
        ),
    )
)
UNEVEN = ChainSum((Chain((Factor(8, 10, (3, 3), groups=3), Shuffle(3), Factor(10, 8, (1, 1), groups=4))),))
DENSE = ChainSum((Chain((Factor(8, 8, (3, 3)),)),))


@pytest.fixture
def net():
    torch.manual_seed(0)
    first, second, third = (ChainConv2d(form, SPEC, bias=True) for form in (SHUFFLED, UNEVEN, DENSE))
    made = nn.Sequential(first, nn.ReLU(), nn.Sequential(second), third, nn.Conv2d(8, 4, 1)).eval()
    made.alias = first
    norm = first.terms[0][1]
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    return made


def output(net):
    with torch.no_grad():
        x = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(0))
        return net(x)


def chains(net):
    return {name: module for name, module in net.named_modules() if isinstance(module, ChainConv2d)}


@pytest.mark.parametrize("names", [*DEFAULT_LOWERINGS.values(), ("fold_norm", "resnext"), ("split_groups",)])
def test_lowered_network_computes_the_same(net, names):
    net.alias = net[0]
    before = output(net[:5])
    lower_chains(net, names)
    after = output(net[:5])
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5


def test_what_changed_and_what_refused(net):
    old = chains(net)
    assert try_lowerings(net, ("fold_norm", "fold_shuffle")) == lower_chains(net, ("fold_norm", "fold_shuffle"))
    first, second, third = lower_chains(net, ("fold_norm", "shuffle_channels_last"))
    assert (first.name, second.name, third.name) == ("0", "2.0", "3")
    # The shuffles went with the first call already.
    assert first.refused == (("fold_norm", Refusal.NO_NORM), ("shuffle_channels_last", Refusal.NO_SHUFFLE))
    assert first.applied == second.applied == ()
    new = chains(net)
    assert new["0"] is not old["0"]
    assert new["3"] is old["3"]  # nothing applied
    assert net.alias is new["0"]
    assert [stage.kind for stage in new["0"].form.terms[0].stages] == ["factor", "factor"]


def test_order_counts(net):
    (first, *_) = try_lowerings(net, ("fold_shuffle", "fold_norm", "merge_pointwise"))
    assert first.applied == ("fold_shuffle", "fold_norm")
    assert first.refused == (("merge_pointwise", Refusal.NO_NEIGHBOURS),)
    (first, *_) = try_lowerings(net, ("resnext", "fold_norm", "resnext"))  # a norm is in the way at first
    assert first.refused == (("resnext", Refusal.NOT_GROUPED_THEN_POINTWISE),)
    assert first.applied == ("fold_norm", "resnext")


def test_uneven_shuffles_stay_gathers(net):
    _, second, _ = lower_chains(net, ("shuffle_channels_last",))
    assert second.refused == (("shuffle_channels_last", Refusal.UNEVEN_SHUFFLE),)
    formulations = [m.shuffle.formulation for m in net.modules() if hasattr(m, "shuffle")]
    assert formulations == ["channels_last", "gather"]


def test_lowerings_that_apply_suffice(net):
    names = ("terms_as_branches", "fold_norm", "shuffle_gather", "fold_shuffle")
    applied = lowerings_that_apply(net, names)
    assert {each for chain in applied.values() for each in chain} == {"fold_norm", "fold_shuffle"}
    assert lowerings_that_apply(nn.Sequential(nn.Conv2d(3, 3, 1)), names) == {}
    assert isinstance(net[0].terms[0][1], nn.BatchNorm2d)  # nothing was changed


def test_lowered_modules_keep_their_type_of_weights_and_are_in_eval_mode(net):
    lower_chains(net.double(), ("fold_norm",))
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float64}
    assert not any(module.training for module in net.modules())


def test_unknown_names_are_refused_even_without_chains():
    with pytest.raises(UsageError, match="no lowering 'shuffle'"):
        lower_chains(nn.Sequential(nn.Conv2d(3, 3, 1)), ("shuffle",))


def test_every_kind_of_file_has_a_default():
    assert set(DEFAULT_LOWERINGS) == {(f, p) for f in Format for p in (Precision.FLOAT32, Precision.INT8)}
    assert {name for names in DEFAULT_LOWERINGS.values() for name in names} <= set(LOWERINGS)


def separable_net():
    """A user's network with separable convolutions, one with a norm inside, and trained statistics."""
    torch.manual_seed(0)
    made = nn.Sequential(
        SeparableConv2d(8, 16, 3, padding=1, scheme="low_rank", rank_ratio=0.5, middle="norm"),
        nn.BatchNorm2d(16),
        SeparableConv2d(16, 8, 3, padding=1, chain_groups=(4, 2)),
    )
    made(torch.randn(4, 8, 9, 9))
    return made.eval()


@pytest.mark.parametrize("is_folded", [False, True])
def test_networks_with_separable_convolutions_are_lowered(is_folded):
    net = separable_net()
    before = output(net)
    if is_folded:
        sites = trace_network(net, torch.zeros(1, 8, 9, 9)).sites
        assert fold_batchnorm(net, {site.name: site.norm for site in sites if site.norm}) == ("0.terms.0.1", "1")
    first, second = lower_chains(net, ("fold_norm", "fold_shuffle"))
    assert first.applied == (() if is_folded else ("fold_norm",))
    assert second.applied == ("fold_shuffle",)
    assert float((output(net) - before).abs().max() / before.abs().max()) < 1e-5


def test_of_chains_within_chains_the_inner_ones_are_lowered():
    net = separable_net()
    before = output(net)
    conv = net[0].terms[0][2]
    twin = ChainConv2d(ChainSum((Chain((Factor(8, 16, (1, 1)),)),)), conv_spec(conv), bias=True).eval()
    twin.set_weights(((conv.weight,),), conv.bias)
    net[0].terms[0][2] = twin
    assert [chain.name for chain in lower_chains(net, ("fold_norm",))] == ["0.terms.0.2", "2"]
    assert torch.allclose(output(net), before, atol=1e-6)
