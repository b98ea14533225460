"""How long 50 000 images of DiT-XL/2 and 1 000 000 of FLUX.1-dev take on 8, 64 and 1 024 GPUs: a simulation.

    python benchmarks/scale.py --json docs/results/scale.json

No such machine was at hand, so nothing here is a measured run: batches with the times that the constants below imply are
handed out as ``sostenuto generate`` hands them out (whoever is free claims the next one), GPUs are of unequal speed, batches
vary, machines fail. Every constant names its source. What the command itself costs (starting, a claim, a record, encoding and
writing PNGs) is measured where this is run.
"""

from __future__ import annotations

import argparse
import heapq
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from statistics import fmean

import numpy as np
from tqdm import tqdm

SOURCES = {
    "peak_tflops": (989.4, "NVIDIA's data sheet of the H100 SXM: dense bfloat16"),
    "utilisation": (0.35, "assumed: what large transformers commonly reach at inference in bfloat16"),
    "dit_tflop": (23.74, "published (ToCa, DuCa, TaylorSeer): DiT-XL/2 256², 50 steps with guidance, 2 × MACs"),
    "flux_tflop": (3719.5, "published (ToCa, DuCa, TaylorSeer): FLUX.1-dev 1024², 50 steps, 2 × MACs"),
    "dit_speedup": (1.49, "published, measured by its authors: EB-Cache (arXiv 2503.07120), DiT-XL/2, 50 DDPM steps"),
    "flux_speedup": (2.82, "published, by FLOPs: TaylorSeer N=3 O=2 (arXiv 2503.06923), FLUX.1-dev, 50 steps"),
    "spread_of_gpus": (0.03, "assumed: standard deviation of the logarithm of a GPU's speed, constant over the run"),
    "spread_of_batches": (0.02, "assumed: the same of a batch's time, around its GPU's"),
    "slow_gpus": (0.01, "assumed: share of GPUs at half speed (throttling, a neighbour)"),
    "cores_per_gpu": (12, "usual: about a hundred cores beside eight GPUs"),
    "mtbf_hours": (50_000.0, "Llama 3 (arXiv 2407.21783): 419 unexpected interruptions in 54 days on 16 384 H100"),
    "mtbf_hours_interruptible": (500.0, "assumed: machines that are taken away a hundred times as often"),
    "repair_s": (0.0, "a failed machine's processes begin again at once (on a spare, or after a software fault)"),
    "load_gb_dit": (2.0, "DiT-XL/2 and its VAE in bfloat16 and float32: 0.68 G and 0.08 G parameters"),
    "load_gb_flux": (34.0, "FLUX.1-dev with T5-XXL, CLIP and VAE in bfloat16: 12 G, 4.8 G, 0.1 G and 0.1 G parameters"),
    "file_system_gb_s": (5.0, "assumed: what the shared file system gives all machines together"),
    "file_system_ops": (5000.0, "assumed: its operations on names (create, rename, lock) a second"),
    "gpus_per_machine": (8, "the usual machine"),
}


def constant(name: str) -> float:
    return SOURCES[name][0]


@dataclass(frozen=True)
class Job:
    """Images to make, and what one costs."""

    name: str
    num_images: int
    batch_size: int
    seconds_per_image: float
    load_gb: float
    image_bytes: float
    encode_s: float
    files: int
    """Names that are made for a batch: its lock, its record, its images."""


@dataclass(frozen=True)
class Cluster:
    """Where, and how work is handed out.

    Attributes:
        gpus: how many.
        launch: which processes begin again when one fails: those of its ``"machine"`` (a launch for each machine, all on one
            folder), or those of the whole ``"job"`` (one launch, one rendezvous).
        claims: whether who is free takes the next batch; else every process has a fixed share.
        mtbf_hours: of a GPU, until its machine's processes have to begin again.
    """

    gpus: int
    launch: str = "machine"
    claims: bool = True
    mtbf_hours: float = SOURCES["mtbf_hours"][0]
    start_s: float = 20.0


@dataclass
class Outcome:
    """What a run came to."""

    hours: float
    ideal_hours: float
    failures: int = 0
    lost_batches: int = 0
    busy: float = 0.0
    """Share of the GPUs' time that went into images that were kept."""
    gigabytes: float = 0.0
    operations_per_s: float = 0.0
    load_s: float = 0.0


