from __future__ import annotations

import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sepdeploy.core.chain import Chain, ChainSum
from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.measurement import Method
from sepdeploy.core.price_cache import PriceCache, price_cache_path
from sepdeploy.core.selection import FusedBlock, Price

SPEC = ConvSpec(8, 8, (3, 3), padding=(1, 1, 1, 1))
DENSE = FusedBlock(ChainSum((Chain((SPEC.as_factor(),)),)), SPEC, (12, 12))
BLOCK = replace(DENSE, lowering=("fold_norm",))
TARGET = {"target": "ort", "precision": "int8", "threads": 1, "runtime": "onnxruntime 1.2", "cpu": "a cpu", "cores": 2}
PRICE = Price(1.0, 3.0, -2.0, -2.5, -1.5, "ms", 48, Method.WALL_CLOCK)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "prices.sqlite3"


def filled(path: Path) -> PriceCache:
    cache = PriceCache(path)
    cache.put(TARGET, DENSE, {BLOCK: PRICE})
    return cache


def test_prices_outlive_the_process(path: Path) -> None:
    filled(path).close()
    cache = PriceCache(path)
    assert cache.get(TARGET, DENSE, BLOCK) == PRICE
    assert cache.notes == ()


@pytest.mark.parametrize("name", ["threads", "runtime", "cores", "precision"])
def test_another_target_has_other_prices(path: Path, name: str) -> None:
    assert filled(path).get({**TARGET, name: "other"}, DENSE, BLOCK) is None


@pytest.mark.parametrize(
    "changes",
    [{"lowering": ()}, {"input_size": (12, 13)}, {"positions": 2}, {"activation": "relu"}, {"is_linear": True}],
)
def test_another_block_has_another_price(path: Path, changes: dict[str, object]) -> None:
    assert filled(path).get(TARGET, DENSE, replace(BLOCK, **changes)) is None
    assert filled(path).get(TARGET, replace(DENSE, activation="relu6"), BLOCK) is None


def test_the_order_of_the_targets_key_does_not_matter(path: Path) -> None:
    assert filled(path).get(dict(reversed(TARGET.items())), DENSE, BLOCK) == PRICE


def test_the_later_price_counts(path: Path) -> None:
    cache = filled(path)
    cache.put(TARGET, DENSE, {BLOCK: replace(PRICE, value=2.0)})
    assert cache.get(TARGET, DENSE, BLOCK) == replace(PRICE, value=2.0)


def test_summary_and_clear(path: Path) -> None:
    cache = filled(path)
    cache.put(TARGET, DENSE, {DENSE: PRICE})
    cache.put({**TARGET, "threads": 2}, DENSE, {BLOCK: PRICE})
    rows = cache.summary()
    assert [(row.target, row.precision, row.threads, row.runtime, row.prices) for row in rows] == [
        ("ort", "int8", 1, "onnxruntime 1.2", 2),
        ("ort", "int8", 2, "onnxruntime 1.2", 1),
    ]
    assert [row.refusals for row in rows] == [0, 0]
    assert len(rows[0].day.split("-")) == 3
    cache.clear()
    assert cache.summary() == ()
    assert cache.get(TARGET, DENSE, BLOCK) is None
    assert PriceCache(path).summary() == ()


def test_refusals_outlive_the_process_and_are_counted_apart(path: Path) -> None:
    reason = 'no operator "X" \u2013 for this'
    cache = filled(path)
    cache.put_refusals({**TARGET, "sepdeploy": "1"}, DENSE, {BLOCK: reason, DENSE: ""})
    cache.close()
    cache = PriceCache(path)
    assert cache.refusal({**TARGET, "sepdeploy": "1"}, DENSE, BLOCK) == reason
    assert cache.refusal({**TARGET, "sepdeploy": "2"}, DENSE, BLOCK) is None
    assert cache.refusal(TARGET, DENSE, BLOCK) is None, "a price is no refusal"
    assert cache.get({**TARGET, "sepdeploy": "1"}, DENSE, BLOCK) is None, "nor a refusal a price"
    (row,) = cache.summary()
    assert (row.prices, row.refusals) == (1, 2)
    cache.clear()
    assert cache.refusal({**TARGET, "sepdeploy": "1"}, DENSE, BLOCK) is None


