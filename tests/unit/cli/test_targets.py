from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sepdeploy.bench.environment import cpu_name
from sepdeploy.cli import main
from sepdeploy.core.chain import Chain, ChainSum
from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.measurement import Method
from sepdeploy.core.price_cache import PriceCache
from sepdeploy.core.selection import FusedBlock, Price
from sepdeploy.planning import local_target
from sepdeploy.planning.target import TARGETS_BY_NAME

SPEC = ConvSpec(8, 8, (3, 3))
BLOCK = FusedBlock(ChainSum((Chain((SPEC.as_factor(),)),)), SPEC, (12, 12))
PRICE = Price(1.0, 3.0, -2.0, -2.5, -1.5, "ms", 48, Method.WALL_CLOCK)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PriceCache:
    monkeypatch.setenv("SEPDEPLOY_CACHE_DIR", str(tmp_path))
    cache = PriceCache()
    key = {"target": "litert", "precision": "int8", "threads": 2, "runtime": "ai-edge-litert 2.3.0", "cpu": cpu_name()}
    cache.put(key, BLOCK, {BLOCK: PRICE})
    cache.put_refusals({**key, "sepdeploy": "1"}, BLOCK, {BLOCK: "no such operator"})
    cache.put({**key, "cpu": "the cpu of another machine"}, BLOCK, {BLOCK: PRICE})
    return cache


def test_targets_as_json(capsys: pytest.CaptureFixture[str], cache: PriceCache) -> None:
    assert main.run(["targets", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    by_name = {target["name"]: target for target in data["targets"]}
    assert list(by_name) == list(TARGETS_BY_NAME)
    (row,) = by_name["litert"]["cached"]
    assert (row["precision"], row["threads"], row["runtime"], row["prices"]) == ("int8", 2, "ai-edge-litert 2.3.0", 1)
    assert row["refusals"] == 1
    assert by_name["ort"]["cached"] == []
    assert (by_name["ort"]["missing"], by_name["ort"]["install"], by_name["ort"]["unit"]) == ([], None, "ms")
    assert data["cache"] == {"path": str(cache.path), "notes": []}


def test_targets_as_tables(capsys: pytest.CaptureFixture[str], cache: PriceCache) -> None:
    assert main.run(["targets"]) == 0
    out = capsys.readouterr().out
    for part in ("ort", "ONNX Runtime on this CPU", "yes", "ai-edge-litert 2.3.0", "refused", str(cache.path)):
        assert part in out
    cache.clear()
    assert main.run(["targets"]) == 0
    assert "Prices known" not in capsys.readouterr().out


def test_prices_can_be_forgotten(capsys: pytest.CaptureFixture[str], cache: PriceCache) -> None:
    assert main.run(["targets", "--forget", "--json"]) == 0
    assert all(not target["cached"] for target in json.loads(capsys.readouterr().out)["targets"])
    assert cache.summary() == ()


def test_what_is_missing_comes_with_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = local_target._kind("litert", "LiteRT", local_target.LITERT.format, ("no_such_module",), "pip install x")
    monkeypatch.setattr(local_target, "LITERT", kind)
    assert main.run(["targets"]) == 0
    assert "litert: no_such_module not installed: pip install x" in capsys.readouterr().out


def test_a_damaged_cache_is_said(capsys: pytest.CaptureFixture[str], cache: PriceCache) -> None:
    cache.path.write_bytes(b"no database at all" * 100)
    assert main.run(["targets"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "is damaged" in out


def test_listing_loads_no_heavy_package() -> None:
    code = (
        "import sys; from sepdeploy.cli.main import run; run(['targets', '--json']); "
        "assert not {'torch', 'onnxruntime', 'litert_torch'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
