"""What was measured or refused once: a small database in the user's cache directory that processes may share."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from sepdeploy.core.files import sha256_of_bytes
from sepdeploy.core.measurement import Method
from sepdeploy.core.selection import FusedBlock, Price

__all__ = ["CachedPrices", "PriceCache", "price_cache_path"]

T = TypeVar("T")

_FOLDER_VARIABLE = "SEPDEPLOY_CACHE_DIR"
_FILE_NAME = "prices-1.sqlite3"  # the number is that of the table below

_TABLE = """CREATE TABLE IF NOT EXISTS prices (
    key TEXT PRIMARY KEY, target TEXT, precision TEXT, threads INTEGER, runtime TEXT, cpu TEXT, day TEXT, price TEXT
) WITHOUT ROWID"""

_REFUSED = "refused"
_IS_REFUSAL = f'{{"{_REFUSED}":%'
"""A row without a price holds the reason in its place: earlier versions of sepdeploy read past it."""

_LOCKED_SECONDS = 10.0
"""How long to wait for another process; each holds the file for the few milliseconds of one write."""


@dataclass(frozen=True, slots=True)
class CachedPrices:
    """How much is known about one target.

    Attributes:
        target: Its name.
        precision: 'float32' or 'int8'.
        threads: Of the runtime.
        runtime: Name and version.
        cpu: Processor that it was measured on.
        prices: How many there are.
        refusals: Blocks that cannot be built or run there.
        day: When the last one was measured or refused, '2026-11-21', in UTC.
    """

    target: str
    precision: str
    threads: int
    runtime: str
    cpu: str
    prices: int
    refusals: int
    day: str


def price_cache_path() -> Path:
    """Where prices are kept: in the folder SEPDEPLOY_CACHE_DIR, else in the user's cache directory."""
    folder = os.environ.get(_FOLDER_VARIABLE)
    if folder:
        return Path(folder) / _FILE_NAME
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("sepdeploy", appauthor=False)) / _FILE_NAME


