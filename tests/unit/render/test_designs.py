from rich.console import Console

from sepdeploy.core.design import DesignResult
from sepdeploy.core.report import NetworkCost
from sepdeploy.render.designs import complexity_table, designs_table, schemes_table
from sepdeploy.schemes.complexity import scheme_costs
from sepdeploy.schemes.scheme import SCHEMES, find_scheme


def as_text(renderable: object, width: int = 100) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def line(text: str, start: str) -> list[str]:
    (found,) = (each for each in text.splitlines() if each.strip().startswith(start))
    return found.split()


def test_schemes_are_listed_once_with_their_options() -> None:
    text = as_text(schemes_table(scheme_costs(64, 3, 32)), width=300)
    for name in SCHEMES:
        scheme = find_scheme(name)
        cells = line(text, f"{name} ")
        assert scheme.prefix in cells or (not scheme.prefix and "-" in cells)
        assert [cell.strip(",") for cell in cells if cell.startswith("--")] == [
            f"--{option.replace('_', '-')}" for option in scheme.option_names
        ]


def test_complexity_of_one_convolution() -> None:
    rows = scheme_costs(64, 3, 32)
    text = as_text(complexity_table(rows, 64, 3, 32))
    assert max(map(len, text.splitlines())) <= 100
    assert text.startswith("64 to 64 channels, 3x3, 32x32 pixels")
    assert line(text, "depthwise_separable")[-10:-4] == ["K**2)", "4.67", "4.78", "0.13x", "yes", "3x3"]
    assert "no" in line(text, "depthwise ")
    assert text.count("optimized_separable") == 2


def test_refusals_take_the_place_of_forms() -> None:
    text = as_text(complexity_table(scheme_costs(64, 1, 8), 64, 1, 8), width=200)
    assert " ".join(line(text, "depthwise_separable")).endswith(
        "- - - - a 1x1 kernel has no spatial extent to separate"
    )


def test_designs_stand_below_their_original() -> None:
    def result(name: str, macs: int, *, keeps: bool) -> DesignResult:
        original = NetworkCost(40_000_000, 270_000, 19)
        variant = NetworkCost(macs, 135_000, 21)
        return DesignResult(name, "optimized_separable", "a:b", 3.625, (3, 32, 32), original, variant, 18, keeps)

    results = [result("o-net_m3.625", 41_000_000, keeps=True), result("dw-[red]net\x1b", 4_000_000, keeps=False)]
    text = as_text(designs_table(results))
    assert line(text, "original") == ["original", "1", "0.270", "1.00x", "40.0", "1.00x", "-", "yes"]
    assert line(text, "o-net") == [
        "o-net_m3.625", "3.625", "0.135", "0.50x", "41.0", "1.02x", "18", "of", "21", "yes",
    ]  # fmt: skip
    assert line(text, "dw-")[0] == "dw-[red]net\\x1b"
    assert line(text, "dw-")[-1] == "no"
    assert "input 3,32,32" in text
