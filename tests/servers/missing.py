"""The two ways in which a server can be out of reach: by one road, and by all of them."""

from collections.abc import Sequence


class Unavailable(Exception):
    """One way to a server is closed on this machine; the next one may be open."""


class MissingServer(Exception):
    """No way to a real server is open. The message lists what was tried and what to install."""

    def __init__(self, server: str, tried: Sequence[str], *, install: Sequence[str]) -> None:
        super().__init__(
            "\n".join(
                [
                    f"These tests need a real {server}, and none could be started. Tried:",
                    *(f"  - {line}" for line in tried),
                    "Any one of these helps:",
                    *(f"  - {line}" for line in install),
                ]
            )
        )
        self.server = server
