"""Weights from elsewhere: what may wrap them, and what they must be."""

from functools import partial, wraps

import pytest
import torch
from torch import nn

from sepdeploy.errors import UsageError
from sepdeploy.train.hooks import hook_of, opened_hook, take_weights


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()


EXAMPLE = torch.rand(1, 3, 4, 4)


class Wrapped(nn.Module):
    """As a Lightning module: without a forward method, and with another network beside the one that is trained."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.net = nn.ModuleDict({"student": model})


def taken(given, into=None) -> nn.Module:
    return take_weights(given, into or network(), EXAMPLE, "the given thing")


def is_equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: net,
        nn.DataParallel,
        Wrapped,
        lambda net: net.state_dict(),
        lambda net: {f"module.{name}": value for name, value in net.state_dict().items()},
        lambda net: Wrapped(net).state_dict(),
        lambda net: {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")},
        lambda net: {k: v.double() if v.is_floating_point() else v for k, v in net.state_dict().items()},
    ],
)  # fmt: skip
def test_what_wraps_the_weights_is_looked_through(wrap):
    mine, trained = network(), network(1)
    result = taken(wrap(trained), mine)
    assert is_equal(result, trained)
    assert not is_equal(mine, trained), "the network itself is not changed"
    assert not result.training
    assert {p.dtype for p in result.parameters()} == {torch.float32}


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in network(1).state_dict().items() if key != name}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (without("4.bias"), r"the given thing is not the converted network: it has no 4\.bias"),
        ({**without(""), "5.weight": torch.zeros(1)}, r"it has 5\.weight, which that has not"),
        ({**without(""), "4.bias": torch.zeros(3)}, r"4\.bias has the shape \(3,\), not \(2,\)"),
        ({**without(""), "4.bias": torch.tensor([0.0, float("inf")])}, r"NaN or infinite values in 4\.bias"),
        ({**without(""), "4.bias": torch.zeros(2, dtype=torch.int64)}, r"has torch\.int64 values in 4\.bias"),
        ({"epoch": 3}, r"it has no 0\.weight"),
        ({f"a.{k}": v for k, v in without("4.bias").items()}, r"it has no 4\.bias"),
    ],
)
def test_the_first_difference_is_named(given, message):
    with pytest.raises(UsageError, match=message):
        taken(given)


class Copies(nn.Module):
    """The network as it was and as it is, as loops keep it that compare the two."""

    def __init__(self, initial: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.initial, self.model = initial, model


def test_of_several_copies_none_is_chosen_unless_all_are_the_same():
    two = Copies(network(), network(1))
    for given in (two, two.state_dict()):
        with pytest.raises(UsageError, match="more than once, with different weights: as 'initial' and 'model'; give"):
            taken(given)
    two.initial.load_state_dict(network(1).state_dict())
    two.model[1].num_batches_tracked += 1
    assert is_equal(taken(two), network(1))


class Verdict(nn.Module):
    def __init__(self, offset: float) -> None:
        super().__init__()
        self.conv, self.offset = nn.Conv2d(3, 4, 3), offset

    def forward(self, x):
        return self.conv(x) > self.offset, x[:0]


def test_outputs_that_are_truth_values_or_empty_are_compared():
    trained = Verdict(0.0).eval()
    assert is_equal(taken(trained, Verdict(0.0).eval()), trained)
    with pytest.raises(UsageError, match="computes something else"):
        taken(trained, Verdict(100.0).eval())


def test_only_weights_may_have_changed():
    other = network(1)
    other[2] = nn.LeakyReLU(0.5)
    with pytest.raises(UsageError, match="computes something else"):
        taken(other)
    other[2] = nn.Softmax2d()
    with pytest.raises(UsageError, match="computes something else"):
        taken(other)
    other[3] = nn.Flatten(2)
    with pytest.raises(UsageError, match="does not run on one image"):
        taken(other)


def test_a_network_in_training_mode_is_judged_in_evaluation_mode():
    trained = network(1).train()
    assert is_equal(taken(trained), trained)
    assert trained.training


def doubled(function):
    @wraps(function)
    def run(model, teacher, context):
        return function(function(model, teacher, context), teacher, context)

    return run


@doubled
def decorated(model, teacher, context):
    return model


def marked(model, teacher, context):
    return model


marked.__wrapped__ = doubled  # as by a decorator without a closure


def test_functions_are_known_by_file_and_name_and_what_depends_on_more_is_not():
    def inner(model, teacher, context):
        return model

    class Loop:
        def __call__(self, model, teacher, context):
            return model

    assert hook_of(is_equal).key is not None
    assert hook_of(is_equal).key == hook_of(is_equal).key != hook_of(taken).key
    for function in (inner, lambda *_: None, Loop(), Loop().__call__, partial(is_equal, 1), decorated, marked):
        assert hook_of(function).key is None
    assert hook_of(Loop()).name.endswith("Loop")


def test_a_hook_takes_arguments_and_its_neighbours(tmp_path):
    (tmp_path / "beside.py").write_text("VALUE = 5\n")
    path = tmp_path / "loop.py"
    path.write_text("def train(a, b, c, epochs=1):\n    from beside import VALUE\n    return epochs * VALUE\n")
    with opened_hook(f"{path}:train(epochs=3)") as hook:
        assert hook.function(0, 0, 0) == 15
        first = hook.key
    with opened_hook(f"{path}:train(epochs=4)") as hook:
        assert hook.key != first
    with opened_hook(f"{path}:train(epochs=3)") as hook:
        assert hook.key == first
    for changed in (path, tmp_path / "beside.py"):
        changed.write_text(changed.read_text() + "\n")
        with opened_hook(f"{path}:train(epochs=3)") as hook:
            assert hook.key != first
            first = hook.key


@pytest.mark.parametrize(
    ("spec", "message"),
    [("loop", "is not a hook; give path/to/file"), ("math:pi", "names a float; a function is needed")],
)
def test_hooks_that_are_none(spec, message):
    with pytest.raises(UsageError, match=message), opened_hook(spec):
        pass
