"""Cleans up after a test run that was itself killed.

A small process of its own holds the reading end of a pipe. It is told what was started and what was made; when the pipe
closes, however the run ended, it kills the processes that are left and removes the directories. (The kernel's own
parent-death signal is no help: it follows the thread that forked, and servers are started from threads.)
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil


class Guard:
    """The run's end of the pipe. Started with the first thing to watch."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def watch(self, pid: int) -> None:
        """Kill this process, with its children, when the run has ended."""
        self._tell(f"+pid {pid}")

    def forget(self, pid: int) -> None:
        self._tell(f"-pid {pid}")

    def watch_directory(self, directory: Path) -> None:
        """Remove this directory when the run has ended."""
        self._tell(f"+dir {directory}")

    def forget_directory(self, directory: Path) -> None:
        self._tell(f"-dir {directory}")

    def _tell(self, line: str) -> None:
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self._owner = os.getpid()
                self._process = subprocess.Popen(
                    [sys.executable, "-I", __file__],
                    stdin=subprocess.PIPE,
                    text=True,
                    bufsize=1,
                    start_new_session=True,  # Ctrl-C goes to the run; the guard outlives it
                )
            assert self._process.stdin is not None
            self._process.stdin.write(line + "\n")

    def close(self) -> None:
        """Let the guard clean up what is left, now."""
        with self._lock:
            if self._process is not None and self._owner == os.getpid():
                assert self._process.stdin is not None
                self._process.stdin.close()
                self._process.wait(30)
            self._process = None


guard = Guard()


def main() -> None:
    # With the time of birth, so that a later process with a recycled number is left alone.
    processes: dict[str, psutil.Process] = {}
    directories: set[str] = set()
    for line in sys.stdin:
        what, _, name = line.rstrip("\n").partition(" ")
        match what:
            case "+pid":
                try:
                    processes[name] = psutil.Process(int(name))
                except psutil.NoSuchProcess:
                    pass  # ended before the guard could look
            case "-pid":
                processes.pop(name, None)
            case "+dir":
                directories.add(name)
            case _:
                directories.discard(name)
    for process in processes.values():
        try:
            if process.is_running():
                for one in [process, *process.children(recursive=True)]:
                    one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pass  # it ended by itself
    psutil.wait_procs(list(processes.values()), timeout=5)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
