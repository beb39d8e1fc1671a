"""`sepdeploy bench`."""

from __future__ import annotations

from pathlib import Path

import click

from sepdeploy.cli.parameters import print_tables, shown_progress

__all__ = ["command"]


@click.command(short_help="Measure the latency of ONNX and TFLite files on this CPU.")
@click.argument("artifacts", metavar="ARTIFACT...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="Threads of the runtime.")
@click.option("--seconds", default=2.0, show_default=True, type=click.FloatRange(0, min_open=True),
              help="Measuring time per file.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(artifacts: tuple[Path, ...], threads: int, seconds: float, as_json: bool) -> None:
    """Time each ARTIFACT (.onnx or .tflite) on random inputs; several are interleaved, the first is the reference.

    \b
    Example:
      sepdeploy bench demo/original/model.onnx demo/model.onnx
    """
    from sepdeploy.bench.session import open_session
    from sepdeploy.bench.timing import measure

    with shown_progress(is_quiet=as_json) as progress:
        progress.stage(f"timing {len(artifacts)} files, {threads} threads")
        sessions = {str(path): open_session(path, threads=threads) for path in dict.fromkeys(artifacts)}
        first = str(artifacts[0])
        reference = first if len(sessions) > 1 else None
        results = measure(sessions, reference=reference, threads=threads, seconds=seconds)
    if as_json:
        import json

        from sepdeploy.core.codec import to_data

        click.echo(json.dumps({path: to_data(latency) for path, latency in results.items()}, indent=1))
        return
    from sepdeploy.render.terminal import latency_table

    print_tables(latency_table(results))
