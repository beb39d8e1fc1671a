"""How much accuracy each way of finding weights keeps, at equal multiply-accumulates, beside the peers' ways.

python tests/benchmarks/transfer_quality.py ../shared --net resnet20 --ratios 0.5 --schemes depthwise_separable \
    --methods data-free,whitened,anchored,reconstructed,finetuned,random --epochs 1 --results results.jsonl

For each scheme and share of the network's MACs one plan is made: per convolution the form, or the convolution itself,
such that the sum of whitened errors is smallest within the budget (a knapsack over a grid of hyper-parameters, as in
BALF). All methods of a scheme then fill the same plan. The peers:

- svd_uniform: spatial SVD of the weights alone, the same rank ratio everywhere (as AIMET's spatial SVD).
- svd_knapsack: whitened SVD per layer with the knapsack (as BALF): low_rank's plan, method whitened.
- random: the scheme's plan with random weights, fine-tuned like the others.

`finetuned` starts from `reconstructed`; `svd_uniform` and `svd_knapsack` are fine-tuned too where `finetuned` is asked
for. Needs the folder with data/cifar10_jpeg_*.npz and weights/resnet*_jpeg.pt. Rows go to --results as they are
finished, and are not computed again when the script is repeated with the same file.

`reconstructed` has --unlabelled images, a tenth of them held out; `convert` by default has 512, a quarter held out.
"""

import argparse
import hashlib
import io
import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from sepdeploy.analyze.blocks import find_blocks
from sepdeploy.analyze.damage import network_damage
from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.plan import Candidate, Decision, Kept, Plan, Reason, Replaced, SchemeOptions
from sepdeploy.core.progress import Silent
from sepdeploy.core.training import ReconstructOptions, TrainOptions
from sepdeploy.data.images import open_images
from sepdeploy.data.preprocess import read_preprocess
from sepdeploy.loading.model import load_model
from sepdeploy.planning.candidates import find_candidate, propose_plan
from sepdeploy.planning.convert import convert_network
from sepdeploy.planning.evaluate import Evaluator, prefer_channels_last, tensor_batches
from sepdeploy.schemes.fresh_weights import draw_weights
from sepdeploy.schemes.kernels import compose_kernels
from sepdeploy.schemes.module import ChainConv2d
from sepdeploy.schemes.scheme import find_scheme
from sepdeploy.train.finetune import finetune
from sepdeploy.train.reconstruct import reconstruct
from sepdeploy.transfer.moments import patch_moments
from sepdeploy.transfer.prefix import run_until

_RATIOS = (0.03, 0.05, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8)
_OVERLAPS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
GRIDS = {
    "depthwise_separable": [SchemeOptions(terms=terms) for terms in range(1, 8)],
    "spatial_separable": [SchemeOptions(rank_ratio=ratio) for ratio in _RATIOS],
    "low_rank": [SchemeOptions(rank_ratio=ratio) for ratio in _RATIOS],
    "optimized_separable": [SchemeOptions(overlap=overlap) for overlap in _OVERLAPS],
    "spatial_optimized": [SchemeOptions(overlap=overlap) for overlap in _OVERLAPS],
}
METHODS = ("data-free", "whitened", "anchored", "reconstructed", "finetuned", "random", "svd_uniform", "svd_knapsack")
ARCHITECTURES = {"resnet20": "models.resnet_cifar:resnet20", "resnet56": "models.resnet_cifar:resnet56"}


@dataclass(frozen=True)
class Row:
    """One measurement; everything that it depends on, and the accuracy on all test images."""

    net: str
    scheme: str
    budget: str
    method: str
    epochs: int
    macs_ratio: float
    accuracy_ratio: float
    damage: float
    seconds: float
    images: dict[str, int]
    note: str = ""

    @property
    def key(self):
        return self.net, self.scheme, self.budget, self.method, self.epochs, json.dumps(self.images)


