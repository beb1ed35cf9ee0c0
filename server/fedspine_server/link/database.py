"""The database: SQLite in one file by default, PostgreSQL by one setting; the code above sees no difference.

Comes in: a URL. Goes out: sessions that read, and sessions that write everything they do or nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Executable, Row, create_engine, event, insert, select, text, update
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.orm import Session

from fedspine_edge.errors import LinkError
from fedspine_server.link.driving import LOCK_KEY, FileWheel, SessionWheel, Wheel
from fedspine_server.link.tables import ONLY_FEWER_TABLES, SCHEMA_VERSION, SchemaRow, Table

BUSY_SECONDS = 30.0
POOL_SIZE = 20


class Database:
    """Where tables are kept.

    Args:
        url: `sqlite:///FILE` or `postgresql+psycopg://USER:PASSWORD@HOST/NAME`.

    Raises:
        LinkError: It cannot be opened, or was made by another version.
    """

    def __init__(self, url: str) -> None:
        self._lite = url.startswith("sqlite")
        options: dict[str, Any] = {"pool_size": POOL_SIZE, "max_overflow": POOL_SIZE}
        if self._lite:
            options["connect_args"] = {"timeout": BUSY_SECONDS, "check_same_thread": False}
        else:
            options["pool_pre_ping"] = True
        try:
            self._engine = create_engine(url, **options)
        except (ArgumentError, ModuleNotFoundError) as error:
            raise LinkError(
                f"cannot use the database: {error}",
                hint="sqlite:///FILE, or postgresql+psycopg://USER:PASSWORD@HOST/NAME with fedspine-edge[postgres]",
            ) from error
        if self._lite:
            _prepare_sqlite(self._engine)
        self._writing = self._engine.execution_options(fedspine_writes=True)
        self._asking = self._engine.execution_options(fedspine_asks=True)
        # Threads that wait for SQLite's own lock poll it; here they sleep until it is theirs.
        self._turn: AbstractContextManager[object] = threading.Lock() if self._lite else nullcontext()
        self._open()

    def _open(self) -> None:
        try:
            with self._writing.begin() as connection:
                if not self._lite:
                    # Two processes that start at once would both make the tables.
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_KEY + 1})
                Table.metadata.create_all(connection)
                found = connection.execute(select(SchemaRow.version)).scalar()
                if found is None:
                    connection.execute(insert(SchemaRow).values(version=SCHEMA_VERSION))
                elif found in ONLY_FEWER_TABLES:
                    connection.execute(update(SchemaRow).values(version=SCHEMA_VERSION))
                    found = SCHEMA_VERSION
        except OperationalError as error:
            url = self._engine.url.render_as_string(hide_password=True)
            raise LinkError(f"cannot open the database {url}: {error.orig}", hint="check --database") from error
        if found not in (None, SCHEMA_VERSION):
            raise LinkError(
                f"database is of schema {found}, this server speaks {SCHEMA_VERSION}",
                hint="start the fedspine version that made it",
            )

    def wheel(self) -> Wheel:
        """Returns what one process over this database holds at a time."""
        if self._lite:
            return FileWheel(Path(f"{self._engine.url.database}.driver"))
        return SessionWheel(self._engine)

    def rows(self, statement: Executable, **values: Any) -> Sequence[Row[Any]]:
        """Returns what one statement finds, which sees one moment by itself: no transaction around it, no objects."""
        with self._asking.connect() as connection:
            return connection.execute(statement, values).all()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Yields a session that sees one moment and changes nothing."""
        with Session(self._engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Yields a session whose changes are all there after the block, or none when it raises."""
        with self._turn, Session(self._writing, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        """Closes every connection."""
        self._engine.dispose()


def _prepare_sqlite(engine: Engine) -> None:
    """One writer and any number of readers at a time, and no transaction that turns into a writer halfway."""

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver would begin transactions by itself, and too late
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")  # a committed result survives a power cut
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        if not options.get("fedspine_asks", False):
            connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("fedspine_writes", False) else "BEGIN")
