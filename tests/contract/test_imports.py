"""Imports go down only, and the data of `core` stays light."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(run.stdout.split())


def test_import_contracts_hold(tmp_path):
    tool = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run(
        [tool, "--no-cache"], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "NO_COLOR": "1"}, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("module", ["plan", "chain", "conv", "artifact", "measurement", "report", "codec", "files"])
def test_core_loads_no_heavy_package(module):
    loaded = loaded_after(f"import sepdeploy.errors, sepdeploy.core.{module}")
    assert "sepdeploy" in loaded
    assert not loaded & {"torch", "numpy", "pydantic", "onnx", "PIL", "rich", "click", "jinja2"}


def test_schemes_are_listed_without_torch():
    assert not loaded_after(
        "from sepdeploy.schemes.scheme import SCHEMES, find_scheme; [s() for s in SCHEMES.values()]"
    ) & {
        "torch",
        "numpy",
    }


@pytest.mark.parametrize("said", [None, "0"])
def test_onnxruntime_collects_no_usage_data_unless_the_user_says_so(said, tmp_path):
    """Its telemetry keeps what is to be sent below the user's cache folder."""
    given = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    given |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    if said is not None:
        given["ORT_DISABLE_TELEMETRY"] = said
    code = "import os, sepdeploy, onnxruntime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=given)
    assert run.stdout.strip() == (said or "1")
    assert said is not None or list(tmp_path.rglob("*onnxruntime*")) == []
