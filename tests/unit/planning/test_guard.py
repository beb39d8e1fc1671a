"""The guard on a network with known weak spots, with real measurements."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.measurement import Quality
from sepdeploy.core.plan import Kept, Reason, SchemeOptions
from sepdeploy.core.report import GuardStep
from sepdeploy.data.images import open_images
from sepdeploy.planning import guard
from sepdeploy.planning.candidates import propose_plan
from sepdeploy.planning.evaluate import Evaluator, tensor_batches
from sepdeploy.planning.guard import guard_plan

IMAGES = 600


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in ((3, 12), (12, 16), (16, 16), (16, 16), (16, 16)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 6)).eval()
    with torch.no_grad():  # the second convolution is separable to begin with, so one replacement is free
        column, mixing = torch.randn(12, 3, 3), torch.randn(16, 12)
        net[2].weight.copy_(mixing[:, :, None, None] * column / 10)
    return net


class Case:
    """The network, images with the network's own answers as labels, and how often networks were measured."""

    def __init__(self, folder, *, terms=1, is_labelled=True) -> None:
        self.net = network()
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (IMAGES, 6, 6, 3), np.uint8)
        with torch.no_grad():
            inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
            self.net[-1].bias -= self.net(inputs).mean(0)  # so that all classes occur, and close ones tip easily
            scores = self.net(inputs)
        labels = scores.argmax(1).numpy()
        np.savez(folder / "images.npz", images=pixels, **({"labels": labels} if is_labelled else {}))
        self.images = open_images(str(folder / "images.npz"), role="validation", limit=IMAGES)
        self.batches = tensor_batches(self.images.head(96), 32)
        self.trace = trace_network(self.net, torch.zeros(1, 3, 6, 6))
        self.plan = propose_plan(self.trace, "depthwise_separable", SchemeOptions(terms=terms))
        self.evaluator = CountingEvaluator(self.net, self.images, 64)

    def guard(self, limit, method="data-free", **options):
        """Mostly with the quick transfer: the guard's decisions are the same code for both."""
        return guard_plan(
            self.net,
            self.trace,
            self.plan,
            self.batches,
            self.evaluator,
            max_drop_points=limit,
            method=method,
            **options,
        )

    def drop_on_all(self, net) -> float:
        return Evaluator(self.net, self.images, 96).quality(net)[0].drop_points


class CountingEvaluator(Evaluator):
    measured = 0

    def quality(self, network, limit_points=None):
        self.measured += 1
        return super().quality(network, limit_points)


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


def test_without_a_limit_everything_is_replaced(case):
    guarded = case.guard(None)
    assert list(guarded.plan.replaced) == list(case.plan.replaced) == ["2", "4", "6", "8"]
    assert guarded.quality.drop_points == pytest.approx(case.drop_on_all(guarded.network))
    assert guarded.quality.drop_points > 5, "otherwise the tests of the limits show nothing"


@pytest.mark.parametrize("limit", [0.0, 0.5, 3.0, 20.0, 100.0])
@pytest.mark.parametrize("is_labelled", [True, False])
def test_the_limit_holds_on_all_images(tmp_path, limit, is_labelled):
    case = Case(tmp_path, is_labelled=is_labelled)
    guarded = case.guard(limit)
    assert guarded.quality.drop_points <= limit
    assert guarded.quality.images == IMAGES
    assert guarded.quality.drop_basis == ("accuracy" if is_labelled else "agreement")
    assert case.drop_on_all(guarded.network) == pytest.approx(guarded.quality.drop_points)
    assert [d.name for d in guarded.plan.decisions] == [d.name for d in case.plan.decisions]
    assert {t.name for t in guarded.transfers} == set(guarded.plan.replaced)
    for name in case.plan.replaced.keys() - guarded.plan.replaced.keys():
        kept = guarded.plan.kept[name]
        assert kept.reason is Reason.EXCEEDS_MAX_DROP
        assert kept.detail
    assert len(guarded.plan.replaced) == 4 if limit == 100 else len(guarded.plan.replaced) < 4


def test_the_limit_holds_with_the_anchored_transfer(case):
    guarded = case.guard(10.0, method="anchored")
    assert "2" in guarded.plan.replaced
    assert case.drop_on_all(guarded.network) == pytest.approx(guarded.quality.drop_points)
    assert guarded.quality.drop_points <= 10
    assert {t.method for t in guarded.transfers} <= {"anchored", "data-free"}


