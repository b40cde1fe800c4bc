"""How the processes of a run meet before JAX starts, and what must be equal among them.

Process 0 listens at the coordinator's address and the others call it there: each says who it is and with which packages
and configuration it came. Only when all have called, agree, and see one directory, does JAX's own coordinator take over
the same port.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import re
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gqe_jax
from gqe_jax.config import ConfigError
from gqe_jax.processes.peers import Line, Peers
from gqe_jax.processes.place import Place, StartFailed

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

_MARK = re.compile(r"\.shared-[0-9a-f]{16}")  # the file that process 0 leaves in the run's directory
_RETRY = 0.2  # seconds between calls to a coordinator that does not answer yet
_SHARED_DIRECTORY = 20.0  # seconds that a new file may take to be seen by all (network file systems cache)
_NO_ANSWER = (
    "is process 0 running, is the address its own, and is the port open between the machines? (On Cloud TPU, JAX takes "
    "port 8482, which some networks block: set JAX_COORDINATOR_PORT=8476 on all)"
)


def meet(place: Place, config: Mapping[str, Any], directory: str | Path, timeout: float) -> Peers:
    """Returns when all processes have met and agree; from then on this one ends when another does.

    Raises:
      ConfigError: what must be equal is not, or `directory` is not shared; every process raises the same.
      StartFailed: not all, or not process 0, were there within `timeout` seconds.
    """
    hello = {
        "process": place.process_id,
        "of": place.num_processes,
        "host": socket.gethostname(),
        "versions": _versions(),
        "config": _flatten(config),
    }
    roll_call = _call if place.process_id == 0 else _answer
    peers = roll_call(place, hello, directory, time.monotonic() + timeout)
    peers.watch()
    return peers


def _versions() -> dict[str, str]:
    versions = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    source = Path(gqe_jax.__file__).parent
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(source.rglob("*.py"))))
    return versions | {"gqe_jax": f"{gqe_jax.__version__} (source {digest.hexdigest()[:12]})"}


def _flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, str]:
    leaves: dict[str, str] = {}
    for key, value in tree.items():
        leaves |= _flatten(value, f"{path}{key}.") if isinstance(value, Mapping) else {path + key: repr(value)}
    return leaves


def difference(what: str, values: Mapping[int, str]) -> str | None:
    """Says which process has which value, if not all have the same."""
    groups: dict[str, list[int]] = {}
    for process, value in sorted(values.items()):
        groups.setdefault(value, []).append(process)
    if len(groups) == 1:
        return None
    return f"{what} is " + ", but ".join(f"{value} on {_name(numbers)}" for value, numbers in groups.items())


def _name(processes: Sequence[int]) -> str:
    shown = ", ".join(map(str, processes[:8])) + (f" and {len(processes) - 8} more" if len(processes) > 8 else "")
    return f"process {shown}" if len(processes) == 1 else f"processes {shown}"


def _compare(hellos: Mapping[int, Mapping[str, Any]]) -> str | None:
    """Returns what is not equal among the processes and has to be, in words."""
    for group, remedy in (
        ("versions", "install the same packages on all machines"),
        ("config", "give all the same --config and the same overrides"),
    ):
        names = sorted({name for hello in hellos.values() for name in hello[group]})
        found = [
            difference(
                f"config.{name}" if group == "config" else name,
                {process: hello[group].get(name, "absent") for process, hello in hellos.items()},
            )
            for name in names
        ]
        if differences := [line for line in found if line]:
            more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
            return f"the processes differ: {'; '.join(differences[:5])}{more}: {remedy}"
    return None


def _is_hello(message: Mapping[str, Any]) -> bool:
    """Says whether a line is what `meet` sends: its types and ranges, and text that may be printed."""

    def is_text(value: Any) -> bool:
        return isinstance(value, str) and value.isprintable()

    def are_texts(value: Any) -> bool:
        return isinstance(value, dict) and all(is_text(key) and is_text(text) for key, text in value.items())

    number, count = message.get("process"), message.get("of")
    return (
        type(number) is int
        and type(count) is int
        and 0 < number < count
        and is_text(message.get("host"))
        and are_texts(message.get("versions"))
        and are_texts(message.get("config"))
    )


def _call(place: Place, hello: dict[str, Any], directory: str | Path, deadline: float) -> Peers:
    """Process 0: waits for all calls, compares, and lets all go on or none."""
    peers = Peers(0, hello["host"])
    hellos = {0: hello}
    with _listen(place) as listener:
        while len(hellos) < place.num_processes:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, caller = listener.accept()
            except TimeoutError:
                missing = sorted(set(range(place.num_processes)) - hellos.keys())
                peers.refuse(
                    StartFailed(
                        f"{_name(missing)} of {place.num_processes} did not call {place.coordinator} (process 0, on "
                        f"{hello['host']}) within the start timeout: see what they print, and start all with the same "
                        f"command and --coordinator, or raise --start-timeout"
                    )
                )
            line = Line(connection)
            called = line.read(5.0)
            if called is None or not _is_hello(called):
                print(
                    f"gqe: dropped a call from {caller[0]} at {place.coordinator}: it is not from a process of a run",
                    file=sys.stderr,
                    flush=True,
                )
                line.close()
                continue
            number, host = called["process"], called["host"]
            problem = None
            if called["of"] != place.num_processes:
                problem = (
                    f"process {number} on {host} has --num-processes={called['of']}, process 0 on {hello['host']} has "
                    f"{place.num_processes}: start all with the same number"
                )
            elif number in hellos:
                problem = (
                    f"two processes have --process-id={number}, on {hellos[number]['host']} and {host}: number them "
                    f"from 0 to {place.num_processes - 1}"
                )
            if problem:
                peers.add(-1, host, line)  # to be told too
                peers.refuse(ConfigError(problem))
            peers.add(number, host, line)
            hellos[number] = called
    if problem := _compare(hellos):
        peers.refuse(ConfigError(problem))
    _check_shared(peers, directory)
    peers.send({"go": True, "host": hello["host"]})
    return peers


def _answer(place: Place, hello: dict[str, Any], directory: str | Path, deadline: float) -> Peers:
    """Returns the others: call process 0 until it answers, and do as it says."""
    trouble = ""
    while time.monotonic() < deadline:
        try:
            line = Line(socket.create_connection(place.address, timeout=max(deadline - time.monotonic(), 0.01)))
            line.send(hello)
            answer = line.read(None)
        except OSError as error:
            answer, trouble = None, str(error)
        else:
            trouble = "it answers, but not as the process 0 that is waited for; does an older run still use the port?"
        if answer is not None and isinstance(answer.get("host"), str):
            peers = Peers(place.process_id, hello["host"])
            peers.add(0, answer["host"], line)
            if "look" in answer:
                name = str(answer["look"])
                line.send({"seen": bool(_MARK.fullmatch(name)) and _appears(Path(directory) / name)})
                answer = line.read(None) or {}
            if "go" in answer:
                return peers
            if "refused" in answer:
                raise (ConfigError if answer.get("input") else StartFailed)(answer["refused"])
            raise StartFailed(f"process 0 on {peers.hosts[0]} ended while the processes were starting: see its output")
        time.sleep(_RETRY)
    raise StartFailed(
        f"process {place.process_id} did not reach process 0 at {place.coordinator} within the start timeout "
        f"({trouble}): {_NO_ANSWER}"
    )


def _listen(place: Place) -> socket.socket:
    host, port = place.listening_host, place.address[1]
    dual = host is None and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or ":" in (host or "") else socket.AF_INET
    try:
        return socket.create_server((host or "", port), family=family, dualstack_ipv6=dual, backlog=1024)
    except OSError as error:
        raise StartFailed(
            f"process 0 cannot listen on port {port} of --coordinator={place.coordinator} ({error.strerror}): is an "
            f"older run still alive there? Stop it, or choose another port for all"
        ) from error


def _check_shared(peers: Peers, directory: str | Path) -> None:
    """Process 0 leaves a file in the run's directory, and all must see it there."""
    if "://" in str(directory):
        return
    root = Path(directory)
    made = [path for path in (root, *root.parents) if not path.exists()]
    mark = root / f".shared-{secrets.token_hex(8)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        peers.refuse(
            StartFailed(f"process 0 cannot write in --run={str(directory)!r} ({error.strerror}): make it writable")
        )
    try:
        peers.send({"look": mark.name, "host": peers.hosts[0]})
        blind = [process for process, answer in peers.ask(2 * _SHARED_DIRECTORY).items() if not answer.get("seen")]
    finally:
        mark.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # much may still be refused
            for path in made:
                path.rmdir()
    if blind:
        peers.refuse(
            ConfigError(
                f"--run={str(directory)!r} is not shared: what process 0 on {peers.hosts[0]} wrote there is not seen "
                f"by {', '.join(f'process {process} on {peers.hosts[process]}' for process in blind[:8])}: name a "
                f"directory on a file system that all machines share, or gs://BUCKET/DIRECTORY"
            )
        )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _SHARED_DIRECTORY
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        if path.parent.is_dir():
            os.listdir(path.parent)  # makes a network file system look again
        time.sleep(0.1)
    return True
