"""Other caching libraries behind one protocol, so that they can be compared: an adapter file for each."""

from sostenuto.bench.peers.base import Peer, available_peers, peer

__all__ = ["Peer", "available_peers", "peer"]
