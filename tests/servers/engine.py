"""Servers in containers, where a Docker engine answers."""

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from tests.servers.missing import Unavailable
from tests.servers.program import listens


def engine_answers(*, timeout_s: float = 5) -> bool:
    """Whether a Docker engine is there and works. A client without an engine does not count."""
    if not _somebody_listens(timeout_s):
        return False
    import docker
    from docker.errors import DockerException

    client = None
    try:
        client = docker.from_env(timeout=timeout_s)
        return bool(client.ping())
    except (DockerException, OSError):
        return False
    finally:
        if client is not None:
            client.close()


def _somebody_listens(timeout_s: float) -> bool:
    # Asked first and by hand: the library leaks a socket for each engine that it does not find.
    host = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    where = urlsplit(host)
    if where.scheme == "unix":
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(timeout_s)
            return client.connect_ex(where.path) == 0
    if where.scheme == "tcp" and where.hostname is not None:
        return listens(where.port or 2375, where.hostname, timeout_s=timeout_s)
    return True  # by ssh, say: the library will tell


class Container:
    """One container with the verbs of a `Program`. Its port on the host stays the same."""

    def __init__(
        self,
        image: str,
        *,
        ports: Mapping[int, int],
        environment: Mapping[str, str],
        command: Sequence[str] = (),
        ready: Callable[[], bool],
    ) -> None:
        if not engine_answers():
            raise Unavailable("Docker: no engine answers" + _whose())
        from testcontainers.core.container import DockerContainer

        self._container: Any = DockerContainer(image)
        for inside, outside in ports.items():
            self._container.with_bind_ports(inside, outside)
        for name, value in environment.items():
            self._container.with_env(name, value)
        if command:
            self._container.with_command(list(command))
        self._ready = ready
        self._made = False

    def start(self) -> None:
        """Start, or start again on the same data, and wait until it serves."""
        try:
            if self._made:
                self._container.get_wrapped_container().start()
            else:
                self._container.start()
                self._made = True
            give_up = time.monotonic() + 120
            # Not the log: it still holds the first start. Not the port: Docker's proxy accepts before the server does.
            while not self._ready():
                if time.monotonic() > give_up:
                    raise TimeoutError("the server in the container did not answer within 60 s")
                time.sleep(0.1)
        except Exception as error:  # testcontainers passes on whatever the engine or the image registry raised
            self.remove()
            raise Unavailable(f"Docker: the engine answers, but {error}") from error

    def stop(self) -> None:
        self._container.get_wrapped_container().stop(timeout=20)

    def kill(self) -> None:
        self._container.get_wrapped_container().kill()

    def restart(self) -> None:
        self.stop()
        self.start()

    def pause(self) -> None:
        self._container.get_wrapped_container().pause()

    def resume(self) -> None:
        self._container.get_wrapped_container().unpause()

    def remove(self) -> None:
        """Remove the container with its data."""
        with suppress(Exception):  # a container that never came to be cannot be removed
            self._container.stop()


def _whose() -> str:
    host = os.environ.get("DOCKER_HOST")
    return f" at {host}" if host else ""
