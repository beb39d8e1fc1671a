"""The table of activation memory shows where a separable form needs more than the dense convolution."""

import io

import torch
from rich.console import Console
from torch import nn

from sepdeploy.analyze.liveness import measure_memory
from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.inspection import Inspection
from sepdeploy.core.plan import Candidate, SchemeOptions
from sepdeploy.planning.candidates import find_candidate
from sepdeploy.planning.memory import memory_with_candidates
from sepdeploy.render.memory import memory_data, memory_table
from sepdeploy.schemes.scheme import find_scheme

VALUES = 8 * 8 * 4  # bytes of one float32 channel


def inspection():
    network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1)).eval()
    example = torch.zeros(1, 3, 8, 8)
    trace = trace_network(network, example)
    candidates, memory_with = {}, {}
    for name in ("depthwise_separable", "low_rank"):
        scheme = find_scheme(name)
        offers = {site.name: find_candidate(site, scheme, SchemeOptions(rank_ratio=0.1)) for site in trace.sites}
        for site, offer in offers.items():
            candidates.setdefault(site, {})[name] = offer
        chosen = {site: offer for site, offer in offers.items() if isinstance(offer, Candidate)}
        memory_with[name] = memory_with_candidates(network, trace, chosen, example)
    return Inspection(trace, candidates, measure_memory(network, example), memory_with, ())


def test_bytes_by_hand():
    data = memory_data(inspection())
    # The network's input of 3 channels stays alive throughout.
    assert data["original"]["layers"]["2"] == {"float32_bytes": (3 + 16 + 32) * VALUES, "int8_bytes": 51 * 64}
    # Two terms: the input, the first term's sum, the second's middle, then its output beside the sum.
    assert data["depthwise_separable"]["layers"]["2"]["float32_bytes"] == (3 + 32 + 16 + 32) * VALUES
    assert data["low_rank"]["layers"]["2"]["float32_bytes"] < data["original"]["layers"]["2"]["float32_bytes"]
    assert data["original"]["peak_float32_bytes"] == 51 * VALUES
    assert "0" in data["original"]["layers"]


def test_only_replaceable_layers_are_shown_and_the_ratio_tells_more_from_less():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(memory_table(inspection(), {"depthwise_separable": "d-"}))
    lines = console.export_text().splitlines()
    (row,) = (line.split() for line in lines if line.strip().startswith("2 "))
    assert row == [
        "2",
        "13.1",
        "3.26",
        f"{83 / 51:.2f}x",
        f"{38 / 51:.2f}x",
    ]  # low rank: 3 + 3 + 32 channels
    assert not any(line.strip().startswith("0 ") for line in lines)  # the stem has too few channels for any scheme
    (total,) = (line.split() for line in lines if line.strip().startswith("whole network"))
    assert total[2:5] == ["13.1", "3.26", f"{83 / 51:.2f}x"]
