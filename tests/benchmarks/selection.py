"""How well the sum of measured blocks predicts whole networks, and what choosing by it is worth.

python tests/benchmarks/selection.py ../shared --net resnet20,resnet18 --targets ort,litert --precisions float32,int8 \
    --threads 1,2 --results selection.jsonl

For each network, target, precision and number of threads every form of every layer is priced as `sepdeploy plan` does.
Then whole networks are built, exported and timed, a few at a time, each interleaved with the original:

- front: plans from the least damage to the least latency.
- uniform: one form for all layers that can take it; the others stay.
- ours: the fastest plan that does no more damage than a uniform one.
- macs: the plan of the fewest multiply-accumulates that does no more damage than that.

The damage is that of `sepdeploy plan` where there are trained weights (ResNet-20 and -56); else the networks have
random weights, and the sum of the squared relative errors of the layers' outputs, in closed form, stands in for it.
Networks are filled without data: for the clock weights do not matter. The error of a prediction is predicted /
measured - 1, both as shares of the original's latency. Rows are written as they are finished and not measured again
when the script is repeated with the same file. Nothing else should run meanwhile.
"""

import argparse
import json
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transfer_quality import unpack

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.artifact import Precision, Role
from sepdeploy.core.int8 import PLAIN
from sepdeploy.core.options import TARGETS, ConvertOptions, SelectionOptions
from sepdeploy.core.plan import lowered_for
from sepdeploy.core.progress import Progress
from sepdeploy.core.stage_store import StageStore
from sepdeploy.loading.arch import build_architecture
from sepdeploy.planning.convert import convert_network
from sepdeploy.planning.damage import measure_damages
from sepdeploy.planning.evaluate import tensor_batches
from sepdeploy.planning.select import plan_of
from sepdeploy.planning.solve import Limits, pareto_front, solve
from sepdeploy.planning.target import find_target
from sepdeploy.stages import weigh
from sepdeploy.stages.deploy import deploy
from sepdeploy.stages.launch import Processes
from sepdeploy.stages.load import load_inputs
from sepdeploy.stages.measure import target_cost
from sepdeploy.transfer.isolated import whitened_errors

TRAINED = {"resnet20": "resnet20_jpeg.pt", "resnet56": "resnet56_jpeg.pt"}
RANDOM = {
    "mobilenet_v1": "models.mobilenet:mobilenet_v1",
    "vgg16": "models.vgg:vgg16_bn",
    "resnet18": "models.resnet:resnet18",
    "vgg_like": f"{Path(__file__).with_name('vgg_like.py')}:vgg_like",
}
_SIDES = {"vgg_like": 32}
"""Of the images, where it is not 224."""

UNIFORM = ("depthwise_separable T=1", "depthwise_separable T=2", "spatial_separable", "low_rank", "optimized_separable")
_TOGETHER = 4
"""Files that are timed at once, beside the original."""


@dataclass(frozen=True)
class Row:
    """One plan, predicted and measured."""

    net: str
    target: str
    precision: str
    threads: int
    plan: str
    replaced: int
    macs_ratio: float
    damage: float
    original_cost: float  # in the target's unit
    predicted_ratio: float
    measured_ratio: float
    ratio_low: float
    ratio_high: float

    @property
    def error(self):
        return self.predicted_ratio / self.measured_ratio - 1


def layer_errors(network, traced, forms, fit, held_out, **_):
    """In the place of the damages, for networks without trained weights."""
    damages = {}
    for layer in forms:
        errors = whitened_errors(network, traced.site(layer.name), [candidate for _, candidate, _ in layer.forms], fit)
        damages |= {(layer.name, form.label): error**2 for form, error in zip(layer.forms, errors, strict=True)}
    return damages


class Said(Progress):
    """Says what is going on."""

    def stage(self, text):
        print(f"  {text}", flush=True)

    def step(self, done, total):
        pass