def test_the_free_replacement_is_made_even_at_limit_0(case):
    # Rank 1 per channel reproduces the second convolution, so no answer changes.
    assert "2" in case.guard(0.0).plan.replaced


def test_replaced_sets_grow_with_the_limit(case):
    sizes = [len(case.guard(limit).plan.replaced) for limit in (0.0, 1.0, 10.0, 100.0)]
    assert sizes == sorted(sizes)


def test_original_is_untouched_and_an_empty_result_is_the_original(case):
    before = {name: value.clone() for name, value in case.net.state_dict().items()}
    case.plan = case.plan.with_outcome("2", Kept(Reason.NOT_CHEAPER))  # nothing left that is free
    guarded = case.guard(0.0)
    assert guarded.plan.replaced == {}
    x = torch.rand(4, 3, 6, 6)
    assert torch.equal(guarded.network(x), case.net(x))
    assert all(torch.equal(value, before[name]) for name, value in case.net.state_dict().items())


def test_steps_tell_the_growth(case):
    guarded = case.guard(3.0)
    first, *_, last = guarded.steps
    assert first.replaced == 4
    assert set(first.added) == {"2", "4", "6", "8"}
    assert not first.is_accepted
    assert last.is_accepted
    assert not last.is_partial
    assert last.replaced == len(guarded.plan.replaced)
    assert last.drop_points == guarded.quality.drop_points
    for step in guarded.steps:
        assert step.is_accepted == (step.drop_points <= 3.0)


def test_same_inputs_same_result(case, tmp_path):
    (tmp_path / "other").mkdir()
    first, second = case.guard(3.0), Case(tmp_path / "other").guard(3.0)
    assert first.plan == second.plan
    assert first.steps == second.steps
    for name, value in first.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[name])


def test_memory_replaces_measurements(case):
    memory = {}
    first = case.guard(3.0, memory=memory)
    assert {key for key in memory if key.startswith("damage ")} == {f"damage {n}" for n in ("2", "4", "6", "8")}
    case.evaluator.measured = 0
    progress = []
    second = case.guard(3.0, memory=memory, progress=progress.append)
    assert case.evaluator.measured <= 1, "only the network handed over is measured again"
    assert not any("damage" in line for line in progress)
    assert second.plan == first.plan
    assert second.steps == first.steps
    assert second.quality == first.quality


def test_memory_of_one_limit_does_not_decide_about_another(case):
    memory = {}
    case.guard(100.0, memory=memory)
    guarded = case.guard(0.0, memory=memory)
    assert guarded.quality.drop_points == 0
    assert len(guarded.plan.replaced) < 4


