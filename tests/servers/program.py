"""A server program on this machine: start, stop, kill -9, freeze, and never left behind.

Its methods block for as long as the server takes; inside an event loop call them by `asyncio.to_thread`.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from tests.servers.guard import guard
from tests.servers.missing import Unavailable


class Program:
    """One server process and its children. `start` returns when `ready` says so, or raises `Unavailable` with the log.

    The same command runs again after `stop` and `kill`, so a server that keeps its data in files goes on with them.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        directory: Path,
        log: Path,
        ready: Callable[[str], bool],
        user: int | None = None,
        group: int | None = None,
        environment: Mapping[str, str] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        self._command, self._directory, self._log, self._ready = list(command), directory, log, ready
        self._user, self._group, self._stop_signal = user, group, stop_signal
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, *, timeout_s: float = 120) -> None:
        """Start and wait until ready; a second call while it runs does nothing."""
        if self.running():
            return
        seen = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=self._user,
                group=self._group,
                extra_groups=None if self._user is None else [],
                env={**os.environ, **self._environment},
            )
        guard.watch(self._process.pid)
        give_up = time.monotonic() + timeout_s
        while not self._ready(self._said(seen)):
            ended = self._process.poll() is not None
            if ended or time.monotonic() > give_up:
                how = "ended while starting" if ended else "took too long to start"
                self.kill()
                raise Unavailable(f"{Path(self._command[0]).name} {how}: {self._said(seen)[-2000:].strip()}")
            time.sleep(0.03)

    def stop(self, *, timeout_s: float = 20) -> None:
        """Ask it to end and wait; what has not ended by then is killed."""
        if self._process is None:
            return
        self.resume()
        if self.running():
            self._process.send_signal(self._stop_signal)
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
        self._gone()

    def kill(self) -> None:
        """kill -9 to it and all its children, frozen first so that none can act on another's death."""
        if self._process is None:
            return
        tree = self._freeze()
        self._send(tree, signal.SIGKILL)
        self._process.wait()
        psutil.wait_procs(tree, timeout=10)
        self._gone()

    def restart(self) -> None:
        """Stop cleanly where it runs, then start on the same data and the same port."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze it: connections stay open and nothing answers."""
        self._freeze()

    def resume(self) -> None:
        self._send(self._tree(), signal.SIGCONT)

    def _freeze(self) -> list[psutil.Process]:
        tree = self._tree()
        self._send(tree[:1], signal.SIGSTOP)
        tree = self._tree()  # the parent is frozen: no child is born any more
        self._send(tree[1:], signal.SIGSTOP)
        return tree

    def _tree(self) -> list[psutil.Process]:
        # Not the process group: PostgreSQL's children each open a session of their own.
        if self._process is None or self._process.poll() is not None:
            return []
        try:
            top = psutil.Process(self._process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    @staticmethod
    def _send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
        for process in processes:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                pass  # it ended by itself

    def _gone(self) -> None:
        if self._process is not None:
            guard.forget(self._process.pid)
        self._process = None

    def _said(self, since: int) -> str:
        with self._log.open("rb") as log:
            log.seek(since)
            return log.read().decode(errors="replace")


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that were free a moment ago; another process may take one first, so callers try again."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def listens(port: int, host: str = "127.0.0.1", *, timeout_s: float = 1) -> bool:
    """Whether somebody accepts a connection there."""
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except OSError:
        return False
    return True