class Study:
    """One network on one target."""

    def __init__(self, arguments, net, target, precision, threads, folder):
        self.arguments, self.name = arguments, (net, target, precision, threads)
        torch.manual_seed(0)
        if net in TRAINED:
            model, arch = arguments.source / "weights" / TRAINED[net], f"models.resnet_cifar:{net}"
            preprocess = Path("calibration/cifar10.toml")
            images = folder / "train.npz"
            if not images.exists():
                unpack(arguments.source, "train", folder, 512)
        else:
            side = _SIDES.get(net, 224)
            model, arch, preprocess, images = folder / f"{net}.pt", RANDOM[net], None, folder / f"noise{side}.npz"
            torch.save(build_architecture(arch).module.state_dict(), model)
            pixels = np.random.default_rng(0).integers(0, 256, (32, side, side, 3), dtype=np.uint8)
            np.savez(images, images=pixels)
        self.options = ConvertOptions(
            model, arch, str(images), preprocess=preprocess, target=target, precision=Precision(precision),
            formats=(TARGETS[target],), precisions=tuple(dict.fromkeys((Precision.FLOAT32, Precision(precision)))),
            int8=PLAIN, threads=threads, output=folder / "-".join(map(str, self.name)),
            selection=SelectionOptions(seconds_per_block=arguments.seconds_per_block),
        )  # fmt: skip
        self.progress = Said()
        self.inputs = load_inputs(self.options, self.progress)
        self.inputs.network.eval()
        self.traced = trace_network(self.inputs.network, self.inputs.example())
        self.original = self.files("original", self.inputs.network, Role.ORIGINAL)
        weigh.measure_damages = measure_damages if net in TRAINED else layer_errors
        store = StageStore(folder / f"{net}-weighed", on_change=lambda: None)  # damages serve all targets
        self.weighed = weigh.weigh(
            store, self.options, self.inputs, self.traced,
            lambda: target_cost([self.original], self.options).cost, Processes(), self.progress,
        )  # fmt: skip

    def files(self, name, network, role, plan=None):
        """The target's file of a network."""
        store = StageStore(self.options.output_folder / name, on_change=lambda: None)
        results = deploy(
            store, self.options, self.inputs, self.traced, network, role, name, self.progress, plan
        )  # fmt: skip
        return next(r for r in results if r.artifact.precision is self.options.precision)

    def plans(self):
        """Name -> the choice of each layer."""
        layers = self.weighed.layers
        found = {}
        for i, solution in enumerate(pareto_front(layers, points=self.arguments.plans)):
            found[f"front {i}"] = solution.chosen
        for name in UNIFORM:
            chosen = {layer.name: self.uniform(layer, name) for layer in layers}
            damage = math.fsum(choice.damage for choice in chosen.values())
            if all(choice.candidate is None for choice in chosen.values()):
                continue
            found[f"uniform {name}"] = chosen
            limits = Limits(damage=damage * (1 + 1e-9))
            found[f"ours at {name}"] = solve(layers, minimize="latency", limits=limits).chosen
            found[f"macs at {name}"] = solve(layers, minimize="macs", limits=limits).chosen
        return {name: chosen for name, chosen in found.items() if any(choice.candidate for choice in chosen.values())}

    def uniform(self, layer, name):
        """The form of that name; of a scheme that has many, the one nearest to half of the layer's MACs."""
        of_scheme = [choice for choice in layer.choices if choice.label.split("#")[0].strip().startswith(name)]
        half = layer.choices[0].macs / 2
        return min(of_scheme, key=lambda choice: abs(choice.macs - half), default=layer.choices[0])

    def measured(self, known):
        """A row for each plan that is not known yet, as it is finished."""
        todo = [(name, chosen) for name, chosen in self.plans().items() if name not in known]
        for start in range(0, len(todo), _TOGETHER):
            suits = lowered_for(self.weighed.target, self.weighed.precision)
            part = todo[start : start + _TOGETHER]
            results = [self.original]
            for name, chosen in part:
                plan = plan_of(self.traced, self.weighed.layers, chosen, self.weighed.unit, suits)
                network, _ = convert_network(
                    self.inputs.network,
                    self.traced,
                    plan,
                    tensor_batches(self.inputs.calibration, 8),
                    method="data-free",
                )
                results.append(self.files(name.replace(" ", "_"), network, Role.CONVERTED, plan))
            target = find_target(self.options.target, self.options.precision, self.options.threads)
            files = [result.artifact for result in results]
            original, *measured = target.compare(files, seconds=self.arguments.seconds, seed=0)
            for (name, chosen), each in zip(part, measured, strict=True):
                yield self.row(name, chosen, original.cost, each)

    def row(self, name, chosen, original_cost, measured):
        weighed = self.weighed
        difference = math.fsum(choice.difference for choice in chosen.values())
        macs = self.traced.total_macs + sum(chosen[layer.name].macs - layer.choices[0].macs for layer in weighed.layers)
        return Row(
            *self.name,
            plan=name,
            replaced=sum(choice.candidate is not None for choice in chosen.values()),
            macs_ratio=macs / self.traced.total_macs,
            damage=math.fsum(choice.damage for choice in chosen.values()),
            original_cost=original_cost,
            predicted_ratio=1 + difference / weighed.original_cost,
            measured_ratio=1 / measured.speedup,
            ratio_low=1 / measured.speedup_high,
            ratio_high=1 / measured.speedup_low,
        )


