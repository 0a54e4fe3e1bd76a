"""Removes a coordinator's socket files when it was killed and can't do it itself.

A process of its own that waits for the coordinator's end and does nothing else. A socket that
somebody listens on, such as the next coordinator, is left alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

from aqua_jax.coordinator.sockets import door_of, remove_stale
from aqua_jax.errors import ConfigError


@contextlib.contextmanager
def janitor(path: str) -> Iterator[None]:
    """Within, the sockets at `path` are removed should this process be killed."""
    if path.startswith("@"):  # no file, nothing to remove
        yield
        return
    read, write = os.pipe2(os.O_CLOEXEC)
    child = subprocess.Popen(
        [sys.executable, "-m", "aqua_jax.coordinator.janitor", os.path.abspath(path)],
        stdin=read, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,  # what ends the coordinator's group doesn't end it
    )
    os.close(read)
    try:
        yield
    finally:
        os.close(write)  # the end of its input is what it waits for
        child.wait()


def main(path: str) -> None:
    """Waits for the end of standard input, then removes what nobody listens on."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 1):
        pass
    with contextlib.suppress(ConfigError, OSError):
        remove_stale(door_of(path), socket.SOCK_SEQPACKET)
    with contextlib.suppress(ConfigError, OSError):
        remove_stale(path)


if __name__ == "__main__":
    main(sys.argv[1])