def simulate(job: Job, cluster: Cluster, seed: int) -> Outcome:
    """One run, batch by batch."""
    random = np.random.default_rng(seed)
    gpus, per_machine = cluster.gpus, int(constant("gpus_per_machine"))
    pace = np.exp(random.normal(0, constant("spread_of_gpus"), gpus))
    pace[random.random(gpus) < constant("slow_gpus")] *= 2
    pace = pace.tolist()
    num_batches = -(-job.num_images // job.batch_size)
    # Beside the network: encoding on the host, and the names of the batch (lock, record, and one for each image).
    writing = job.batch_size * job.encode_s / constant("cores_per_gpu") + job.files / constant("file_system_ops")
    seconds = job.batch_size * job.seconds_per_image + writing
    load_s = cluster.start_s + job.load_gb * (gpus / per_machine) / constant(
        "file_system_gb_s"
    )  # each machine reads it once

    left = num_batches if cluster.claims else 0
    shares = [0] * gpus if cluster.claims else [len(range(g, num_batches, gpus)) for g in range(gpus)]
    attempts, began, working = [0] * gpus, [0.0] * gpus, [False] * gpus
    events: list[tuple[float, int, int]] = []  # when, which GPU, and the number of its attempt
    varied = cycle(np.exp(random.normal(0, constant("spread_of_batches"), num_batches + gpus)).tolist())

    def begin(gpu: int, now: float) -> None:
        nonlocal left
        if cluster.claims:
            if not left:
                return
            left -= 1
        elif shares[gpu]:
            shares[gpu] -= 1
        else:
            return
        working[gpu], began[gpu] = True, now
        heapq.heappush(events, (now + seconds * pace[gpu] * next(varied), gpu, attempts[gpu]))

    rate = gpus / (cluster.mtbf_hours * 3600)
    next_failure = random.exponential(1 / rate)
    for gpu in range(gpus):
        begin(gpu, load_s)
    done, now, kept, failures, lost = 0, load_s, 0.0, 0, 0
    while done < num_batches:
        if not events or events[0][0] > next_failure:
            now, failures = next_failure, failures + 1
            next_failure += random.exponential(1 / rate)
            first = int(random.integers(gpus)) // per_machine * per_machine
            hit = range(gpus) if cluster.launch == "job" else range(first, min(first + per_machine, gpus))
            restart = cluster.start_s + job.load_gb / constant("file_system_gb_s") + constant("repair_s")
            idle = []
            for gpu in hit:
                attempts[gpu] += 1  # what it was to finish is void
                if working[gpu]:
                    working[gpu], lost = False, lost + 1
                    left, shares[gpu] = left + cluster.claims, shares[gpu] + (not cluster.claims)
                idle.append(gpu)
            for gpu in idle:
                begin(gpu, now + restart)
            continue
        ends, gpu, attempt = heapq.heappop(events)
        if attempt != attempts[gpu]:
            continue
        now, done = ends, done + 1
        kept += now - began[gpu]
        working[gpu] = False
        begin(gpu, now)
    ideal = num_batches * seconds / gpus
    return Outcome(
        hours=now / 3600,
        ideal_hours=ideal / 3600,
        failures=failures,
        lost_batches=lost,
        busy=kept / (now * gpus),
        gigabytes=job.num_images * job.image_bytes / 1e9,
        operations_per_s=num_batches * job.files / now,
        load_s=load_s,
    )


def many(job: Job, cluster: Cluster, runs: int) -> Outcome:
    """The mean over some runs."""
    outcomes = [asdict(simulate(job, cluster, seed)) for seed in range(runs)]
    return Outcome(**{name: fmean(outcome[name] for outcome in outcomes) for name in outcomes[0]})


def measure() -> dict[str, float]:
    """What the command costs beside sampling, here, in seconds of a core: other programs that run don't count."""
    from sostenuto.distributed import complete
    from sostenuto.distributed.folder import publish

    found: dict[str, float] = {}
    starts = []
    for _ in range(3):
        began = _of_children()
        subprocess.run([sys.executable, "-c", "import sostenuto.sampling, diffusers.pipelines"], check=True)
        starts.append(_of_children() - began)
    found["start_s"] = min(starts)
    with tempfile.TemporaryDirectory() as folder:
        pieces = [f"{number:08d}" for number in range(200)]
        began = time.process_time()
        complete(Path(folder) / "batches", pieces, lambda _: {}, "claim", show_progress=False)
        found["claim_s"] = (time.process_time() - began) / len(pieces)
        for size in (256, 1024):
            image, times, path = photograph(size), [], Path(folder) / "image.png"
            for _ in range(9):
                began = time.process_time()
                with publish(path) as partial:
                    image.save(partial, "PNG")
                times.append(time.process_time() - began)
            found[f"png_{size}_s"], found[f"png_{size}_bytes"] = min(times), float(path.stat().st_size)
    return found


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def photograph(size: int):
    """An image with the spectrum of photographs (amplitude falls as 1/f), which compresses about as they do."""
    from PIL import Image

    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    frequency[0, 0] = 1
    channels = [np.fft.ifft2(np.fft.fft2(random.normal(size=(size, size))) / frequency).real for _ in range(3)]
    stacked = np.stack(channels, -1)
    scaled = (stacked - stacked.min()) / (stacked.max() - stacked.min())
    return Image.fromarray((scaled * 255).round().astype(np.uint8))


def jobs(measured: dict[str, float]) -> list[Job]:
    """The two tasks, uncached and cached."""
    speed = constant("peak_tflops") * constant("utilisation")
    dit = Job(
        "DiT-XL/2 256², 50 000 images, uncached",
        50_000,
        16,
        constant("dit_tflop") / speed,
        constant("load_gb_dit"),
        256 * 256 * 3,  # an .npz is not compressed
        0.0,
        3,
    )
    flux = Job(
        "FLUX.1-dev 1024², 1 000 000 images, uncached",
        1_000_000,
        8,
        constant("flux_tflop") / speed,
        constant("load_gb_flux"),
        measured["png_1024_bytes"],
        measured["png_1024_s"],
        10,
    )
    found = []
    for job, method, speedup in ((dit, "EB-Cache", "dit_speedup"), (flux, "TaylorSeer", "flux_speedup")):
        faster = job.seconds_per_image / constant(speedup)
        found += [job, replace(job, name=job.name.replace("uncached", method), seconds_per_image=faster)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="simulated runs of each row; the table has their means")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    measured = measure()
    rows = []
    todo = [(job, gpus) for job in jobs(measured) for gpus in options.gpus]
    for job, gpus in tqdm(todo, desc="simulate"):
        base = Cluster(gpus, start_s=measured["start_s"])
        variants = {
            "as built": base,
            "one launch": replace(base, launch="job"),
            "fixed shares": replace(base, claims=False),
            "interruptible": replace(base, mtbf_hours=constant("mtbf_hours_interruptible")),
            "interruptible, one launch": replace(base, launch="job", mtbf_hours=constant("mtbf_hours_interruptible")),
        }
        outcomes = {name: asdict(many(job, cluster, options.runs)) for name, cluster in variants.items()}
        rows.append({"job": job.name, "gpus": gpus, "seconds_per_image": job.seconds_per_image, **outcomes})
    print(table(rows))
    if options.json:
        constants = {name: {"value": value, "source": source} for name, (value, source) in SOURCES.items()}
        content = {
            "rows": rows,
            "constants": constants,
            "measured_here_in_core_seconds": measured,
            "runs": options.runs,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = [
        "| images | GPUs | hours | GPU hours | over ideal | fixed shares | interruptible | batches lost | its one launch | "
        "batches lost | loading | names/s | GB |",
        "|---" * 13 + "|",
    ]
    for row in rows:
        built, often, whole = row["as built"], row["interruptible"], row["interruptible, one launch"]
        over = {
            name: f"{found['hours'] / found['ideal_hours'] - 1:+.1%}"
            for name, found in row.items()
            if isinstance(found, dict)
        }
        lines.append(
            f"| {row['job']} | {row['gpus']} | {built['hours']:.3g} | {built['hours'] * row['gpus']:.4g} | "
            f"{over['as built']} | {over['fixed shares']} | {over['interruptible']} | {often['lost_batches']:.3g} | "
            f"{over['interruptible, one launch']} | {whole['lost_batches']:.3g} | {built['load_s']:.0f} s | "
            f"{built['operations_per_s']:.3g} | {built['gigabytes']:.4g} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