def unpack(source: Path, name: str, folder: Path, count: int | None = None) -> str:
    """JPEG bytes one after the other, as an npz of pixels."""
    with np.load(source / "data" / f"cifar10_jpeg_{name}.npz") as arrays:
        data, offsets, labels = arrays["jpeg"], arrays["offsets"], arrays["labels"][:count]
        files = [data[offsets[i] : offsets[i + 1]].tobytes() for i in range(len(labels))]
    images = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    path = folder / f"{name}.npz"
    np.savez(path, images=images, labels=labels.astype(np.int64))
    return str(path)


def whitened_error(weight, candidate: Candidate, moments) -> float:
    """E |W p - W' p|^2 / E |W p|^2 over the patches p of the original network, W' being the closed form."""
    scheme = find_scheme(candidate.scheme)
    error = weight - compose_kernels(scheme.factorize(weight, candidate.form), candidate.form)
    rows, reference = (k.double().flatten(1) for k in (error, weight))
    return float((rows @ moments * rows).sum() / (reference @ moments * reference).sum())


class Study:
    """One network with its data; makes plans and fills them."""

    def __init__(self, arguments, folder: Path) -> None:
        self.arguments = arguments
        preprocess = read_preprocess(Path("calibration/cifar10.toml"))
        train, test = (unpack(arguments.source, name, folder) for name in ("train", "test"))
        given = {"preprocess": preprocess, "seed": 0}
        unlabelled = open_images(train, role="calibration", limit=arguments.unlabelled, **given)
        self.calibration = unlabelled.head(arguments.calibration)
        self.fit, self.held_out = unlabelled.split(0.9, 0)
        labelled = open_images(train, role="calibration", limit=arguments.labelled, **given)
        self.train, self.train_held_out = labelled.split(0.98, 0)  # which decide on the epoch
        self.test = open_images(test, role="validation", limit=arguments.test, **given)
        arch = ARCHITECTURES[arguments.net]
        self.network = load_model(arguments.source / "weights" / f"{arguments.net}_jpeg.pt", arch).module
        self.example = torch.from_numpy(next(self.calibration.batches(1))[0])
        self.trace = trace_network(self.network, self.example)
        prefer_channels_last(self.network, self.example)
        self.evaluator = Evaluator(self.network, self.test, 64)
        self.folder = folder
        self._moments: dict[str, torch.Tensor] = {}

    def moments(self, site):
        """Second moments of the patches that a convolution reads in the original network, (n, n)."""
        if site.name not in self._moments:
            total = None
            for batch in tensor_batches(self.calibration.head(128), 64)():
                seen = run_until(self.network, site.name, batch, calls=1, needs_outputs=False)
                part = patch_moments(seen.inputs[0], site.spec.as_factor())[0]
                total = part if total is None else total + part
            self._moments[site.name] = total
        return self._moments[site.name]

    def plan(self, scheme: str, ratio: float) -> Plan:
        """The plan with the smallest sum of whitened errors within `ratio` of the MACs."""
        modules = dict(self.network.named_modules())
        options: dict[str, list[tuple[int, float, Candidate | None]]] = {}
        for site in self.trace.sites:
            options[site.name] = [(site.macs, 0.0, None)]
            for choice in GRIDS[scheme]:
                candidate = find_candidate(site, find_scheme(scheme), choice)
                if isinstance(candidate, Candidate):
                    weight = modules[site.name].weight.detach()
                    error = whitened_error(weight, candidate, self.moments(site))
                    options[site.name].append((candidate.macs, error, candidate))
        chosen = knapsack(options, int(ratio * self.trace.total_macs) - self.rest_macs)
        return self._plan_of(scheme, chosen)

    def uniform(self, scheme: str, options: SchemeOptions) -> Plan:
        """The same hyper-parameters everywhere."""
        return propose_plan(self.trace, scheme, options, self.network)

    def uniform_rank(self, ratio: float) -> Plan:
        """Spatial SVD with the largest rank ratio everywhere, in hundredths, that keeps to `ratio` of the MACs."""
        plans = (self.uniform("spatial_separable", SchemeOptions(rank_ratio=r / 100)) for r in range(99, 0, -1))
        return next(plan for plan in plans if self.macs_ratio(plan) <= ratio)

    @property
    def rest_macs(self) -> int:
        return self.trace.total_macs - sum(site.macs for site in self.trace.sites)

    def macs_ratio(self, plan: Plan) -> float:
        return plan.macs_of(self.trace) / self.trace.total_macs

    def _plan_of(self, scheme: str, chosen: dict[str, Candidate | None]) -> Plan:
        kept = Kept(Reason.NOT_CHEAPER)
        decisions = tuple(
            Decision(s.name, s.macs, s.params, kept if chosen[s.name] is None else Replaced(chosen[s.name]))
            for s in self.trace.sites
        )
        return Plan(scheme, SchemeOptions(), decisions)

    def convert(self, plan: Plan, method: str) -> nn.Module:
        batches = tensor_batches(self.calibration, 64)
        return convert_network(self.network, self.trace, plan, batches, method=method)[0]

    def reconstruct(self, start: nn.Module, plan: Plan) -> nn.Module:
        blocks = find_blocks(self.network, self.example, tuple(plan.replaced))
        options = ReconstructOptions()
        result, step = reconstruct(
            start, self.network, blocks, self.fit, self.held_out, options, checkpoint=None, progress=Silent()
        )
        return result, step.detail

    def finetune(self, start: nn.Module, plan: Plan, name: str) -> nn.Module:
        blocks = find_blocks(self.network, self.example, tuple(plan.replaced))
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        result, step, _ = finetune(
            start,
            self.network,
            self.train,
            self.train_held_out,
            TrainOptions(epochs=self.arguments.epochs),
            features=tuple(block.name for block in blocks if block.name),
            folder=folder,
            progress=Silent(),
        )
        return result, step.detail

    def randomize(self, network: nn.Module) -> nn.Module:
        """All weights of the converted network drawn anew."""
        torch.manual_seed(0)
        for module in network.modules():
            if isinstance(module, ChainConv2d):
                draw_weights(module, 2.0)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        chains = [module for module in network.modules() if isinstance(module, ChainConv2d)]
        factors = {id(part) for chain in chains for part in chain.modules()}
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and id(module) not in factors:
                module.reset_parameters()
        return network