def test_a_killed_run_goes_on_where_it_was(case):
    class Killed(BaseException):
        pass

    class Memory(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            if len(self) == 4:
                raise Killed

    memory = Memory()
    with pytest.raises(Killed):
        case.guard(3.0, memory=memory)
    resumed = case.guard(3.0, memory=dict(memory))
    undisturbed = case.guard(3.0)
    assert resumed.plan == undisturbed.plan
    assert resumed.steps == undisturbed.steps


def test_nothing_to_replace(case):
    for name in list(case.plan.replaced):
        case.plan = case.plan.with_outcome(name, Kept(Reason.NOT_CHEAPER))
    guarded = case.guard(1.0)
    assert guarded.plan == case.plan
    assert guarded.transfers == ()
    assert guarded.quality.drop_points == 0


class ScriptedEvaluator:
    """Says what a network loses from which of its convolutions are replaced; `losses` adds up."""

    def __init__(self, losses: dict[str, float], images: int = 1000) -> None:
        self.losses = losses
        self.sets: list[tuple[str, ...]] = []
        self.images = images

    def original_quality(self) -> Quality:
        return Quality(self.images, 1.0, 1.0, None, 0.0, 0.0, "accuracy")

    def quality(self, network, limit_points=None):
        replaced = tuple(name for name in self.losses if not isinstance(network.get_submodule(name), nn.Conv2d))
        self.sets.append(replaced)
        return replace(self.original_quality(), drop_points=self.loss(replaced)), False

    def loss(self, replaced) -> float:
        return float(sum(self.losses[name] for name in replaced))


def scripted(case, losses, limit, damages):
    memory = {f"damage {name}": value for name, value in damages.items()}
    evaluator = ScriptedEvaluator(losses)
    guarded = guard_plan(
        case.net, case.trace, case.plan, case.batches, evaluator,
        max_drop_points=limit, method="data-free", memory=memory,
    )  # fmt: skip
    return guarded, evaluator


NAMES = ("2", "4", "6", "8")


def test_bisection_finds_the_longest_prefix_of_the_order(case):
    damages = dict(zip(NAMES, (0.1, 0.2, 0.3, 0.4), strict=True))
    guarded, evaluator = scripted(case, {"2": 1, "4": 1, "6": 1, "8": 5}, 3.0, damages)
    assert set(guarded.plan.replaced) == {"2", "4", "6"}
    assert evaluator.sets[0] == NAMES, "everything is tried first"
    assert "8.00 points with it and 3 others replaced" in guarded.plan.kept["8"].detail
    assert "the limit is 3" in guarded.plan.kept["8"].detail


def test_fill_goes_past_one_bad_convolution(case):
    # The second in the order breaks the limit alone, so the prefix ends at the first; those behind still fit.
    damages = dict(zip(NAMES, (0.1, 0.2, 0.3, 0.4), strict=True))
    guarded, _ = scripted(case, {"2": 1, "4": 50, "6": 1, "8": 0.5}, 3.0, damages)
    assert set(guarded.plan.replaced) == {"2", "6", "8"}
    assert guarded.quality.drop_points == 2.5
    assert guarded.plan.kept["4"].reason is Reason.EXCEEDS_MAX_DROP


def test_order_is_damage_per_saved_work(case):
    # Equal damage: convolution 2 has 12 input channels and saves less than the others, so it comes last.
    damages = dict.fromkeys(NAMES, 0.1)
    _, evaluator = scripted(case, dict.fromkeys(NAMES, 2), 5.0, damages)
    assert evaluator.sets[1] == ("4", "6")


@pytest.mark.parametrize(("loss", "times"), [(1.0, 1), (1.8, 1), (2.2, 0)])
def test_the_whole_is_transferred_in_full_only_where_that_may_help(case, monkeypatch, loss, times):
    """4 points in all hold the limit; 7.2 are within twice of it, 8.8 are not."""
    calls = []
    real = guard.convert_network

    def convert(original, trace, plan, batches, **options):
        calls.append((len(plan.replaced), options["is_quick"]))
        return real(original, trace, plan, batches, **{**options, "method": "data-free"})

    monkeypatch.setattr(guard, "convert_network", convert)
    guard_plan(
        case.net, case.trace, case.plan, case.batches, ScriptedEvaluator(dict.fromkeys(NAMES, loss)),
        max_drop_points=4.2, method="anchored", memory={f"damage {name}": 0.1 for name in NAMES},
    )  # fmt: skip
    assert calls[0] == (4, True)
    assert calls.count((4, False)) == times


def test_partial_verdicts_are_measured_again_and_taken_back(case):
    """Sets that passed on a part of the images but not on all of them lose their most damaging convolution."""

    class Optimist(ScriptedEvaluator):
        def quality(self, network, limit_points=None):
            quality, _ = super().quality(network, limit_points)
            if limit_points is None:
                return quality, False
            return replace(quality, drop_points=quality.drop_points / 2, images=600), True

    damages = dict(zip(NAMES, (0.1, 0.2, 0.3, 0.4), strict=True))
    evaluator = Optimist(dict.fromkeys(NAMES, 2))
    guarded = guard_plan(
        case.net, case.trace, case.plan, case.batches, evaluator,
        max_drop_points=5.0, method="data-free", memory={f"damage {n}": v for n, v in damages.items()},
    )  # fmt: skip
    assert guarded.quality.drop_points == 4
    assert not guarded.steps[-1].is_partial
    assert guarded.steps[-1].is_accepted
    assert set(guarded.plan.replaced) == {"2", "4"}
    assert "6.00 points" in guarded.plan.kept["6"].detail


def test_step_type_of_the_memory(case):
    memory = {}
    case.guard(100.0, memory=memory)
    assert [type(value) for value in memory.values()] == [GuardStep]
