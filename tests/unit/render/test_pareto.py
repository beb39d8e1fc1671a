"""The front as a table and a picture: which numbers are predicted, which measured, and which plan was taken."""

import math
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest
from PIL import Image
from rich.console import Console

from sepdeploy.core.pareto import FrontPoint
from sepdeploy.errors import ContractError, UsageError
from sepdeploy.render.pareto import front_picture, front_table

POINTS = (
    FrontPoint(
        "original", 4.0, "ms", 1.0, 0.0, 0.8855, 0.0, 1_080_000, 40_551_000, is_predicted=False, is_original=True
    ),
    FrontPoint("5 of 19 replaced", 2.5, "ms", 1.6, 0.0123),
    FrontPoint(
        "9 of 19 replaced", 2.0, "ms", 2.0, 0.1, 0.8790, 0.65, 400_000, 11_000_000, is_predicted=False, is_chosen=True
    ),
    FrontPoint("19 of 19 replaced", 1.0, "ms", 4.0, 3.5, macs=6_000_000),
)


def rows(points=POINTS, width=100):
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(front_table(points))
    return [line.strip() for line in capture.get().splitlines()]


def row(start, points=POINTS):
    (found,) = (line for line in rows(points) if line.startswith(start))
    return found.removeprefix(start).split()


def svg_texts(path):
    """matplotlib draws letters as paths and leaves the text in a comment before them."""
    parser = ET.XMLParser(target=ET.TreeBuilder(insert_comments=True))
    tree = ET.parse(path, parser)
    return [node.text.strip() for node in tree.iter() if node.tag is ET.Comment]


def test_measured_and_predicted_numbers_tell_apart():
    assert row("original") == ["4.00", "1.00x", "0", "88.55", "0.00", "1.08", "40.6"]
    assert row("5 of 19 replaced") == ["~2.50", "~1.60x", "~0.0123", "-", "-", "-", "-"]
    assert row("9 of 19 replaced") == ["*", "2.00", "2.00x", "0.100", "87.90", "0.65", "0.400", "11.0"]
    assert row("19 of 19 replaced") == ["~1.00", "~4.00x", "~3.50", "-", "-", "-", "6.00"]
    text = "\n".join(rows())
    assert "(ms)" in text
    assert "~ predicted" in text
    assert "* the plan that was taken" in text


def test_caption_explains_only_marks_that_are_there():
    text = "\n".join(rows([POINTS[0]]))
    assert "predicted" not in text
    assert "taken" not in text


def test_a_sum_over_layers_that_falls_below_zero_has_no_speedup(tmp_path):
    point = replace(POINTS[1], latency=-0.25, speedup=math.inf)
    assert row("5 of 19 replaced", [point])[:2] == ["~-0.250", "-"]
    front_picture([POINTS[0], point], tmp_path / "front.svg")


def test_names_are_no_markup():
    assert row("[red]x\\x1b[0m", [replace(POINTS[1], name="[red]x\x1b[0m")])[0] == "~2.50"


@pytest.mark.parametrize("points", [(), (POINTS[0], replace(POINTS[1], unit="kcycles"))])
def test_latencies_of_two_units_or_none_are_refused(points, tmp_path):
    with pytest.raises(ContractError):
        front_table(points)
    with pytest.raises(ContractError):
        front_picture(points, tmp_path / "front.png")


def test_svg_names_its_axes_and_marks(tmp_path):
    front_picture(POINTS, tmp_path / "front.svg")
    texts = svg_texts(tmp_path / "front.svg")
    assert "latency on the target (ms)" in texts
    assert "damage (change of the outputs)" in texts
    assert "measured drop (points)" in texts
    for kind in ("original (measured)", "plan (predicted)", "chosen plan (measured)"):
        assert texts.count(kind) == 1
    assert "plan (measured)" not in texts


def test_predicted_marks_are_hollow(tmp_path):
    def filled_blue(is_predicted):
        path = tmp_path / "front.svg"
        front_picture([POINTS[0], replace(POINTS[1], is_predicted=is_predicted)], path)
        return path.read_text().count("fill: #1f77b4")

    assert filled_blue(is_predicted=True) == 0
    assert filled_blue(is_predicted=False) > 0


def test_without_measured_drops_there_is_one_pair_of_axes(tmp_path):
    front_picture([replace(point, drop_points=None) for point in POINTS], tmp_path / "front.svg")
    assert "measured drop (points)" not in svg_texts(tmp_path / "front.svg")


def test_png_is_a_picture_and_equal_plans_make_equal_files(tmp_path):
    front_picture(POINTS, tmp_path / "front.PNG")
    with Image.open(tmp_path / "front.PNG") as image:
        assert image.format == "PNG"
        assert min(image.size) > 400
        assert len(image.convert("RGB").getcolors(image.width * image.height)) > 10
    for name in ("a.svg", "b.svg"):
        front_picture(POINTS, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.svg", "front.PNG"]


def test_only_the_original_or_no_damage_at_all_can_be_drawn(tmp_path):
    front_picture([POINTS[0]], tmp_path / "one.png")
    front_picture([POINTS[0], replace(POINTS[1], damage=0.0)], tmp_path / "zero.png")
    assert {path.name for path in tmp_path.iterdir()} == {"one.png", "zero.png"}


@pytest.mark.parametrize("name", ["front.jpg", "front", "front.pdf"])
def test_other_formats_are_refused(name, tmp_path):
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        front_picture(POINTS, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write"):
        front_picture(POINTS, tmp_path / "file" / "front.png")


def test_matplotlib_waits_for_a_picture_and_needs_no_display():
    code = """
import sys, tempfile
from pathlib import Path
from sepdeploy.core.pareto import FrontPoint
from sepdeploy.render.pareto import front_picture
assert "matplotlib" not in sys.modules
with tempfile.TemporaryDirectory() as folder:
    front_picture([FrontPoint("a", 1.0, "ms", 1.0, 0.0)], Path(folder, "a.svg"))
assert "matplotlib" in sys.modules and not {"matplotlib.pyplot", "torch"} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
