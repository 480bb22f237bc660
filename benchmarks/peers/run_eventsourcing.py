"""`eventsourcing`: its Application, Aggregate and PostgreSQL module, with psycopg's pool. Callers are threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from uuid import UUID

from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event

from benchmarks.peers.serving import PAGE, POOL, TEXT, serve_threads


class Notes(Aggregate):
    @event("Noted")
    def __init__(self, note_id: str, n: int, text: str) -> None:
        self.count = 1
        self.total = n

    @event("NotedAgain")
    def note(self, note_id: str, n: int, text: str) -> None:
        self.count += 1
        self.total += n

    @staticmethod
    def create_id(note_id: str) -> UUID:
        return UUID(note_id)


class Eventsourcing:
    def __init__(self, application: Application[UUID]) -> None:
        self._application = application

    def append(self, key: UUID) -> None:
        self.append_many(key, 0, 1)

    def append_many(self, key: UUID, after: int, count: int) -> None:
        # Filling goes on with an aggregate that exists. Loading it each time would be quadratic, and is not measured.
        if after:
            notes, new = self._kept, count
        else:
            notes, new = Notes(str(key), 0, TEXT), count - 1
        for _ in range(new):
            notes.note(str(key), 0, TEXT)
        self._application.save(notes)
        self._kept = notes

    def load(self, key: UUID) -> int:
        notes: Notes = self._application.repository.get(key)
        return notes.count + notes.total

    def read_all(self) -> int:
        recorder, mapper = self._application.recorder, self._application.mapper
        after, found = 0, 0
        while page := recorder.select_notifications(after + 1, PAGE):
            for notification in page:
                found += 1 + mapper.to_domain_event(notification).n
            after = page[-1].id
        return found


@contextmanager
def opening(dsn: str) -> Iterator[Eventsourcing]:
    parts = urlsplit(dsn)
    application = Application[UUID](
        env={
            "PERSISTENCE_MODULE": "eventsourcing.postgres",
            "POSTGRES_DBNAME": parts.path.lstrip("/"),
            "POSTGRES_HOST": parts.hostname or "",
            "POSTGRES_PORT": str(parts.port or 5432),
            "POSTGRES_USER": parts.username or "postgres",
            "POSTGRES_PASSWORD": parts.password or "none",
            "POSTGRES_POOL_SIZE": str(POOL),
            "POSTGRES_MAX_OVERFLOW": "0",
            "POSTGRES_MAX_WAITING": "1000",
        }
    )
    try:
        yield Eventsourcing(application)
    finally:
        application.close()


if __name__ == "__main__":
    serve_threads(opening)
