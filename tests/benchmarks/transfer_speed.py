"""How fast the closed forms are: seconds per layer, and block projection against a loop of SVDs over the blocks.

python tests/benchmarks/transfer_speed.py [--channels 512] [--repeats 5]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sepdeploy.core.chain import Chain
from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.schemes.scheme import find_scheme

CASES = {
    "optimized_separable, N = 2": ("optimized_separable", SchemeOptions()),
    "optimized_separable, N = 3": ("optimized_separable", SchemeOptions(factors=3)),
    "optimized_separable, N = 4": ("optimized_separable", SchemeOptions(factors=4)),
    "spatial_optimized, N = 2": ("spatial_optimized", SchemeOptions()),
    "depthwise_separable, T = 2": ("depthwise_separable", SchemeOptions(terms=2)),
    "spatial_separable": ("spatial_separable", SchemeOptions()),
    "low_rank": ("low_rank", SchemeOptions()),
}


def loop_over_blocks(weight: Tensor, chain: Chain) -> None:
    """The same projection as it is usually written: one truncated SVD per block."""
    first, second = chain.factors
    for outputs in weight.double().split(first.out_channels // second.groups):
        for block in outputs.split(first.in_channels // first.groups, dim=1):
            torch.linalg.svd(block.flatten(1), full_matrices=False)


def seconds(run: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    spec = ConvSpec(arguments.channels, arguments.channels, (3, 3))
    weight = torch.randn(spec.out_channels, spec.in_channels, 3, 3, generator=torch.Generator().manual_seed(0))
    print(
        f"{spec.in_channels} x {spec.out_channels}, 3x3; {torch.get_num_threads()} threads, {arguments.repeats} repeats"
    )
    print(f"{'closed form':30} {'median s':>9} {'minimum s':>10}")
    medians = {}
    for name, (scheme_name, options) in CASES.items():
        scheme = find_scheme(scheme_name)
        form = scheme.design(spec, options)
        times = seconds(lambda scheme=scheme, form=form: scheme.factorize(weight, form), arguments.repeats)
        medians[name] = statistics.median(times)
        print(f"{name:30} {medians[name]:9.2f} {min(times):10.2f}")
    name = "optimized_separable, N = 2"
    (chain,) = find_scheme("optimized_separable").design(spec, CASES[name][1]).terms
    loop = statistics.median(seconds(lambda: loop_over_blocks(weight, chain), arguments.repeats))
    print(f"{'loop of SVDs over the blocks':30} {loop:9.2f}; batched is {loop / medians[name]:.1f} times as fast")


if __name__ == "__main__":
    main()
