import re
from dataclasses import replace
from types import ModuleType

import pytest
from rich.console import Console

from sepdeploy.core.measurement import Method
from sepdeploy.core.plan import Kept, Plan, Reason, SchemeOptions
from sepdeploy.errors import ContractError
from sepdeploy.render import terminal


def as_text(renderable: object, width: int = 100) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_numbers_survive_long_and_hostile_names(samples: ModuleType) -> None:
    plain, hostile = samples.success_report(), samples.hostile_report()

    for table in (lambda r: terminal.artifacts_table(r), lambda r: terminal.plan_table(r.plan)):
        numbers = set(re.findall(r"(?<![\w.])\d+\.\d+x?(?![\w.])", as_text(table(plain))))
        text = as_text(table(hostile))
        assert len(numbers) > 10
        assert [number for number in numbers if number not in text] == []
        assert max(map(len, text.splitlines())) <= 100
        assert "…" not in text


def test_names_are_neither_markup_nor_terminal_commands(samples: ModuleType) -> None:
    text = as_text(terminal.plan_table(samples.hostile_report().plan), width=200)

    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "<script>alert('x')</script>&[red]\\x1b[2J\\u202e\\udcff" in text.replace("\n", "")


def test_line_breaks_in_names_are_escaped(samples: ModuleType) -> None:
    text = as_text(terminal.latency_table({"two\nlines": samples.latency(1.0, None)}))

    assert "two\\nlines" in text


def test_inspect_totals_are_those_of_the_whole_network(samples: ModuleType) -> None:
    trace, candidates = samples.trace_and_candidates()
    saved = sum(site.macs - site.macs // 4 for site in trace.sites if site.name in ("down", "wide"))
    saved += next(site.macs - site.macs // 4 for site in trace.sites if site.name == samples.LONG_NAME)

    lines = as_text(terminal.inspect_table(trace, candidates)).splitlines()

    totals = next(line for line in lines if line.strip().startswith("whole"))
    assert f"{trace.total_macs / 1e6:.2f}" in totals
    assert f"{(trace.total_macs - saved) / trace.total_macs:.2f}x" in totals


def test_inspect_gives_every_reason_a_letter_and_spells_it_out(samples: ModuleType) -> None:
    trace, candidates = samples.trace_and_candidates()
    text = as_text(terminal.inspect_table(trace, candidates))

    reasons = dict.fromkeys(
        offer.reason for site in trace.sites for offer in candidates[site.name].values() if isinstance(offer, Kept)
    )
    assert len(reasons) > 2
    for letter, reason in zip("abcdefgh", reasons, strict=False):
        assert f"({letter}) {reason.value}" in text
    stem = next(line for line in text.splitlines() if line.startswith(" stem"))
    assert stem.split()[-2:] == ["(a)", "(a)"]
    assert Reason.NOT_CHEAPER.value not in text


def test_inspect_has_room_for_four_schemes(samples: ModuleType) -> None:
    trace, candidates = samples.trace_and_candidates()
    four = {
        site: {name: next(iter(offers.values())) for name in ("depthwise_separable", "low_rank", "b_c", "d_e")}
        for site, offers in candidates.items()
    }
    text = as_text(terminal.inspect_table(trace, four, {"depthwise_separable": "d-"}))

    totals = next(line for line in text.splitlines() if line.strip().startswith("whole"))
    assert len([cell for cell in totals.split() if cell.endswith("x")]) == 4
    assert "ratio to those now; d- is depthwise separable." in " ".join(text.split())
    assert "…" not in text


def test_inspect_without_schemes_shows_only_the_network(samples: ModuleType) -> None:
    trace, _ = samples.trace_and_candidates()

    text = as_text(terminal.inspect_table(trace, {}))

    assert "MACs with each scheme" not in text
    assert "whole network" in text


def test_latency_table_names_method_place_and_repeats(samples: ModuleType) -> None:
    text = " ".join(as_text(terminal.latency_table({"a.tflite": samples.latency(1.0, None)})).split())

    assert "measured time on this machine or a board; 400 repeats after 20 warm-up" in text
    assert "ai-edge-litert 2.3.0, 1 thread, Example CPU 3.0 GHz (2 cores), Linux x86_64" in text
    assert "reference" in text


def test_latency_table_refuses_two_methods(samples: ModuleType) -> None:
    one = samples.latency(1.0, None)

    with pytest.raises(ContractError, match="must not mix methods"):
        terminal.latency_table({"a": one, "b": replace(one, method=Method.COMPILER_ESTIMATE)})


def test_empty_plan_and_no_files_still_render(samples: ModuleType) -> None:
    empty = Plan("dense", SchemeOptions(), ())

    assert "0 of 0 convolutions replaced, 0 kept" in as_text(terminal.plan_table(empty))
    assert "Latency was not measured." in as_text(terminal.artifacts_table(samples.nothing_replaced_report()))


def test_files_of_an_emulated_core_say_how_they_compare(samples: ModuleType) -> None:
    text = as_text(terminal.artifacts_table(samples.counted_report()))

    assert "Cortex-A72" in text
    assert [text.count(each) for each in ("3 steps", "does not run", "2.5e-07")] == [2, 2, 2]
