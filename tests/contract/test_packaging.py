from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SOURCES = {
    "sepdeploy": "sepdeploy",
    "models": "sepdeploy/models",
    "calibration": "sepdeploy/calibration",
    "docker": "sepdeploy/docker",
}
DATA = {
    "sepdeploy/DESIGN.md",
    "sepdeploy/calibration/digits.toml",
    "sepdeploy/docker/arm64/a64.h",
    "sepdeploy/docker/arm64/armcount.c",
    "sepdeploy/docker/arm64/cpuinfo/cortex-a72",
    "sepdeploy/docker/arm64/link_cores.sh",
    "sepdeploy/docker/arm64/make_root.sh",
    "sepdeploy/models/digits.pt",
    "sepdeploy/py.typed",
    "sepdeploy/render/report.html.j2",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources, so that the build leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / "src" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "src" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(folder / "src")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs: a pure Python wheel is only unpacked."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_wheel_holds_every_module_and_its_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in SOURCES.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert "sepdeploy/models/resnet_cifar.py" in modules
    assert modules - names == set()
    assert DATA - names == set()


def test_wheel_claims_no_name_but_its_own(wheel: Path) -> None:
    top = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"sepdeploy"}


def test_installed_package_brings_networks_and_calibration_sets(installed: Path, tmp_path: Path) -> None:
    program = """
from importlib.resources import files
from pathlib import Path
from sepdeploy.data.toml_files import find_file
from sepdeploy.models.resnet_cifar import __file__ as networks, resnet20
assert resnet20().linear.out_features == 10
print(networks, files("sepdeploy.models") / "digits.pt", find_file(Path("calibration/digits.toml")), sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    paths = [Path(line) for line in done.stdout.splitlines()]
    assert [path.name for path in paths] == ["resnet_cifar.py", "digits.pt", "digits.toml"]
    assert all(path.is_file() and path.is_relative_to(installed) for path in paths)


def test_constraints_pin_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [Requirement(line) for line in (*project["dependencies"], *extras["tflite"], *extras["test"])]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines[0].startswith("torch==")
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines)
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    assert not {canonicalize_name(requirement.name) for requirement in asked} - versions.keys()
    for requirement in asked:
        version = versions[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{requirement} against {version}"
