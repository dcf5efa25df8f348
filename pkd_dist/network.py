"""The network interfaces and addresses of this host."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from pkd_dist.errors import UserError


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def host_and_port(host: str, port: int) -> str:
    """Return HOST:PORT as URLs have it, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def interface_towards(address: str) -> str | None:
    """Return the interface through which `address` is reached; None if its local address belongs to no interface.

    Raises:
        UserError: there is no route, or the name does not resolve.
    """
    local = own_address_towards(address)
    return next((name for name, found in _interface_addresses() if found == local), None)


def own_address_towards(address: str) -> str:
    """Return this host's address on the route to `address`: the one to listen on if `address` is this host.

    For this host's own name that is an address that other hosts can use, even if the name resolves to loopback here.

    Raises:
        UserError: there is no route, or the name does not resolve.
    """
    try:
        local = local_address_towards(address)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"MASTER_ADDR={address} cannot be reached from {socket.gethostname()} ({error}); set the address of rank 0's "
            "node as the other nodes see it (deepspeed and torchrun: --master_addr; mpirun and srun: MASTER_ADDR)"
        ) from None
    if is_loopback(local) and not means_loopback(address):  # this host's own name; other hosts use another address
        local = next(iter(own_addresses()), local)
    return local


def local_address_towards(address: str) -> str:
    """Return the local address of a route to `address`; sends nothing. Raises OSError if there is none."""
    family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def own_addresses() -> list[str]:
    """Return the addresses at which other hosts may reach this one: IPv4 first, in the kernel's order."""
    usable = [address for _, address in _interface_addresses() if not is_loopback(address) and "%" not in address]
    return sorted(usable, key=lambda address: ":" in address)


def interfaces() -> set[str]:
    """Return the names of the interfaces that are up."""
    return {name for name, state in psutil.net_if_stats().items() if state.isup}


def _interface_addresses() -> list[tuple[str, str]]:
    """Return (interface, address) pairs of all interfaces that are up."""
    up = interfaces()
    return [
        (name, address.address)
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if name in up and address.family in (socket.AF_INET, socket.AF_INET6)
    ]


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def means_loopback(host: str) -> bool:
    """Return whether `host` is `localhost` or a numeric loopback address."""
    try:
        return is_loopback(host)
    except ValueError:
        return host.split(".")[0] == "localhost"
