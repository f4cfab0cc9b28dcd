"""The store: what was asked of which checkpoint how, and what came of it, in one SQLite file that is only added to.

Each result is a transaction of its own, so whatever ends a run takes nothing with it but what it was at.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from awq_jax.errors import InputError
from awq_jax.records.claims import Claims, claims
from awq_jax.records.prompt import Prompt

APPLICATION = 0x41575121
"""By which SQLite files of this kind know themselves."""
VERSIONS = (
    """
    CREATE TABLE prompts (version TEXT PRIMARY KEY, content TEXT NOT NULL);
    CREATE TABLE checkpoints (
        digest TEXT PRIMARY KEY, name TEXT NOT NULL, nbytes INTEGER NOT NULL, sites TEXT NOT NULL, seen REAL NOT NULL
    );
    CREATE TABLE results (
        prompt TEXT, checkpoint TEXT, base TEXT, settings TEXT, made REAL NOT NULL, found TEXT NOT NULL,
        PRIMARY KEY (prompt, checkpoint, base, settings)
    );
    """,
)
"""What makes each version of the tables of the one before; a file of an older version is brought to the newest."""
PATIENCE = 60.0
"""Seconds to wait for another process's transaction."""


class Key(NamedTuple):
    """What a result is kept by: a prompt's version, a checkpoint's digest, and, of how far the one is from a base, the
    base's digest ("" of an answer); the settings as JSON."""

    prompt: str
    checkpoint: str
    base: str
    settings: str


class Known(NamedTuple):
    """A checkpoint: its digest, the name that it was last given, its bytes, and its sites, each `[name, bits, error,
    error of rounding to nearest]`."""

    digest: str
    name: str
    nbytes: int
    sites: list[Any]
    seen: float


@contextmanager
def store(file: Path) -> Iterator[Store]:
    """The store in a file, which is made if it is not there.

    Raises:
      InputError: the file is something else, or of a newer version.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(file, timeout=PATIENCE, isolation_level=None)) as opened:
            prepare(opened, file)
            with claims(file.with_name(file.name + ".claims")) as mine:
                yield Store(opened, mine)
    except sqlite3.DatabaseError as e:
        raise InputError(f"{file} cannot be used as a store ({e}): repair it, or give another file.") from e


def prepare(opened: sqlite3.Connection, file: Path) -> None:
    """Brings the tables to the newest version, whoever comes first."""
    one = lambda sql: opened.execute(sql).fetchone()[0]
    opened.execute("PRAGMA synchronous=FULL")
    opened.execute("BEGIN IMMEDIATE")
    try:
        version = one("PRAGMA user_version")
        foreign = one("PRAGMA application_id") != APPLICATION
        if foreign and one("SELECT count(*) FROM sqlite_master"):
            raise InputError(f"{file} is a database of something else: give another file. Nothing was changed.")
        if version > len(VERSIONS):
            raise InputError(
                f"{file} is a store of version {version}, this awq_jax knows up to {len(VERSIONS)}: update it, or give "
                "another file. Nothing was changed."
            )
        for script in VERSIONS[version:]:
            for statement in filter(str.strip, script.split(";")):
                opened.execute(statement)
        opened.execute(f"PRAGMA application_id={APPLICATION}")
        opened.execute(f"PRAGMA user_version={len(VERSIONS)}")
        opened.execute("COMMIT")
    except BaseException:
        opened.execute("ROLLBACK")
        raise


class Store:
    """An open store."""

    def __init__(self, opened: sqlite3.Connection, mine: Claims) -> None:
        self.opened, self.claim = opened, mine.claim

    def get(self, key: Key) -> dict[str, Any] | None:
        """What was found, with when as `made`."""
        sql = "SELECT made, found FROM results WHERE prompt=? AND checkpoint=? AND base=? AND settings=?"
        row = self.opened.execute(sql, key).fetchone()
        return None if row is None else {"made": row[0], **json.loads(row[1])}

    def put(self, key: Key, found: Mapping[str, Any]) -> None:
        """Keeps what was found; what is there stays."""
        sql = "INSERT OR IGNORE INTO results VALUES (?, ?, ?, ?, ?, ?)"
        self.opened.execute(sql, (*key, time.time(), json.dumps(found)))

    def fill(
        self,
        keys: Sequence[Key],
        make: Callable[[Key], Mapping[str, Any]],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Has a result for each key, of those that are `make`s; other processes may do the same at the same time.

        What another is at comes last, and is waited for.
        """
        pending = [key for key in keys if self.get(key) is None]
        wait = False
        while pending:
            later = []
            for k, key in enumerate(pending):
                progress(len(keys) - len(pending) + k - len(later), len(keys))
                with self.claim(json.dumps(key), wait=wait and not k) as mine:
                    if not mine:
                        later.append(key)
                    elif self.get(key) is None:
                        self.put(key, make(key))
            wait, pending = True, later

    def meet(self, known: Known) -> None:
        """Keeps a checkpoint under its newest name; of sites, those that are there where none are given."""
        sql = """
            INSERT INTO checkpoints VALUES (?, ?, ?, ?, ?) ON CONFLICT (digest) DO UPDATE SET
            name = excluded.name, nbytes = excluded.nbytes, seen = excluded.seen,
            sites = CASE excluded.sites WHEN '[]' THEN sites ELSE excluded.sites END
        """
        self.opened.execute(sql, (*known[:3], json.dumps(known.sites), known.seen))

    def note(self, prompts: Sequence[Prompt]) -> None:
        """Keeps the words of prompts."""
        rows = [(prompt.version, prompt.content) for prompt in prompts]
        self.opened.execute("BEGIN IMMEDIATE")
        self.opened.executemany("INSERT OR IGNORE INTO prompts VALUES (?, ?)", rows)
        self.opened.execute("COMMIT")

    def checkpoints(self) -> list[Known]:
        """All that were met, the newest first."""
        rows = self.opened.execute("SELECT * FROM checkpoints ORDER BY seen DESC").fetchall()
        return [Known(digest, name, nbytes, json.loads(sites), seen) for digest, name, nbytes, sites, seen in rows]

    def named(self, name: str) -> Known | None:
        """The newest checkpoint of that name, or the one whose digest begins so."""
        known = self.checkpoints()
        by_digest = [one for one in known if len(name) >= 6 and one.digest.startswith(name)]
        return next((one for one in known if one.name == name), by_digest[0] if len(by_digest) == 1 else None)
