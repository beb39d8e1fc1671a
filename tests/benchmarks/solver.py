"""How long the exact solve of a selection takes, on random problems of 100 layers with 50 choices each.

    python tests/benchmarks/solver.py

'measured' has what a selection measures: a few shapes whose layers share their prices, as in any residual network,
damages of their own, and noise on both, so that most choices are dominated. 'front' has no noise: none is dominated.
'grid' has one shape and equally spaced prices, the worst there is: countless plans cost exactly the same, and the
solver cannot rule them out one by one. Prints the median and the longest time, the largest gap, and how many of the
solves proved that theirs is the best plan.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace

import numpy as np

from sepdeploy.core.selection import Choice, LayerChoices
from sepdeploy.planning.solve import Limits, Objective, Solution, pareto_front, solve

LAYERS, CHOICES, SEEDS = 100, 50, 4
TIGHTNESS = (0.003, 0.03, 0.1, 0.4)
"""Limits as a share of the way from the least to what the plan without that limit comes to."""


@dataclass(frozen=True)
class Kind:
    shapes: int
    noise: float
    is_grid: bool = False


KINDS = {"measured": Kind(6, 0.3), "front": Kind(6, 0.0), "grid": Kind(1, 0.0, is_grid=True)}


def problem(kind: Kind, seed: int) -> list[LayerChoices]:
    """Choices that keep a share of the layer's cost; damage grows as the square of what is taken away."""
    generator = np.random.default_rng(seed)
    count = CHOICES - 1
    shapes = []
    for _ in range(kind.shapes):
        dense_ms = 10 ** generator.uniform(-2, 0.5)
        share = np.linspace(0.05, 0.95, count) if kind.is_grid else generator.uniform(0.05, 1, count)
        shapes.append((dense_ms, share, dense_ms * (share * generator.lognormal(0, kind.noise, count) - 1)))
    layers = []
    for index in range(LAYERS):
        dense_ms, share, differences = shapes[index * kind.shapes // LAYERS]
        sensitivity = 10 ** generator.uniform(-4, -1)
        damages = sensitivity * (1 - share) ** 2 * generator.lognormal(0, kind.noise, count)
        macs = np.rint(share * dense_ms * 1e8)
        dense = Choice("dense", None, (), 0.0, 0.0, 0.0, 0.0, round(dense_ms * 1e8), round(dense_ms * 1e6))
        others = [
            replace(
                dense, label=f"{kept:.3f}", difference=float(d), damage=float(damage), macs=int(m), params=int(m) // 9
            )
            for kept, d, damage, m in zip(share, differences, damages, macs, strict=True)
        ]
        layers.append(LayerChoices(f"layer{index}", (dense, *others)))
    return layers


def timed_solves(layers: list[LayerChoices]) -> list[tuple[float, Solution]]:
    """Least latency under damage, least damage under latency, and least latency under damage and parameters."""
    fastest = solve(layers, minimize="latency")
    unharmed = solve(layers, minimize="damage")
    tasks: list[tuple[Objective, Limits]] = []
    for share in TIGHTNESS:
        damage = share * fastest.damage
        params = round(fastest.params + (unharmed.params - fastest.params) * 0.9 * (1 - share))
        tasks.append(("latency", Limits(damage=damage)))
        tasks.append(("damage", Limits(latency=(1 - share) * fastest.difference)))
        tasks.append(("damage", Limits(latency=(1 - share) * fastest.difference, params=params)))
        tasks.append(("macs", Limits(damage=damage)))
    results = []
    for objective, limits in tasks:
        start = time.perf_counter()
        solution = solve(layers, minimize=objective, limits=limits)
        results.append((time.perf_counter() - start, solution))
    return results


def main() -> None:
    print(f"{LAYERS} layers x {CHOICES} choices, time limit 5 s")
    for name, kind in KINDS.items():
        problems = [problem(kind, seed) for seed in range(SEEDS)]
        results = [result for layers in problems for result in timed_solves(layers)]
        seconds = [each for each, _ in results]
        gaps = [solution.gap for _, solution in results]
        print(
            f"{name:10s} median {statistics.median(seconds):.2f} s  longest {max(seconds):.2f} s  "
            f"largest gap {max(gaps):.1e}  proven {sum(gap == 0 for gap in gaps)} of {len(gaps)}",
            flush=True,
        )
        start = time.perf_counter()
        front = pareto_front(problems[0])
        print(f"{'':10s} front of {len(front)} plans in {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
