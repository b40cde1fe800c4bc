"""The connections that the processes of a run keep to one another, and how none is left waiting when one ends.

Process 0 has a connection to each of the others. The operating system closes those of a process that dies, and finds
out within half a minute (`_KEEPALIVE`) that a machine is gone; process 0 then tells all the others, which may by then
wait for ever in a collective operation, and every process ends with a message. When process 0 dies they see it too.
"""

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from gqe_jax.config import ConfigError

_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # seconds; a silent machine: 15 + 3 * 5
_LONGEST = 1 << 20  # bytes of a line; those of a configuration are thousands
_GRACE = 5.0  # seconds for a process to fail by itself of what another one has failed of, before it ends


class Line:
    """A connection that carries one JSON object in each line."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):  # Linux
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.connection = connection
        self._sending = threading.Lock()
        self._buffer = b""

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        with self._sending:
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self, timeout: float | None) -> dict[str, Any] | None:
        """Returns the next object; None: the other side is gone, or has said none in `timeout` seconds, or speaks
        otherwise."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while b"\n" not in self._buffer:
                if deadline is not None:
                    self.connection.settimeout(max(deadline - time.monotonic(), 0.001))
                more = self.connection.recv(1 << 16)
                self._buffer += more
                if not more or len(self._buffer) > _LONGEST:
                    return None
            line, _, self._buffer = self._buffer.partition(b"\n")
            message = json.loads(line)
        except (OSError, ValueError, RecursionError):
            return None
        finally:
            self.connection.settimeout(None)
        return message if isinstance(message, dict) else None

    def has_more(self) -> bool:
        return b"\n" in self._buffer

    def close(self) -> None:
        self.connection.close()


class Peers:
    """The lines to the other processes: process 0 has one to each, the others have one to process 0."""

    def __init__(self, process_id: int, host: str):
        self.process_id = process_id
        self.hosts = {process_id: host}
        self.lines: dict[int, Line] = {}
        self._failing = threading.Event()  # this process ends by itself, with an error of its own
        self._ended: set[int] = set()  # processes that said so, or are gone
        self._all_ended = threading.Event()

    def add(self, process: int, host: str, line: Line) -> None:
        self.hosts[process], self.lines[process] = host, line

    def send(self, message: Mapping[str, Any]) -> None:
        for line in self.lines.values():
            with contextlib.suppress(OSError):  # it is gone: `watch` says so
                line.send(message)

    def ask(self, timeout: float) -> dict[int, dict[str, Any]]:
        """Process 0: what each says next, within `timeout` seconds; nothing from those that do not."""
        return {process: line.read(timeout) or {} for process, line in self.lines.items()}

    def refuse(self, error: OSError | ConfigError) -> NoReturn:
        """On process 0, stops the start: raises `error` here and on all processes."""
        self.send({"refused": str(error), "input": isinstance(error, ConfigError), "host": self.hosts[0]})
        raise error

    def watch(self) -> None:
        """From now on, ends this process when another one ends."""
        threading.Thread(target=self._watch, name="gqe-peers", daemon=True).start()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for process, line in self.lines.items():
                selector.register(line.connection, selectors.EVENT_READ, process)
            while selector.get_map():
                for key, _ in selector.select():
                    line = self.lines[key.data]
                    while True:
                        message = line.read(None)
                        if message is None:
                            selector.unregister(key.fileobj)
                        self._heard(key.data, message)
                        if message is None or not line.has_more():
                            break
        self._all_ended.set()

    def _heard(self, process: int, message: dict[str, Any] | None) -> None:
        if message is None and process not in self._ended:
            self._ended.add(process)
            message = {"gone": process, "host": self.hosts[process]}
        if message is None or not _is_notice(message):
            return
        if "done" in message or "failed" in message:
            self._ended.add(message["process"])
        if "gone" in message or "failed" in message:
            if self.process_id == 0:
                self.send(message)
            self._end(message)

    def _end(self, message: Mapping[str, Any]) -> None:
        """Ends this process, unless it fails by itself within the grace: its own message is then the better one."""
        if "failed" in message:
            if self._failing.wait(_GRACE):
                return
            text = f"process {message['process']} on {message['host']} failed: {message['failed']}"
        else:
            if self._failing.is_set():
                return
            text = (
                f"process {message['gone']} on {message['host']} is gone (killed, out of memory, stuck, or its machine "
                f"lost)"
            )
        line = (
            f"gqe: {text}. Process {self.process_id} cannot go on without it and ends too; nothing saved is "
            f"lost: the same command, on all machines, goes on from the newest checkpoint, if there is one\n"
        )
        os.write(2, line.encode())
        if self.process_id == 0:
            time.sleep(1.0)  # JAX's coordinator lives here; the others are told before it goes
        os._exit(1)

    def finish(self) -> None:
        """Tells the other processes that this one has come to the end of the run."""
        self._tell({"done": True})

    def fail(self, error: BaseException) -> None:
        """Tells the others what this process dies of, unless it dies of another's death, which `watch` then reports."""
        if not isinstance(error, (ConfigError, OSError, FloatingPointError, KeyboardInterrupt)):
            time.sleep(_GRACE)  # a collective operation with a dead process fails before its death is known here
        self._failing.set()
        self._tell({"failed": str(error).partition("\n")[0] or type(error).__name__})

    def _tell(self, message: Mapping[str, Any]) -> None:
        self.send({"process": self.process_id, "host": self.hosts[self.process_id], **message})

    def wait_for_others(self) -> None:
        """Process 0, before it ends: the others have ended, or had twice the grace for it."""
        if self.process_id == 0:
            self._all_ended.wait(2 * _GRACE)


def _is_notice(message: Mapping[str, Any]) -> bool:
    """Says whether a line says that a process is done, has failed or is gone, and which."""
    process = message.get("gone", message.get("process"))
    said = message.get("done") is True or "gone" in message or isinstance(message.get("failed"), str)
    return said and type(process) is int and isinstance(message.get("host"), str)