def test_a_file_from_before_there_were_refusals(path: Path) -> None:
    """As it was written then; that version in turn takes a refusal for no price (`_parsed`)."""
    path.parent.mkdir()
    with sqlite3.connect(path) as database:
        database.execute(
            "CREATE TABLE prices (key TEXT PRIMARY KEY, target TEXT, precision TEXT, threads INTEGER, runtime TEXT, "
            "cpu TEXT, day TEXT, price TEXT) WITHOUT ROWID"
        )
        row = ("a key", "ort", "int8", 1, "onnxruntime 1.2", "a cpu", "2026-01-01", '{"value": 1.0}')
        database.execute("INSERT INTO prices VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
    database.close()
    cache = PriceCache(path)
    cache.put_refusals(TARGET, DENSE, {BLOCK: "no such operator"})
    assert cache.refusal(TARGET, DENSE, BLOCK) == "no such operator"
    assert cache.notes == ()
    (found,) = cache.summary()
    assert (found.prices, found.refusals) == (1, 1)


@pytest.mark.parametrize("content", [b"no database at all" * 100, None])
def test_a_damaged_file_is_moved_aside(path: Path, content: bytes | None) -> None:
    filled(path).close()
    if content is None:  # a database with a page overwritten
        data = bytearray(path.read_bytes())
        data[4096:8192] = b"\xff" * 4096
        content = bytes(data)
    path.write_bytes(content)
    cache = PriceCache(path)
    assert len(cache.notes) == 1
    assert "is damaged" in cache.notes[0]
    assert path.with_name("prices.sqlite3.damaged").read_bytes() == content
    assert cache.get(TARGET, DENSE, BLOCK) is None
    cache.put(TARGET, DENSE, {BLOCK: PRICE})
    cache.close()
    assert PriceCache(path).get(TARGET, DENSE, BLOCK) == PRICE


def test_a_file_damaged_while_it_is_open(path: Path) -> None:
    cache = filled(path)
    path.write_bytes(b"no database at all" * 1000)
    assert cache.get(TARGET, DENSE, BLOCK) is None
    cache.put(TARGET, DENSE, {BLOCK: PRICE})
    assert cache.get(TARGET, DENSE, BLOCK) == PRICE
    assert "is damaged" in cache.notes[0]


def test_a_row_that_is_no_price_is_measured_anew(path: Path) -> None:
    cache = filled(path)
    for text in ("", "[]", '{"method": "GUESSED"}', '{"method": "WALL_CLOCK"}'):
        with sqlite3.connect(path) as database:
            database.execute("UPDATE prices SET price = ?", (text,))
        database.close()
        assert cache.get(TARGET, DENSE, BLOCK) is None


def test_without_a_place_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = PriceCache(tmp_path / "file" / "prices.sqlite3")
    assert len(cache.notes) == 1
    assert "cannot be used" in cache.notes[0]
    cache.put(TARGET, DENSE, {BLOCK: PRICE})
    assert cache.get(TARGET, DENSE, BLOCK) == PRICE


def test_a_file_that_can_only_be_read(path: Path) -> None:
    cache = filled(path)
    cache._database.execute("PRAGMA query_only = ON")  # what SQLite says of a read-only file, for root as well
    cache.put(TARGET, DENSE, {DENSE: PRICE})
    assert len(cache.notes) == 1
    assert "readonly" in cache.notes[0]
    assert cache.get(TARGET, DENSE, DENSE) == cache.get(TARGET, DENSE, BLOCK) == PRICE
    assert PriceCache(path).get(TARGET, DENSE, DENSE) is None


def test_two_processes_at_once(path: Path) -> None:
    program = """
import sys
from dataclasses import replace
from pathlib import Path
from tests_price_cache import BLOCK, DENSE, PRICE, TARGET, PriceCache
cache = PriceCache(Path(sys.argv[1]))
for number in range(40):
    cache.put({**TARGET, "runtime": sys.argv[2]}, DENSE, {replace(BLOCK, positions=number): PRICE})
assert cache.notes == (), cache.notes
"""
    code = f"import sys, types; m = types.ModuleType('tests_price_cache'); exec(open({__file__!r}).read(), m.__dict__)"
    code += f"; sys.modules[m.__name__] = m; exec({program!r})"
    runs = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in ("a", "b")]
    assert [run.wait(60) for run in runs] == [0, 0]
    assert [row.prices for row in PriceCache(path).summary()] == [40, 40]


def test_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEPDEPLOY_CACHE_DIR", str(tmp_path / "mine"))
    assert PriceCache().path.parent == tmp_path / "mine"
    monkeypatch.delenv("SEPDEPLOY_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert price_cache_path().parent.name == "sepdeploy"
