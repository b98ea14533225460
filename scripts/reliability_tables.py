"""The table of what was done to find a fault."""

from __future__ import annotations

from typing import Any

_DONE = {
    "sampling": ("random sequences", "{steps} states, {denoiser calls compared} calls of the denoiser compared"),
    "compiled": ("the same, compiled", "{steps} states, {denoiser calls compared} calls compared"),
    "inputs": ("hostile inputs", "{inputs} inputs"),
    "kills": ("processes killed", "{kills} kills in {runs} runs"),
    "interrupts": ("generations interrupted", "{interrupts} interrupts"),
    "full disks": ("disks that fill up", "{full_disks} full disks"),
    "memory": ("memory", "{generations} generations of each kind of method"),
}


def reliability(results: dict[str, Any]) -> str:
    """What was done in each part, and found; the sums last."""
    lines = ["| part | what was done | differences and losses |", "|---|---|---|"]
    for name, (title, done) in _DONE.items():
        if name in results["parts"]:
            part = results["parts"][name]
            found = sum(part.get(kind, 0) for kind in ("differences", "lost", "faults"))
            lines.append(f"| {title} | {done.format_map(part)} | {found} |")
    total = results["summary"]
    lines += [
        f"| states explored | {total['states_explored']} | |",
        f"| inputs fuzzed | {total['inputs_fuzzed']} | |",
        f"| faults injected (kills, interrupts, exceptions, full disks) | {total['faults_injected']} | |",
        f"| **differences and losses found** | | **{total['differences_and_losses']}** |",
    ]
    return "\n".join(lines)
