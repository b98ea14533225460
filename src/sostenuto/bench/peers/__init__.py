"""The peers: what a user would pick instead, each behind one adapter."""

from __future__ import annotations

from sostenuto.bench.peers.base import Peer
from sostenuto.errors import InputError

__all__ = ["Peer", "available_peers", "peer"]


def available_peers() -> dict[str, Peer]:
    """The peers by name, also those that aren't installed."""
    return {}


def peer(name: str) -> Peer:
    """The peer of a name, or of one with settings such as ``cache-dit:residual_diff_threshold=0.12``.

    Raises:
        InputError: there is none.
    """
    raise InputError(f"there is no peer {name!r}; there are {', '.join(sorted(available_peers()))}")
