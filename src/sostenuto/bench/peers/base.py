"""What a peer is: another library's cache, enabled and removed through one small adapter."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol


class Peer(Protocol):
    """Another library's cache, ready to run beside ours.

    Attributes:
        name: what users type after ``peer:``.
        library: the package that it comes from.
        settings: what it is set to, for the row.
    """

    name: str
    library: str
    settings: dict[str, Any]

    def version(self) -> str:
        """The installed version of the library."""
        ...

    def problem(self, pipe: Any) -> str | None:
        """Why it can't run on this pipeline or denoiser here (not installed, unsupported class); ``None`` where it can."""
        ...

    def attached(self, pipe_or_denoiser: Any, num_inference_steps: int) -> AbstractContextManager[None]:
        """Enables it on enter, removes every trace on exit."""
        ...
