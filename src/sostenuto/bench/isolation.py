"""One row in a process of its own, with a time limit: a peer that crashes or hangs becomes a row, and the run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from sostenuto.bench.cases import Case, Settings
from sostenuto.bench.rows import Row
from sostenuto.bench.runner import begun, measure

WORKER = (sys.executable, "-m", "sostenuto.bench.isolation")


def measure_isolated(
    case: Case,
    settings: Settings,
    folder: Path | None,
    time_limit: float,
    command: Sequence[str] = WORKER,
    environment: Mapping[str, str] | None = None,
) -> Row:
    """The row of a case, measured in a fresh process; one with its error where that crashes or takes too long.

    Args:
        case: what is measured.
        settings: of the run.
        folder: where the first images are saved; ``None`` saves none.
        time_limit: seconds after which the process is ended.
        command: what is started; it is given the job on its standard input and writes the row where the job says.
        environment: the variables of the process; by default this one's.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result, said = Path(scratch) / "row.json", Path(scratch) / "said"
        job = {
            "case": asdict(case),
            "settings": asdict(settings),
            "folder": folder and str(folder),
            "result": str(result),
        }
        with said.open("wb") as output:
            # A session of its own, so that what the peer has started ends with it.
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True, env=environment
            )
            try:
                process.communicate(json.dumps(job).encode(), timeout=time_limit)
            except subprocess.TimeoutExpired:
                _end(process)
                return replace(begun(case, settings), error=f"no result within {time_limit:g} s: ended")
            except BaseException:
                _end(process)
                raise
        if process.returncode == 0 and result.exists():
            return Row.from_dict(json.loads(result.read_text()))
        return replace(begun(case, settings), error=_reason(process.returncode, said.read_text(errors="replace")))


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(status: int, said: str) -> str:
    last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "")
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return f"its process crashed ({how}){': ' + last[:300] if last else ''}"


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone, whatever hangs here."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def work(job: str) -> None:
    """Measure the row of a job, and write it where the job says."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    content = json.loads(job)
    folder = content["folder"]
    row = measure(Case(**content["case"]), Settings(**content["settings"]), folder and Path(folder))
    Path(content["result"]).write_text(json.dumps(row.as_dict(), allow_nan=False))


if __name__ == "__main__":
    work(sys.stdin.read())
