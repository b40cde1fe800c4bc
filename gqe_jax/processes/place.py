"""Which process of a run this one is, and where process 0 is reached: from arguments, or from the platform."""

import dataclasses
import ipaddress
import math
import os
import socket
from collections.abc import Sequence

from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize() asks, which tells only JAX the answer

from gqe_jax.config import ConfigError


class StartFailed(OSError):
    """The processes did not meet within the deadline. Another try may succeed."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A process's place among those of the run.

    Attributes:
      coordinator: HOST:PORT at which the others reach process 0.
      num_processes: in all.
      process_id: of this one, from 0.
      local_device_ids: devices that this process uses; None: all of its machine.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: Sequence[int] | None = None

    def __post_init__(self):
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise ConfigError(
                f"--coordinator={self.coordinator!r} is no HOST:PORT: name the machine of process 0, as the others "
                f"reach it, and a port that is free there, such as 10.0.0.1:8476"
            )
        if self.num_processes < 1:
            raise ConfigError(f"--num-processes={self.num_processes} must be at least 1")
        if not 0 <= self.process_id < self.num_processes:
            raise ConfigError(
                f"--process-id={self.process_id} must lie in [0, --num-processes={self.num_processes}): number the "
                f"processes from 0 to {self.num_processes - 1}"
            )

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def listening_host(self) -> str | None:
        """The one address at which process 0 listens; None: at all of its machine, since the others may need any.

        It is the coordinator's where that is a number that the machine has, and 127.0.0.1 for localhost. A name may
        mean another address on another machine.
        """
        host = "127.0.0.1" if self.address[0] == "localhost" else self.address[0]
        try:
            family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
            with socket.socket(family) as probe:
                probe.bind((host, 0))
        except (ValueError, OSError):
            return None
        return host


def socket_address(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def find_place(timeout: float) -> Place:
    """This process's place as the platform (Cloud TPU, GKE, Slurm, Open MPI, Kubernetes) gives it.

    Raises:
      ConfigError: there is no such platform.
      StartFailed: the platform does not know the coordinator's address within `timeout` seconds.
    """
    try:
        coordinator, num_processes, process_id, devices = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, math.ceil(timeout)
        )
    except RuntimeError as error:
        raise StartFailed(f"--distributed: {error}") from error
    if coordinator is None or num_processes is None or process_id is None:
        raise ConfigError(
            "--distributed: this is no platform that says which processes a run has (Cloud TPU, GKE, Slurm, Open MPI, "
            "Kubernetes): give --coordinator HOST:PORT --num-processes N --process-id I to each process instead"
        )
    return Place(coordinator, num_processes, process_id, devices)
