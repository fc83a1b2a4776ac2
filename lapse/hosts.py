"""Which machine this is, and which of its addresses to use. Standard library only; opens no connection."""
from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import socket
import struct
from pathlib import Path

from lapse.errors import LapseError

STOPPED = "the process is stopped (no answer to heartbeats)"


def host_name() -> str:
    return socket.gethostname() or "localhost"


@functools.cache
def place() -> str:
    """Identify what two processes must share to reach each other's ipc sockets: machine, file system and user.

    The boot id tells machines apart (images cloned from one another share a machine id), the mount namespace containers.
    """
    parts = [host_name(), str(os.getuid())]
    for path in (Path("/proc/sys/kernel/random/boot_id"), Path("/etc/machine-id")):
        if path.is_file():
            parts.append(path.read_text("ascii").strip())
            break
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/mnt").readlink()))
    return "/".join(parts)


def resolve(host: str) -> str:
    """The numeric address of `host`; IPv4 where there is one."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:        # a name that is too long, or has empty parts, is an error of encoding
        raise LapseError(f"cannot find the address of host {host!r}: {getattr(error, 'strerror', None) or error}") from None
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return found[0][4][0]


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def address_towards(address: str) -> str:
    """The own address from which packets to `address` would leave (nothing is sent)."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError as error:
            raise LapseError(f"no route to {address}: {error.strerror or error}") from None
        return probe.getsockname()[0]


def interface_address(name: str) -> str:
    """The IPv4 address of a network interface (DMLC_INTERFACE)."""
    import fcntl

    request = struct.pack("256s", name.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
        except OSError as error:
            raise ValueError(f"DMLC_INTERFACE: no address for interface {name!r}: {error.strerror}") from None
    return socket.inet_ntoa(answer[20:24])


def process_state(pid: int) -> str | None:
    """What became of a process of this machine, as a phrase; None when nothing can be said."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except FileNotFoundError:
        return "the process died" if Path("/proc/self/stat").exists() else None
    except (OSError, IndexError):
        return None
    if state in b"ZX":
        return "the process died"
    if state in b"Tt":
        return STOPPED
    return None
