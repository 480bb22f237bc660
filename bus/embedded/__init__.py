"""The embedded bus: durable topics and consumer groups of one machine in one SQLite file."""

from bus.embedded.transport import EMBEDDED_SETTINGS, EmbeddedTransport

__all__ = ["EMBEDDED_SETTINGS", "EmbeddedTransport"]
