"""How large is exposure bias, and on which side of 1 is the factor that repairs it? (EB-Cache, figure 3; Epsilon Scaling)"""

from __future__ import annotations

from statistics import fmean, median
from typing import TYPE_CHECKING

from sostenuto.analysis.exposure_bias import noise_norm_curves
from sostenuto.analysis.instrument import Data, Instrument
from sostenuto.analysis.subject import Subject
from sostenuto.analysis.variance_probe import chain_variance, probe_variance
from sostenuto.methods import NoCache
from sostenuto.methods.base import Method

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def measure(subject: Subject) -> Data:
    """Norms on the chain and on noised real data; variance that a step loses, fresh and reused, and that the chain has lost."""
    interval = subject.intervals[0]
    cached = subject.uniform(interval)
    batches = subject.real_batches()
    shared = {
        "num_inference_steps": subject.num_inference_steps,
        "scheduler": subject.scheduler,
    }
    curves, chains = {}, {}
    methods: dict[str, Method] = {
        "uncached": NoCache(),
        f"every {interval}": cached,
        f"every {interval}, b": subject.scaled(cached),
    }
    for name, method in methods.items():
        subject.tell(f"noise norms, {name}")
        found = noise_norm_curves(
            subject.target, subject.sample, batches, method=method, generator=subject.generator(), **shared
        )
        curves[name] = {"chain": list(found.chain), "real": list(found.real), "ratio": list(found.ratios)}
        chains[name] = chain_variance([subject.path(name, method)], batches)
    subject.tell("variance probe")
    probe = probe_variance(
        subject.target, subject.sample, batches, method=cached, generator=subject.generator(), **shared
    )
    return {
        "norms": curves,
        "excess_variance": {
            "computed": [moments.excess() for moments in probe.computed],
            "reused": [None if moments is None else moments.excess() for moments in probe.reused],
        },
        "factor": {
            "computed": [moments.factor for moments in probe.computed],
            "reused": [None if moments is None else moments.factor for moments in probe.reused],
        },
        "chain_variance": {
            "expected": list(chains["uncached"].expected),
            "delta": {name: list(chain.delta) for name, chain in chains.items()},
        },
        "interval": interval,
        "b": subject.noise_scale,
        "real": "noised real latents" if subject.real_latents is not None else "the model's own samples, noised",
        "num_samples": probe.num_samples,
    }


def draw(data: Data) -> Figure:
    """Norms and their ratio, the variance of a step and the factor that repairs it, the variance of the whole chain."""
    from sostenuto.analysis.style import dress, figure, line

    made, axes = figure(3, 2, height=2.5)
    (norms, ratio), (excess, factor), (delta, added) = axes
    base = data["chain_variance"]["delta"]["uncached"]
    real = next(iter(data["norms"].values()))["real"]
    line(norms, real, "noised data", 5)
    for index, (name, curve) in enumerate(data["norms"].items()):
        line(norms, curve["chain"], name, index)
        line(ratio, curve["ratio"], name, index)
        chain = data["chain_variance"]["delta"][name]
        line(delta, chain, name, index)
        if name != "uncached":
            line(added, [value - without for value, without in zip(chain, base, strict=True)], name, index)
    for index, kind in enumerate(("computed", "reused")):
        steps = [step for step, value in enumerate(data["factor"][kind]) if value is not None]
        for axis, name in ((excess, "excess_variance"), (factor, "factor")):
            line(axis, [data[name][kind][step] for step in steps], kind, index, x=steps)
    for axis, at in ((ratio, 1), (excess, 0), (factor, 1), (delta, 0), (added, 0)):
        axis.axhline(at, color="black", linewidth=0.6)
    inner = sorted(value for kind in data["factor"].values() for value in kind if value is not None)
    spread = max(0.01, *(abs(value - 1) for value in inner[len(inner) // 20 : len(inner) - len(inner) // 20]))
    factor.set_ylim(1 - 1.2 * spread, 1 + 1.2 * spread)  # a few at the very end may lie far outside
    dress(norms, "norm of the predicted noise", "‖ε‖")
    dress(ratio, "exposure bias", "‖ε‖ chain / data")
    dress(excess, "variance that one step adds", "relative excess")
    dress(factor, "factor that repairs it", "b")
    dress(delta, "variance that the chain gained", "δ_t")
    dress(added, "of it by caching", "δ_t − δ_t uncached")
    return made


def finding(data: Data) -> str:
    """What the numbers say."""
    means = {name: fmean(curve["ratio"]) for name, curve in data["norms"].items()}
    last = {name: curve["ratio"][-1] for name, curve in data["norms"].items()}
    cached = f"every {data['interval']}"
    chain = data["chain_variance"]["delta"]
    plain, scaled = (fmean(chain[name]) - fmean(chain["uncached"]) for name in (cached, f"{cached}, b"))
    more = "more" if means[cached] > means["uncached"] else "less"
    late = len(data["factor"]["computed"]) // 2

    def middle(kind: str) -> float | None:
        factors = [value for value in data["factor"][kind][late:] if value is not None]
        return median(factors) if factors else None

    computed, reused = middle("computed"), middle("reused")
    repair = f"b = {computed:.3f} at computed calls"
    if reused is not None:
        repair += f" and {reused:.3f} at reused ones"
        assert computed is not None
        opposite = (computed - 1) * (reused - 1) < 0
        repair += ": on different sides of 1, so that no constant fits both" if opposite else ": on the same side of 1"
    return (
        f"Against {data['real']}, the norm on the chain is {means['uncached']:.4f} of theirs uncached and {means[cached]:.4f} "
        f"cached {cached} (means over the steps; at the last step {last['uncached']:.3f} and {last[cached]:.3f}): caching "
        f"predicts {more} noise. In the second half of the steps the next input keeps its variance with (medians) {repair}. "
        f"By its last step the uncached chain has gained a variance δ_t about x₀ of {chain['uncached'][-1]:.3f}; caching "
        f"changes it by {plain:+.4f}, with b = {data['b']:.3f} by {scaled:+.4f} (means over the steps)."
    )


EXPOSURE_BIAS = Instrument(
    name="exposure-bias",
    work=7,
    title="Norm of the noise, and exposure bias",
    source="EB-Cache (arXiv 2503.07120v1), figures 3 and 5; Epsilon Scaling (arXiv 2308.15321), figures 2 and 3",
    claim=(
        "On the sampling chain the network predicts noise of a larger norm than on noised data, and caching makes it larger "
        "still; multiplying it by a b below 1 compensates."
    ),
    method=(
        "Norms are means over samples, of what the network says before any scaling. Variance: the sampler is told the true "
        "noise of known pairs, and each step's next input is compared with what the network's prediction, computed or "
        "reused, would have made of it. δ_t: Var(x̂_t − α·x₀) − σ² where the sampler goes by itself from known pairs "
        "(x₀, x_T). Even a perfect network, which can't know x₀, ends at another sample: what caching adds is the difference "
        "from the uncached chain."
    ),
    measure=measure,
    draw=draw,
    finding=finding,
)