def summary(rows):
    """Lines about all rows of one network, target, precision and number of threads."""
    errors = np.array([abs(row.error) for row in rows])
    yield "| plan | replaced | MACs | damage | predicted | measured (range of 6 blocks) | error |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for row in rows:
        yield (
            f"| {row.plan} | {row.replaced} | {row.macs_ratio:.2f} | {row.damage:.3g} | {1 / row.predicted_ratio:.2f}x "
            f"| {1 / row.measured_ratio:.2f}x ({1 / row.ratio_high:.2f} to {1 / row.ratio_low:.2f}) "
            f"| {row.error:+.0%} |"
        )
    yield f"within 10%: {np.mean(errors <= 0.1):.0%} of {len(rows)} plans; median |error| {np.median(errors):.1%}"
    by_name = {row.plan: row for row in rows}
    for name in UNIFORM:
        if f"uniform {name}" in by_name:
            rows_of = [by_name.get(f"{kind} {name}") for kind in ("ours at", "uniform", "macs at")]
            # No row: the plan is the original.
            ours, uniform, macs = (1.0 if row is None else 1 / row.measured_ratio for row in rows_of)
            yield f"at the damage of {name}: ours {ours:.2f}x, uniform {uniform:.2f}x, fewest MACs {macs:.2f}x"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--net", default="resnet20")
    parser.add_argument("--targets", default="ort")
    parser.add_argument("--precisions", default="float32")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--plans", type=int, default=8, help="points of the front")
    parser.add_argument("--seconds", type=float, default=1.0, help="for timing each file")
    parser.add_argument("--seconds-per-block", type=float, default=SelectionOptions().seconds_per_block)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="kept between runs; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for net in arguments.net.split(","):
            for target in arguments.targets.split(","):
                for precision in arguments.precisions.split(","):
                    for threads in map(int, arguments.threads.split(",")):
                        run(arguments, (net, target, precision, threads), work)


def run(arguments, name, work):
    rows = []
    if arguments.results.exists():
        rows = [Row(**json.loads(line)) for line in arguments.results.read_text().splitlines()]
    own = {row.plan: row for row in rows if (row.net, row.target, row.precision, row.threads) == name}
    study = Study(arguments, *name, work)
    for row in study.measured(set(own)):
        own[row.plan] = row
        with arguments.results.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
    print(f"\n{name}: original {next(iter(own.values())).original_cost:.3f}", *summary(list(own.values())), sep="\n")


if __name__ == "__main__":
    main()
