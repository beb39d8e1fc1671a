"""What quantization-aware training wins, against rounding a trained network and against training it longer in float.

python tests/benchmarks/int8_training.py ../shared --results int8_training.jsonl

A ResNet-20 with every 3x3 after the stem in depthwise-separable form with one term is fine-tuned as `--train` does it.
Then:

- rounded: its int8 simulation, prepared as by default.
- adaptive: the same with `--adaptive-rounding`.
- longer: fine-tuned further in float, as long and at the rate of the quantization-aware training, then rounded.
- aware: `--qat`.

For each: accuracy on test images with labels, change of the outputs against the original network (the mean divergence
of the class probabilities, in nats), and the same of the float network that it was made from. The difference between
int8 and its float network is what rounding costs. Needs the folder as `int8.py` does; a run that was stopped goes on in
--work.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from transfer_quality import ARCHITECTURES, unpack

from sepdeploy.analyze.damage import network_damage
from sepdeploy.analyze.flow_graph import capture_graph
from sepdeploy.analyze.trace import output_tensors, trace_network
from sepdeploy.core.int8 import Int8Options
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.core.progress import Silent
from sepdeploy.core.training import TrainOptions
from sepdeploy.data.images import open_images
from sepdeploy.data.preprocess import read_preprocess
from sepdeploy.loading.model import load_model
from sepdeploy.passes.fold_batchnorm import fold_batchnorm
from sepdeploy.passes.replace_convs import copy_network
from sepdeploy.planning.candidates import propose_plan
from sepdeploy.planning.convert import convert_network
from sepdeploy.planning.evaluate import tensor_batches
from sepdeploy.quantize.simulate import fake_quantized
from sepdeploy.stages.int8 import prepare_for_int8
from sepdeploy.stages.quantize_aware import qat_options, train_for_int8
from sepdeploy.stages.recover import training_images
from sepdeploy.train.finetune import finetune


class Study:
    """One network, fine-tuned once."""

    def __init__(self, arguments) -> None:
        self.work = arguments.work
        self.work.mkdir(parents=True, exist_ok=True)
        for name in ("train", "test"):
            if not (self.work / f"{name}.npz").exists():
                unpack(arguments.source, name, self.work)
        given = {"preprocess": read_preprocess(Path("calibration/cifar10.toml"))}
        path = str(self.work / "train.npz")
        calibration = open_images(path, role="calibration", limit=arguments.calibration, seed=0, **given)
        train = open_images(path, role="calibration", limit=arguments.train, seed=1, **given)
        self.test = open_images(str(self.work / "test.npz"), role="validation", limit=arguments.test, seed=0, **given)
        checkpoint = arguments.source / "weights" / f"{arguments.net}_jpeg.pt"
        self.original = load_model(checkpoint, ARCHITECTURES[arguments.net]).module
        example = torch.from_numpy(next(calibration.batches(1))[0])
        self.inputs = SimpleNamespace(network=self.original, calibration=calibration, example=lambda: example)
        self.traced = trace_network(self.original, example)
        plan = propose_plan(self.traced, "depthwise_separable", SchemeOptions(terms=arguments.terms), self.original)
        converted = convert_network(self.original, self.traced, plan, tensor_batches(calibration, 64))[0].eval()
        self.training = TrainOptions(epochs=arguments.epochs)
        self.images, self.judges = training_images(train, calibration, 0)
        self.tuned = self.train(converted, self.training, "tuned")

    def train(self, network: nn.Module, options: TrainOptions, name: str) -> nn.Module:
        folder = self.work / name
        return finetune(
            network, self.original, self.images, self.judges, options, features=(), folder=folder, progress=Silent()
        )[0]

    def folded(self, network: nn.Module) -> nn.Module:
        copy = copy_network(network).eval()
        fold_batchnorm(copy, {site.name: site.norm for site in self.traced.sites if site.norm})
        return copy

    def simulation(self, network: nn.Module, places) -> nn.Module:
        graph = capture_graph(network, self.inputs.example())
        return fake_quantized(graph, {place.name: place.affine for place in places})

    def row(self, name: str) -> tuple[nn.Module, nn.Module]:
        """The float network of a row and its int8 simulation."""
        if name == "aware":
            options = ConvertOptions(
                Path("m.pt"), "a:b", "c", train="t", training=replace(self.training, is_quantization_aware=True)
            )
            given = (self.inputs, self.traced, self.images, self.judges, options, self.work / name, Silent())
            trained = train_for_int8(self.tuned, *given)
            return trained.network, self.simulation(self.folded(trained.network), trained.places)
        network = self.train(self.tuned, qat_options(self.training), name) if name == "longer" else self.tuned
        options = Int8Options(rounds_adaptively=name == "adaptive")
        prepared = prepare_for_int8(options, self.inputs, self.traced, self.folded(network), 0)
        return network, self.simulation(prepared.network, prepared.places)

    @torch.no_grad()
    def measure(self, network: nn.Module) -> tuple[float, float]:
        """Accuracy and damage."""
        correct = sum(
            int((output_tensors(network(torch.from_numpy(x)))[0].argmax(1).numpy() == labels).sum())
            for x, labels in self.test.batches(100)
        )
        damage = network_damage(self.original, network, tensor_batches(self.test, 100)())
        return correct / len(self.test), damage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--net", default="resnet20", choices=ARCHITECTURES)
    parser.add_argument("--terms", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--train", type=int, default=3000)
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("int8_training"))
    parser.add_argument("--results", type=Path, default=Path("int8_training.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    study = Study(arguments)
    for name in ("rounded", "adaptive", "longer", "aware"):
        network, simulated = study.row(name)
        (accuracy, damage), (int8_accuracy, int8_damage) = map(study.measure, (network, simulated))
        row = {"net": arguments.net, "terms": arguments.terms, "epochs": arguments.epochs, "train": arguments.train,
               "test": arguments.test, "row": name, "float_accuracy": accuracy, "float_damage": damage,
               "int8_accuracy": int8_accuracy, "int8_damage": int8_damage}  # fmt: skip
        print(row, flush=True)
        with arguments.results.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
