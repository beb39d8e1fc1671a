import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regen-golden", action="store_true", help="write the golden files anew instead of comparing")


@pytest.fixture
def samples() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sample_reports", FOLDER / "sample_reports.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check_golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with the golden file of that name, or write it with --regen-golden."""

    def check(name: str, text: str) -> None:
        path = FOLDER / name
        # Without this folder among pytest's arguments the option is not declared in time; then nothing is written.
        if request.config.getoption("--regen-golden", default=False):
            path.write_text(text, encoding="utf-8", newline="\n")
        assert path.is_file(), f"no golden file {name}; run: pytest tests/golden --regen-golden"
        assert text == path.read_text(encoding="utf-8"), (
            f"{name} differs; if that is intended: pytest tests/golden --regen-golden"
        )

    return check