class PriceCache:
    """Remembers prices, or why there is none, by target, block, and the dense block that it was measured beside.

    It never fails: a damaged file is moved aside, and where nothing can be written prices are remembered for as long as
    the process runs. `notes` then says so.

    Args:
        path: The database; None is `price_cache_path()`.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path if path is not None else price_cache_path()
        self._notes: dict[str, None] = {}  # in order, each once
        self._database = self._opened()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know: sentences."""
        return tuple(self._notes)

    def get(self, target: Mapping[str, object], dense: FusedBlock, block: FusedBlock) -> Price | None:
        """The price of `block` beside `dense`; None if it is not known.

        Args:
            target: Everything that prices on the target depend on, as `Target.key` gives it.
            dense: Block of the layer as it is.
            block: What the layer could become.
        """
        text = self._text(target, dense, block)
        return None if text is None else _parsed(text)

    def refusal(self, target: Mapping[str, object], dense: FusedBlock, block: FusedBlock) -> str | None:
        """Why `block` beside `dense` has no price, if another try would end the same; None if that is not known."""
        text = self._text(target, dense, block)
        return None if text is None else _parsed_refusal(text)

    def put(self, target: Mapping[str, object], dense: FusedBlock, prices: Mapping[FusedBlock, Price]) -> None:
        """Remember the prices of blocks measured beside `dense`; earlier ones are replaced."""
        self._insert(target, dense, {block: _written(price) for block, price in prices.items()})

    def put_refusals(self, target: Mapping[str, object], dense: FusedBlock, reasons: Mapping[FusedBlock, str]) -> None:
        """Remember why blocks have no price beside `dense`.

        Args:
            target: Everything that refusals depend on. They are kept apart from prices: let it be another key.
            dense: Block of the layer as it is.
            reasons: What the layer could not become -> why.
        """
        self._insert(target, dense, {block: json.dumps({_REFUSED: reason}) for block, reason in reasons.items()})

    def summary(self) -> tuple[CachedPrices, ...]:
        """How many prices and refusals there are, by target, precision, threads, runtime and processor."""
        columns = "target, precision, threads, runtime, cpu"
        counts = f"SUM(price NOT LIKE '{_IS_REFUSAL}'), SUM(price LIKE '{_IS_REFUSAL}'), MAX(day)"
        query = f"SELECT {columns}, {counts} FROM prices GROUP BY {columns} ORDER BY {columns}"
        return tuple(CachedPrices(*row) for row in self._tried(lambda: self._database.execute(query).fetchall()))

    def clear(self) -> None:
        """Forget all prices and refusals."""
        self._tried(self._emptied)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _text(self, target: Mapping[str, object], dense: FusedBlock, block: FusedBlock) -> str | None:
        key = _key(target, dense, block)
        rows = self._tried(lambda: self._database.execute("SELECT price FROM prices WHERE key = ?", (key,)).fetchall())
        return str(rows[0][0]) if rows else None

    def _insert(self, target: Mapping[str, object], dense: FusedBlock, texts: Mapping[FusedBlock, str]) -> None:
        common = [target[name] for name in ("target", "precision", "threads", "runtime", "cpu")]
        day = datetime.now(UTC).date().isoformat()
        rows = [(_key(target, dense, block), *common, day, text) for block, text in texts.items()]
        self._tried(lambda: self._inserted(rows))

    def _inserted(self, rows: Iterable[tuple[object, ...]]) -> None:
        with self._database:  # one short transaction
            self._database.executemany("INSERT OR REPLACE INTO prices VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def _emptied(self) -> None:
        with self._database:
            self._database.execute("DELETE FROM prices")

    def _tried(self, run: Callable[[], T], *, is_repaired: bool = False) -> T:
        """What `run` returns, the second time if the file has to be moved aside, or given up, first."""
        try:
            return run()
        except sqlite3.DatabaseError as error:
            # Operational errors: no permission, disk full, locked for too long. All others: the file is damaged.
            if is_repaired or isinstance(error, sqlite3.OperationalError):
                self._go_on_in_memory(error)
            else:
                self._database.close()
                self._database = self._opened()
        return self._tried(run, is_repaired=True)

    def _opened(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                return _connected(self.path)
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:
                self._move_aside()
                return _connected(self.path)
        except (OSError, sqlite3.Error) as error:
            self._note_unusable(error)
            return _connected(None)

    def _move_aside(self) -> None:
        aside = self.path.with_name(f"{self.path.name}.damaged")
        self.path.replace(aside)
        self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)  # it belongs to the damaged file
        self._notes[f"the price cache {self.path} is damaged; it is now {aside.name}, and prices are measured anew"] = (
            None
        )

    def _go_on_in_memory(self, error: sqlite3.Error) -> None:
        """Keep what can be read, and remember new prices until the process ends."""
        self._note_unusable(error)
        memory = _connected(None)
        try:
            known = self._database.execute("SELECT * FROM prices").fetchall()
        except sqlite3.Error:
            known = []
        self._database.close()
        self._database = memory
        self._inserted(known)

    def _note_unusable(self, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        self._notes[f"the price cache {self.path} cannot be used ({reason}), so new prices are not kept"] = None


def _connected(path: Path | None) -> sqlite3.Connection:
    """A database that is sound and has the table; None is one in memory."""
    database = sqlite3.connect(":memory:" if path is None else path, timeout=_LOCKED_SECONDS)
    try:
        (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        database.execute(_TABLE)
    except BaseException:
        database.close()
        raise
    return database


def _key(target: Mapping[str, object], dense: FusedBlock, block: FusedBlock) -> str:
    data = [target, _block_data(dense), _block_data(block)]
    return sha256_of_bytes(json.dumps(data, sort_keys=True, separators=(",", ":")).encode())


def _block_data(block: FusedBlock) -> dict[str, object]:
    data = asdict(block)
    mixed = data.pop("mixed")  # left out where there is none, so that prices from before there was any are found
    return data if mixed is None else {**data, "mixed": mixed.value}


# Not through `core.codec`: it makes a validator at each call, and thousands of prices are read at once.
def _written(price: Price) -> str:
    return json.dumps(asdict(price) | {"method": price.method.name})


def _parsed(text: str) -> Price | None:
    """The price in a row; None if it is not one of ours."""
    try:
        data = json.loads(text)
        return Price(**(data | {"method": Method[data["method"]]}))
    except (KeyError, TypeError, ValueError):
        return None


def _parsed_refusal(text: str) -> str | None:
    """The reason in a row; None if it is not one of ours."""
    try:
        reason = json.loads(text)[_REFUSED]
    except (KeyError, TypeError, ValueError):
        return None
    return reason if isinstance(reason, str) else None
