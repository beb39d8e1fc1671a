"""`sepdeploy bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sepdeploy.bench.arm_cores import emulated_core
from sepdeploy.cli.parameters import print_tables, shown_progress
from sepdeploy.cli.remote_bench import (
    REMOTE_TARGETS,
    RemoteOptions,
    check_remotely,
    is_remote,
    measure_remotely,
    remote_options,
)
from sepdeploy.core.options import TARGETS

if TYPE_CHECKING:
    from sepdeploy.bench.arm_cores import ArmCore
    from sepdeploy.core.artifact import Artifact
    from sepdeploy.core.measurement import Counts, Latency, LayerCounts, Measured, Numerics
    from sepdeploy.core.progress import Progress
    from sepdeploy.planning.target import Target

__all__ = ["command"]


@click.command(short_help="Measure the latency of ONNX and TFLite files, here, on a board or on an emulated Arm core.")
@click.argument("artifacts", metavar="ARTIFACT...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--target", metavar="TARGET", help=f"Where: an emulated Arm core, with the runtime of each file "
              f"({', '.join(TARGETS)}), the same in Docker (docker:cortex-a72), {REMOTE_TARGETS}; "
              "default: this CPU.")  # fmt: skip
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="Threads of the runtime.")
@click.option("--seconds", default=2.0, show_default=True, type=click.FloatRange(0, min_open=True),
              help="Measuring time per file, where time is measured.")  # fmt: skip
@click.option("--per-layer", "is_per_layer", is_flag=True, help="What each layer executes too, on an Arm core.")
@click.option("--check/--no-check", "is_checked", default=True, show_default=True, help="Whether to see first that the "
              "files compute the same on the Arm core as here.")  # fmt: skip
@remote_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    artifacts: tuple[Path, ...],
    target: str | None,
    threads: int,
    seconds: float,
    is_per_layer: bool,
    is_checked: bool,
    remote: RemoteOptions,
    as_json: bool,
) -> None:
    """Time each ARTIFACT (.onnx or .tflite) on random inputs; several are interleaved, the first is the reference.

    On an Arm core nothing is timed: instructions are counted under emulation, and a model of the core makes a range of
    cycles of them. The first time it builds what it emulates, in the user's cache directory.

    A board needs python3 (3.10 or newer) with numpy and onnxruntime or ai-edge-litert, or --board-wheels; your key
    must be on it, and its host key known. Everything is removed from it at the end.

    \b
    Examples:
      sepdeploy bench demo/original/model.onnx demo/model.onnx
      sepdeploy bench demo/original/model.int8.tflite demo/model.int8.tflite --target cortex-a72
      sepdeploy bench demo/original/model.tflite demo/model.tflite --target ssh://pi@raspberrypi.local
      sepdeploy bench demo/model.int8.tflite --target adb --benchmark-model android_aarch64_benchmark_model
    """
    paths = tuple(dict.fromkeys(artifacts))
    core = emulated_core(target)
    if is_per_layer and core is None:
        raise click.UsageError("--per-layer counts on an Arm core: give --target cortex-a72 or another one")
    layers: dict[str, list[LayerCounts]] = {}
    numerics: list[Numerics] = []
    with shown_progress(is_quiet=as_json) as progress:
        if is_checked and core is not None and target is not None:  # before the counting, which takes long
            _target(target, paths, threads)  # refuses what it cannot do
            numerics = _checked(core, paths, progress)
        elif is_checked and target is not None and is_remote(target):
            numerics = check_remotely(target, paths, threads, remote, progress)
        if target is None:
            measured: Sequence[Measured] = _timed(paths, threads, seconds, progress)
        elif is_remote(target):
            measured = measure_remotely(target, paths, threads, seconds, remote, progress)
        else:
            measured = _on_target(target, paths, threads, seconds, progress)
        if core is not None and is_per_layer:
            layers = {str(path): _layers(core, path, progress) for path in paths}
    results = {str(path): each for path, each in zip(paths, measured, strict=True)}
    if as_json:
        import json

        from sepdeploy.core.codec import to_data

        data = {path: to_data(each) | _derived(each) for path, each in results.items()}
        for path, same in zip(results, numerics, strict=bool(numerics)):
            data[path]["numerics"] = to_data(same)
        for path, each in layers.items():
            data[path]["layers"] = [to_data(layer) for layer in each]
        click.echo(json.dumps(data, indent=1))
        return
    _print(results, layers, numerics)


def _timed(paths: Sequence[Path], threads: int, seconds: float, progress: Progress) -> list[Latency]:
    """Latencies on this CPU, of files of any format."""
    from sepdeploy.bench.session import open_session
    from sepdeploy.bench.timing import measure

    progress.stage(f"timing {len(paths)} files, {threads} threads")
    sessions = {str(path): open_session(path, threads=threads) for path in paths}
    reference = str(paths[0]) if len(sessions) > 1 else None
    return list(measure(sessions, reference=reference, threads=threads, seconds=seconds).values())


def _on_target(
    name: str, paths: Sequence[Path], threads: int, seconds: float, progress: Progress
) -> Sequence[Measured]:
    target, files = _target(name, paths, threads)
    progress.stage(f"{target.name}: {len(paths)} files")
    return target.compare(files, seconds=seconds, seed=0)


def _target(name: str, paths: Sequence[Path], threads: int) -> tuple[Target, list[Artifact]]:
    """The target that runs the files, and these as it takes them."""
    from sepdeploy.bench.files import describe_file
    from sepdeploy.planning.target import bench_target

    files = [describe_file(path) for path in paths]
    return bench_target(name, files[0].format, threads), files


def _checked(core: ArmCore, paths: Sequence[Path], progress: Progress) -> list[Numerics]:
    from sepdeploy.bench.arm_numerics import compare_numerics, require_same

    found = compare_numerics(core, paths, progress)
    require_same(paths, found)
    return found


def _layers(core: ArmCore, path: Path, progress: Progress) -> list[LayerCounts]:
    from sepdeploy.bench.arm_layers import count_layers

    return count_layers(core, path, progress)[1]


def _derived(measured: Measured) -> dict[str, float]:
    """What tables have and the fields do not."""
    from sepdeploy.core.measurement import Counts

    if isinstance(measured, Counts):
        return {"modelled_ms_low": measured.low_ms, "modelled_ms_high": measured.high_ms}
    return {}


def _print(results: dict[str, Measured], layers: dict[str, list[LayerCounts]], numerics: Sequence[Numerics]) -> None:
    from sepdeploy.core.measurement import Counts
    from sepdeploy.render.terminal import counts_table, cycles_table, latency_table, layers_table

    counts: dict[str, Counts] = {path: each for path, each in results.items() if isinstance(each, Counts)}
    latencies: dict[str, Latency] = {path: each for path, each in results.items() if not isinstance(each, Counts)}
    if latencies:
        print_tables(latency_table(latencies))
    if counts:
        print_tables(counts_table(counts), *(layers_table(path, each) for path, each in layers.items()))
        print_tables(cycles_table(counts))
    if numerics:
        from sepdeploy.bench.arm_numerics import agreement_sentence

        sentence = agreement_sentence(numerics)
        click.echo(f"{sentence[0].upper()}{sentence[1:]}.")
