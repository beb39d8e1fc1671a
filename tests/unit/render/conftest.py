import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SAMPLES = Path(__file__).parents[2] / "golden" / "sample_reports.py"


@pytest.fixture(scope="session")
def samples() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sample_reports", SAMPLES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
