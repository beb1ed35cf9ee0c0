"""Which of several server processes moves the runs on: the one that holds a lock which ends with its process.

Comes in: a database. Goes out: whether this process is the one. Everybody answers devices; merging a round twice would
change nothing, for the second commit is refused, but it would cost minutes of CPU.
"""

from __future__ import annotations

import fcntl
import logging
from pathlib import Path
from typing import IO, Protocol

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

logger = logging.getLogger(__name__)

LOCK_KEY = 0x5350494E45  # any number that no other program uses on this database
TAKEN = "this process moves the runs on"
LOST_AFTER_SECONDS = 15  # how soon PostgreSQL gives the lock of a machine away that lost its power


class Wheel(Protocol):
    """What one process of a fleet's servers holds at a time."""

    def held(self) -> bool:
        """Returns whether it is this process; takes it where nobody has it."""
        ...

    def let_go(self) -> None:
        """Leaves it to another."""
        ...


class FileWheel:
    """A locked file beside an SQLite database.

    Args:
        path: The file; made when missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def held(self) -> bool:
        """See `Wheel`."""
        if self._file is not None:
            return True
        file = self._path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._file = file
        logger.info(TAKEN)
        return True

    def let_go(self) -> None:
        """See `Wheel`."""
        if self._file is not None:
            self._file.close()
            self._file = None


class SessionWheel:
    """PostgreSQL's advisory lock, held by a connection of its own.

    Args:
        engine: The database.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._connection: Connection | None = None

    def held(self) -> bool:
        """See `Wheel`; a connection that broke has lost it."""
        if self._connection is not None:
            try:
                self._connection.execute(text("SELECT 1"))
            except SQLAlchemyError:
                logger.warning("connection that held the runs is lost")
                self.let_go()
                raise
            return True
        connection = self._engine.connect()
        try:
            for name, seconds in (
                ("idle", LOST_AFTER_SECONDS // 3),
                ("interval", LOST_AFTER_SECONDS // 3),
                ("count", 2),
            ):
                connection.execute(text(f"SET tcp_keepalives_{name} = {seconds}"))
            taken = connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": LOCK_KEY}).scalar_one()
        except SQLAlchemyError:
            connection.invalidate()
            connection.close()
            raise
        if not taken:
            connection.close()
            return False
        self._connection = connection
        logger.info(TAKEN)
        return True

    def let_go(self) -> None:
        """See `Wheel`."""
        if self._connection is not None:
            self._connection.invalidate()  # closed for good, not given back to the pool with the lock on it
            self._connection.close()
            self._connection = None
