"""A port for the ranks of a launch to meet at."""

import random
import socket

__all__ = ["free_port"]


def free_port() -> int:
    """A port that nobody listens on, and that nobody is likely to take before the launcher does.

    One that the kernel chooses is of the range that it gives to connections too, which ranks open by the dozen. Below
    that range only another caller could be faster, and one in ten thousand of them is.
    """
    draw = random.SystemRandom()  # tests seed the other generator
    while True:
        port = draw.randrange(20_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
