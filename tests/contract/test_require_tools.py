import sys
from pathlib import Path

import pytest


@pytest.fixture
def configure(pytestconfig):
    """The hook in tests/conftest.py, as it is called at the start of a run with --require-tools or without."""
    conftest = pytestconfig.pluginmanager.get_plugin(str(Path(__file__).parents[1] / "conftest.py"))

    class Config:
        def __init__(self, *, is_strict):
            self.is_strict = is_strict

        def getoption(self, name):
            assert name == "--require-tools"
            return self.is_strict

    return lambda is_strict: conftest.pytest_configure(Config(is_strict=is_strict))


def test_missing_tools_end_the_run_only_if_they_are_required(configure, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    with pytest.raises(pytest.UsageError, match="--require-tools: litert_torch, sklearn cannot be found"):
        configure(True)
    configure(False)


def test_missing_programs_end_the_run_too(configure, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        pytest.UsageError, match=r"--require-tools: qemu-aarch64, llvm-mca-19, .*; \.ci/run installs them"
    ):
        configure(True)
    configure(False)
