"""The peers: what a user would pick instead, each behind one adapter."""

from __future__ import annotations

from sostenuto.bench.peers.base import Peer

__all__ = ["Peer", "available_peers"]


def available_peers() -> dict[str, Peer]:
    """The peers by name, also those that aren't installed."""
    return {}
