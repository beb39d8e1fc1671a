"""Put the result of a conversion into README.md, between its two markers.

    sepdeploy convert ... --output DIR
    python tests/benchmarks/readme_table.py DIR

Every number comes from DIR/report.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sepdeploy.core.codec import read_json
from sepdeploy.core.report import Report
from sepdeploy.render.summary import environment_text, verdict

BEGIN = "<!-- result: written by tests/benchmarks/readme_table.py -->\n"
END = "<!-- end of result -->\n"


def main() -> None:
    report = read_json(Report, Path(sys.argv[1]) / "report.json")
    readme = Path(__file__).parents[2] / "README.md"
    text = readme.read_text()
    start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
    readme.write_text(text[:start] + section(report) + text[stop:])


def section(report: Report) -> str:
    plan = report.plan
    lines = [
        f"`{report.command}`",
        "",
        f"{verdict(report)} {len(plan.replaced)} of {len(plan.decisions)} convolutions were replaced; "
        f"{report.original.macs / 1e6:.1f} M MACs became {report.converted.macs / 1e6:.1f} M. "
        + ("No labels were used." if all(step.name != "fine-tuning" for step in report.recovery) else "Fine-tuned."),
        "",
        "| file | accuracy % | size kB | median ms | minimum ms | speed-up (95% interval) |",
        "|---|---|---|---|---|---|",
    ]
    environments = []
    for result in report.artifacts:
        latency, quality = result.latency, result.quality
        if latency is None or quality is None or quality.accuracy_ratio is None:
            raise SystemExit("the report lacks latencies or accuracies")
        environments.append(environment_text(latency.environment))
        speedup = "reference"
        if latency.speedup is not None:
            speedup = f"**{latency.speedup:.2f}x** ({latency.speedup_low:.2f} to {latency.speedup_high:.2f})"
        lines.append(
            f"| `{result.artifact.path}` | {100 * quality.accuracy_ratio:.2f} | {result.artifact.size_bytes / 1e3:.0f} "
            f"| {latency.median_ms:.3f} | {latency.minimum_ms:.3f} | {speedup} |"
        )
    repeats = {result.latency.repeats for result in report.artifacts if result.latency}
    lines += [
        "",
        f"Accuracy on {report.validation.images:,} images. Latency: wall clock, at least {min(repeats)} "
        f"repeats, original and converted file interleaved; {'; '.join(dict.fromkeys(environments))}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
