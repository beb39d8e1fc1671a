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


def test_so_do_missing_programs(configure, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name, path: None if name == "sshd" else name)
    with pytest.raises(pytest.UsageError, match="--require-tools: sshd cannot be found; run apt-get install openssh-"):
        configure(True)
    configure(False)
