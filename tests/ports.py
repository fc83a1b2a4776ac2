"""Ports of loopback that a test hands to a scheduler, or takes from it."""
import contextlib
import socket


@contextlib.contextmanager
def reserved_port(address="127.0.0.1"):
    """A port on which a socket of libzmq can listen. The system gives it to nobody else meanwhile, for a connection's own end neither.

    A port that was merely free a moment ago may be anybody's by the time the scheduler has started.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((address, 0))
        yield held.getsockname()[1]
