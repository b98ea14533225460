"""``sostenuto studio``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Studio:
    """A local web page: two methods side by side from the same noise, step by step; plans to edit and save."""

    model: str = "demo"
    """A diffusers folder, a hub id, or "demo"."""
    device: str = "auto"
    """Where it runs: cpu, cuda, or auto, which takes the GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What its weights are loaded as: auto takes bfloat16 on a GPU and float32 on a CPU, and float32 for the demo model."""
    offload: Literal["none", "model", "sequential"] = "none"
    """On a GPU that holds less than the whole pipeline, as diffusers offloads (with accelerate)."""
    port: int = 7870
    """0 takes a free one."""
    host: str = "127.0.0.1"
    """Where to listen; anything but this machine itself wants --allow-remote."""
    allow_remote: bool = False
    """Let other machines use the page: whoever reaches it can generate and write tables."""
    tables: Path = Path("studio-tables")
    """Folder of the tables that are saved."""
    results: Path | None = None
    """A results file of "sostenuto demo", whose rows are drawn and can be loaded; one of "sostenuto bench" holds no plans."""

    def run(self) -> None:
        """Serve until interrupted."""
        import socket

        from sostenuto.cli.common import SamplerChoice
        from sostenuto.errors import InputError
        from sostenuto.studio.session import Session

        try:
            import uvicorn

            from sostenuto.studio.server import LOOPBACK, app
        except ImportError as error:
            raise InputError(f"the studio needs {error.name}: pip install 'sostenuto[studio]'") from None

        if self.host not in LOOPBACK and not self.allow_remote:
            raise InputError(
                f"{self.host} can be reached from other machines, and whoever reaches the page can use it: pass "
                "--allow-remote if that is meant"
            )
        choice = SamplerChoice(self.model, device=self.device, dtype=self.dtype, offload=self.offload)
        session = Session(choice.pipeline(), self.tables, self.results)
        session.frontier()  # a results file that can't be read is told now
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((self.host, self.port))
        except OSError as error:
            raise InputError(
                f"{self.host}:{self.port} can't be listened on ({error.strerror}): choose another --port"
            ) from None
        name = f"[{self.host}]" if ":" in self.host else self.host
        print(f"studio: http://{name}:{listening.getsockname()[1]}/ (end with Ctrl-C)", flush=True)
        hosts = LOOPBACK if self.host in LOOPBACK else ("*",)
        config = uvicorn.Config(app(session, hosts), log_level="warning", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listening])