def knapsack(options, budget: int):
    """One (macs, loss, candidate) per name with the least total loss within the budget.

    By a price per MAC, found by bisection, then the largest gains that still fit: the exact optimum up to less than one
    layer's step.
    """

    def at(price):
        return {name: min(o, key=lambda c: (c[1] + price * c[0], c[0])) for name, o in options.items()}

    def macs(picked):
        return sum(c[0] for c in picked.values())

    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if macs(at(middle)) <= budget else (middle, high)
    picked = at(high)
    if macs(picked) > budget:
        raise SystemExit("the budget is below the cheapest forms of this scheme")
    while True:
        room = budget - macs(picked)
        better = [
            ((picked[name][1] - c[1]) / (c[0] - picked[name][0]), name, c)
            for name, o in options.items()
            for c in o
            if 0 < c[0] - picked[name][0] <= room and c[1] < picked[name][1]
        ]
        if not better:
            return {name: c[2] for name, c in picked.items()}
        _, name, candidate = max(better, key=lambda entry: entry[0])
        picked[name] = candidate


class Results:
    """Rows on disk, one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self.rows = {row.key: row for row in (Row(**json.loads(line)) for line in lines)}

    def add(self, row: Row) -> None:
        self.rows[row.key] = row
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(table([row], header=False), flush=True)


def table(rows, *, header: bool = True) -> str:
    head = "net       scheme                budget       MACs   method         epochs  accuracy %  damage  seconds\n"
    return (head if header else "") + "\n".join(
        f"{r.net:9} {r.scheme:21} {r.budget:11} {r.macs_ratio:5.3f}   {r.method:14} {r.epochs:6}  "
        f"{100 * r.accuracy_ratio:10.2f}  {r.damage:6.3f}  {r.seconds:7.0f}  {r.note}".rstrip()
        for r in rows
    )


def run_plan(study: Study, results: Results, scheme: str, budget: str, plan: Plan, methods) -> None:
    """Every method on one plan; each that follows another starts from its network."""
    arguments = study.arguments
    images = {name: len(getattr(study, name)) for name in ("calibration", "fit", "train", "test")}
    base = Row(arguments.net, scheme, budget, "", 0, study.macs_ratio(plan), 0.0, 0.0, 0.0, images)
    networks: dict[str, nn.Module] = {}

    def row_of(method: str) -> Row:
        trains = method in ("finetuned", "random") or (method.startswith("svd") and "finetuned" in arguments.methods)
        return replace(base, method=method, epochs=arguments.epochs if trains else 0)

    def network(method: str):
        """The network and a note, made once and kept in the work folder."""
        name = hashlib.sha256(repr(row_of(method).key).encode()).hexdigest()[:16]
        path = study.folder / f"{arguments.net}-{method}-{name}.pt"
        if method not in networks:
            if path.is_file():
                networks[method] = torch.load(path, weights_only=False)  # our own
            else:
                networks[method] = make(method)
                torch.save(networks[method], path)
        return networks[method]

    def make(method: str):
        if method == "reconstructed":
            return study.reconstruct(network("anchored")[0], plan)
        if method == "finetuned":
            return study.finetune(network("reconstructed")[0], plan, f"{arguments.net}-{scheme}-{budget}-{method}")
        if method == "random":
            start = study.randomize(study.convert(plan, "data-free"))
            return study.finetune(start, plan, f"{arguments.net}-{scheme}-{budget}-{method}")
        if method.startswith("svd"):
            start = study.convert(plan, "data-free" if method == "svd_uniform" else "whitened")
            if "finetuned" not in arguments.methods:
                return start, ""
            return study.finetune(start, plan, f"{arguments.net}-{scheme}-{budget}-{method}")
        return study.convert(plan, method), ""

    for method in methods:
        row = row_of(method)
        if row.key in results.rows:
            continue
        start = time.perf_counter()
        converted, note = network(method)
        seconds = time.perf_counter() - start
        quality, _ = study.evaluator.quality(converted)
        damage = network_damage(study.network, converted, tensor_batches(study.test.head(2000), 64)())
        results.add(replace(row, accuracy_ratio=quality.accuracy_ratio, damage=damage, seconds=seconds, note=note))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--net", choices=ARCHITECTURES, default="resnet20")
    parser.add_argument("--ratios", default="0.75,0.5,0.35,0.25")
    parser.add_argument("--schemes", default=",".join(GRIDS))
    parser.add_argument("--uniform-terms", default="", help="depthwise separable with the same T everywhere: 1,2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--unlabelled", type=int, default=10_000)
    parser.add_argument("--labelled", type=int, default=50_000)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--work", type=Path, help="folder for checkpoints, so that a stopped run goes on")
    parser.add_argument("--results", type=Path, default=Path("transfer_quality.jsonl"))
    arguments = parser.parse_args()
    arguments.methods = arguments.methods.split(",")
    results = Results(arguments.results)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        study = Study(arguments, folder)
        original = study.evaluator.original_quality().accuracy_ratio
        print(f"{arguments.net}: {100 * original:.2f}% on {len(study.test)} images; {torch.get_num_threads()} threads")
        print(table([]), end="", flush=True)
        own = [m for m in arguments.methods if not m.startswith("svd")]
        for terms in filter(None, arguments.uniform_terms.split(",")):
            plan = study.uniform("depthwise_separable", SchemeOptions(terms=int(terms)))
            run_plan(study, results, "depthwise_separable", f"T={terms}", plan, own)
        for ratio in filter(None, arguments.ratios.split(",")):
            for scheme in filter(None, arguments.schemes.split(",")):
                run_plan(study, results, scheme, ratio, study.plan(scheme, float(ratio)), own)
            if "svd_uniform" in arguments.methods:
                plan = study.uniform_rank(float(ratio))
                run_plan(study, results, "spatial_separable", ratio, plan, ["svd_uniform"])
            if "svd_knapsack" in arguments.methods:
                run_plan(study, results, "low_rank", ratio, study.plan("low_rank", float(ratio)), ["svd_knapsack"])
    print(table(sorted(results.rows.values(), key=lambda r: (r.net, -float(r.macs_ratio), r.scheme))))


if __name__ == "__main__":
    main()
