"""Says what one inference of each file executes, from what bench.py printed and the counting plugin wrote.

    summarize.py CORE PRINTED COUNTS

Prints one JSON object per file. Counts are of the inference in the middle of those that were counted, without what
marking costs. They are no times.
"""

import json
import sys
from pathlib import Path


def main(core, printed, counts):
    """Print the summary."""
    blocks, regions = [], []
    with Path(counts).open() as file:
        for line in file:
            data = json.loads(line)
            if "block" in data:
                blocks.append(data)
            elif "region" in data:
                regions.append(data)
    with Path(printed).open() as file:
        reports = [report for report in map(json.loads, file) if "file" in report]
    for report in reports:
        own, regions = regions[: report["regions"]], regions[report["regions"] :]
        summary = {"file": report["file"], "core": core, "method": "instructions counted under emulation"}
        if "error" in report:
            summary["error"] = report["error"]
        else:
            summary["runtime"] = report["runtime"]
            nothing = 2 * report["warmup"]  # the region around nothing right before those that count
            totals = [counted(each, own[nothing], blocks, report["burst"]) for each in own[nothing + 1 :]]
            summary.update(middle_of(totals))
        print(json.dumps(summary))


def counted(region, nothing, blocks, burst):
    """Totals of one inference of the `burst` in a region."""
    marking = dict(map(tuple, nothing["blocks"]))
    total = {"instructions": 0, "classes": {}, "macs": 0, "loaded_bytes": 0, "stored_bytes": 0}
    for number, times in region["blocks"]:
        times -= marking.get(number, 0)
        if times <= 0:
            continue
        block = blocks[number]
        total["instructions"] += times * (len(block["words"]) // 8)
        for name in ("macs", "loaded_bytes", "stored_bytes"):
            total[name] += times * block[name]
        for name, each in block["classes"].items():
            total["classes"][name] = total["classes"].get(name, 0) + times * each
    for name in ("l1_misses", "l2_misses"):
        total[name] = max(0, region[name] - nothing[name])
    if burst > 1:
        for name, count in total.items():
            total[name] = {each: n / burst for each, n in count.items()} if name == "classes" else count / burst
    return total


def middle_of(totals):
    """The one in the middle by instructions, with the number of all."""
    middle = sorted(totals, key=lambda total: total["instructions"])[len(totals) // 2]
    return dict(middle, repeats=len(totals))


if __name__ == "__main__":
    main(*sys.argv[1:])
