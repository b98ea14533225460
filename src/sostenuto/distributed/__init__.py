"""More than one process: those of a launch share work, those of one generation decide alike."""

from sostenuto.distributed.folder import complete
from sostenuto.distributed.lockstep import sharded_over
from sostenuto.distributed.world import World, apart, gather, joined, on_main, share, spread, until, world
from sostenuto.files import publish

__all__ = [
    "World",
    "apart",
    "complete",
    "gather",
    "joined",
    "on_main",
    "publish",
    "sharded_over",
    "share",
    "spread",
    "until",
    "world",
]
