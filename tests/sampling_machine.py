"""Everything that users do with a denoiser, in any order: the state machine of the model-based test, and what it counts."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import sostenuto
from conftest import build_tiny
from naive_sampling import Level, Made, NaiveNetwork, Recipe, replay
from recipes import BLOCKS, BRANCHES, RECIPES

COUNTS: Counter[str] = Counter()
"""What was done so far, over all machines."""

diffusers.logging.set_verbosity_error()  # it says at every move of dtype that no module was kept in float32

NULL = 10
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SCHEDULERS = {
    "ddpm": lambda: diffusers.DDPMScheduler(beta_schedule="linear"),
    "ddim": lambda: diffusers.DDIMScheduler(),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
    "heun": lambda: diffusers.HeunDiscreteScheduler(),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
}


@dataclass(frozen=True)
class Generation:
    """How one generation goes."""

    steps: int
    guidance: str
    interval: tuple[int, int]
    """The steps with guidance, where it is limited to some."""
    swapped: frozenset[int]
    """The steps at which the unconditional pass comes first."""
    batch: int
    size: int
    first: int
    """The first step: above 0 as in image to image."""
    stop: int | None
    """Interrupted before this call."""
    fails: tuple[str, int] | None
    """A module, and which of its calls raises."""
    retries: bool
    """Whether the call that failed is made again."""
    second: bool
    """Whether the second pipeline of the denoiser runs it."""
    thread: bool
    fitting: bool
    """Take the length that the method asks for."""
    reads_statistics: bool
    switches_offloading: bool
    """Between the generation before and this one."""


GENERATIONS = st.builds(
    Generation,
    steps=st.integers(1, 8),
    guidance=st.sampled_from(["none", "fused", "separate", "interval", "fused interval"]),
    interval=st.tuples(st.integers(0, 4), st.integers(1, 8)),
    swapped=st.frozensets(st.integers(0, 7), max_size=4),
    batch=st.integers(1, 3),
    size=st.sampled_from([8, 8, 4]),
    first=st.sampled_from([0, 0, 0, 1, 3]),
    stop=st.none() | st.integers(0, 8),
    fails=st.none() | st.tuples(st.sampled_from([*BRANCHES, "transformer_blocks.1", "proj_out_2"]), st.integers(1, 6)),
    retries=st.booleans(),
    second=st.booleans(),
    thread=st.booleans(),
    fitting=st.sampled_from([True, True, True, False]),
    reads_statistics=st.sampled_from([False] * 7 + [True]),
    switches_offloading=st.sampled_from([False, False, False, False, True]),
)


def new_network() -> Any:
    return build_tiny(num_layers=BLOCKS, out_channels=4)


class _InjectedError(Exception):
    pass


class Setup:
    """A denoiser, the pipelines that call it, and a network of the same weights that nothing is ever enabled on."""

    def __init__(self) -> None:
        self.network = new_network()
        self.naive = NaiveNetwork(new_network())
        self.pipes = [SimpleNamespace(transformer=self.network, scheduler=SCHEDULERS["ddpm"]()) for _ in range(2)]
        self.dtype = torch.float32
        self.handle: Any = None
        self.recipe = Recipe("stock", sostenuto.NoCache())
        self.shared = self.compiled = self.offloaded = False
        self.seed = 0

    def replace_network(self, network: Any) -> None:
        self.network = network
        for pipe in self.pipes:
            pipe.transformer = network

    def enable(self, recipe: Recipe) -> None:
        self.handle, self.recipe, self.shared = sostenuto.enable(self.pipes[0], recipe.method), recipe, False

    def disable(self) -> None:
        sostenuto.disable(self.network)
        assert self.handle is None or (not self.handle.enabled and not self.handle._passes)
        self.handle, self.recipe = None, Recipe("stock", sostenuto.NoCache())

    def switch_offloading(self) -> None:
        if self.offloaded:
            remove_hook_from_module(self.network, recurse=True)
        else:
            accelerate.cpu_offload(self.network, torch.device("cpu"))
        self.offloaded = not self.offloaded
        COUNTS["offloading switched"] += 1

    # --- one generation ------------------------------------------------------------------------------------------

    def generate(self, generation: Generation) -> None:
        """Run it, and compare every call of it with the naive sampler's."""
        pipe = self.pipes[generation.second]
        if generation.switches_offloading and not self.compiled:
            self.switch_offloading()
        if generation.second and self.handle is not None and not self.shared:
            self.handle.share(pipe)
            self.shared = True
        steps = generation.steps if not generation.fitting or self.recipe.steps is None else self.recipe.steps
        if self.recipe.scale != 1 and isinstance(pipe.scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
            pipe.scheduler = SCHEDULERS["euler"]()  # the naive scaling is that of predicted noise
        try:
            try:
                calls = self._sample(generation, pipe.scheduler, steps)
            except (
                sostenuto.ClockError
            ):  # the other pipeline's scheduler was replaced too, and both set their timesteps
                assert self.shared
                COUNTS["calls refused"] += 1
                calls = self._sample(generation, pipe.scheduler, steps)
        except (sostenuto.TableError, sostenuto.MethodError):
            listed = len(pipe.scheduler.timesteps)
            assert (self.recipe.steps is not None and listed != self.recipe.steps) or listed < self.recipe.least
            COUNTS["calls refused"] += 1
            return
        self._compare(calls, len(pipe.scheduler.timesteps), generation.reads_statistics)
        COUNTS["generations"] += 1
        COUNTS["denoiser calls compared"] += sum(call.output is not None for call in calls)

    @torch.no_grad()
    def _sample(self, generation: Generation, scheduler: Any, steps: int) -> list[Made]:
        self.seed += 1
        torch.set_num_threads(1)
        noise = torch.Generator().manual_seed(self.seed)
        latents = torch.randn(generation.batch, 2, generation.size, generation.size, generator=noise)
        labels = torch.randint(10, (generation.batch,), generator=noise)
        scheduler.set_timesteps(steps)
        first = min(generation.first, len(scheduler.timesteps) - 1)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        calls: list[Made] = []
        raising = _raise_in(self.network, generation.fails) if not self.compiled else None
        try:
            for step in range(first, len(scheduler.timesteps)):
                timestep = scheduler.timesteps[step]
                scaled = (
                    scheduler.scale_model_input(latents, timestep)
                    if hasattr(scheduler, "scale_model_input")
                    else latents
                )
                predictions, level = {}, _level(scheduler, step)
                for which, rows in _passes(generation, step):
                    if generation.stop == len(calls):
                        COUNTS["generations interrupted"] += 1
                        return calls
                    given = torch.cat([scaled] * len(rows)).to(self.dtype)
                    conditioning = torch.cat(
                        [labels if row == "cond" else torch.full_like(labels, NULL) for row in rows]
                    )
                    arguments = given, timestep.expand(len(given)).clone(), conditioning
                    output = self._call(arguments)
                    if output is None:
                        COUNTS["exceptions inside a block"] += 1
                        assert self.handle is None or not self.handle._passes
                        calls.append(Made(step, which, arguments, None, level))
                        if not generation.retries:
                            return calls
                        raising.remove()
                        output = self._call(arguments)
                    calls.append(Made(step, which, arguments, output.clone(), level))
                    predictions.update(zip(rows, output.float().chunk(len(rows)), strict=True))
                guided = predictions["cond"]
                if "uncond" in predictions:
                    guided = predictions["uncond"] + 2.0 * (guided - predictions["uncond"])
                extra = {"generator": noise} if isinstance(scheduler, diffusers.DDPMScheduler) else {}
                latents = scheduler.step(guided[:, :2], timestep, latents, **extra).prev_sample.clamp(-9, 9)
        finally:
            if raising is not None:
                raising.remove()
        return calls

    def _call(self, arguments: tuple[Any, ...]) -> Any:
        try:
            return self.network(*arguments).sample
        except _InjectedError:
            return None

    def _compare(self, calls: list[Made], steps: int, reads_statistics: bool) -> None:
        expected = replay(self.recipe, self.naive, calls, steps)
        made = [call for call in calls if call.output is not None]
        for call, (output, _) in zip(made, expected, strict=True):
            if self.recipe.clean:  # near the end a prediction is the small difference of almost equal numbers
                both = [(one, call.arguments[0].to(one.dtype)) for one in (call.output, output)]
                _check_equal(*(call.level.clean(one[:, :2], x) for one, x in both), False, self.dtype)
                _check_equal(call.output[:, 2:], output[:, 2:], not self.compiled, self.dtype)
                continue
            _check_equal(call.output, output, self.recipe.exact and not self.compiled, self.dtype)
        if self.handle is None or not made or not reads_statistics:
            return
        COUNTS["statistics compared"] += 1
        stats = self.handle.stats
        assert stats.cache_bytes_peak <= self.handle.predicted_cache_bytes
        if not self.recipe.ranges and self.recipe.name != "ab" and len(made) == len(calls):
            letters = {"r": "reuse", "f": "forecast"}
            rows = [
                [letters.get(done.get(site, ""), "compute") for site in BRANCHES]
                for call, (_, done) in zip(made, expected, strict=True)
                if call.which == made[0].which
            ]
            assert stats.plan == rows


def _level(scheduler: Any, step: int) -> Level:
    """How noisy the latents of a step are, as the network is given them."""
    if isinstance(scheduler, (diffusers.DDPMScheduler, diffusers.DDIMScheduler)):
        signal = scheduler.alphas_cumprod[int(scheduler.timesteps[step])].item()
        return Level(signal**0.5, (1 - signal) ** 0.5, False, 1.0)
    sigma = scheduler.sigmas[step].item()
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        return Level(1 - sigma, sigma, True, math.inf)
    alpha = (1 + sigma**2) ** -0.5
    return Level(alpha, sigma * alpha, False, math.inf)


def _passes(generation: Generation, step: int) -> list[tuple[str, tuple[str, ...]]]:
    """The calls of a step: the name of the pass, and which halves of the guidance it holds."""
    cond, uncond, both = ("cond", ("cond",)), ("uncond", ("uncond",)), ("both", ("cond", "uncond"))
    guided = not generation.guidance.endswith("interval") or step in range(*generation.interval)
    if generation.guidance == "none" or not guided:
        return [cond]
    if generation.guidance.startswith("fused"):
        return [both]
    return [uncond, cond] if step in generation.swapped else [cond, uncond]


def _raise_in(network: Any, fails: tuple[str, int] | None) -> Any:
    """A hook that makes one call of a module raise."""
    if fails is None:
        return None
    path, nth = fails
    count = iter(range(1, 1000))

    def hook(*_: Any) -> None:
        if next(count) == nth:
            raise _InjectedError

    return network.get_submodule(path).register_forward_pre_hook(hook)


_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 6e-2}


def _check_equal(got: torch.Tensor, expected: torch.Tensor, exact: bool, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    if exact:
        assert torch.equal(got, expected)
        return
    tolerance = _TOLERANCE[dtype]
    scale = expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale)


def _traces(network: Any, compiled: bool) -> list[str]:
    """What is left of ours on a network's modules."""
    left = ["_compiled_call_impl"] if "_compiled_call_impl" in vars(network) and not compiled else []
    for module in network.modules():
        for name, value in vars(module).items():
            if type(getattr(value, "__self__", value)).__module__.startswith("sostenuto"):
                left.append(name)
    return left


class SamplingMachine(RuleBasedStateMachine):
    """The rules."""

    may_compile = False

    @initialize()
    def begin(self) -> None:
        self.setup = Setup()

    @property
    def enabled(self) -> bool:
        return self.setup.handle is not None

    @invariant()
    def counted(self) -> None:
        COUNTS["steps"] += 1

    @invariant()
    def nothing_is_left_behind(self) -> None:
        setup = getattr(self, "setup", None)
        if setup is not None and not self.enabled:
            assert not _traces(setup.network, setup.compiled)

    @rule(generation=GENERATIONS)
    def generate(self, generation: Generation) -> None:
        if not generation.thread:
            self.setup.generate(generation)
            return
        _run_threads(lambda: self.setup.generate(generation))
        COUNTS["generations in another thread"] += 1

    @rule(generation=GENERATIONS, other=GENERATIONS, recipe=RECIPES)
    def two_networks_in_two_threads(self, generation: Generation, other: Generation, recipe: Recipe) -> None:
        second = Setup()
        second.enable(recipe)
        _run_threads(lambda: self.setup.generate(generation), lambda: second.generate(other))
        second.disable()
        COUNTS["pairs of generations at the same time"] += 1

    @precondition(lambda self: not self.enabled)
    @rule(recipe=RECIPES)
    def enable(self, recipe: Recipe) -> None:
        if self.setup.compiled and recipe.threshold is not None:
            with pytest.raises(sostenuto.MethodError, match="compiled"):
                self.setup.enable(recipe)
            COUNTS["refusals that left everything as it was"] += 1
            return
        self.setup.enable(recipe)

    @precondition(lambda self: self.enabled)
    @rule()
    def disable(self) -> None:
        self.setup.disable()

    @rule(recipe=RECIPES)
    def a_refused_enable_changes_nothing(self, recipe: Recipe) -> None:
        before = {name: dict(vars(module)) for name, module in self.setup.network.named_modules()}
        if self.enabled:
            with pytest.raises(sostenuto.AlreadyEnabledError):
                sostenuto.enable(self.setup.pipes[0], recipe.method)
        else:
            for method in (sostenuto.DeltaDiT(2, 0, BLOCKS + 1), sostenuto.DeepCache()):
                with pytest.raises((sostenuto.MethodError, sostenuto.AnatomyError)):
                    sostenuto.enable(self.setup.pipes[0], method)
        assert {name: dict(vars(module)) for name, module in self.setup.network.named_modules()} == before
        COUNTS["refusals that left everything as it was"] += 1

    @rule(pickled=st.booleans(), stays=st.booleans())
    def copy(self, pickled: bool, stays: bool = False) -> None:
        """The copy is plain, also that of an enabled network, which stays in use or gives way to it."""
        make = (lambda network: pickle.loads(pickle.dumps(network))) if pickled else copy.deepcopy
        if self.setup.offloaded:  # accelerate's hooks can't be copied
            self.setup.switch_offloading()
        twin = make(self.setup.network)
        assert not _traces(twin, compiled=False)
        if self.enabled and stays:
            COUNTS["copies of an enabled network"] += 1
            return
        self.setup.disable()
        self.setup.replace_network(twin)
        self.setup.compiled = False
        COUNTS["copies"] += 1

    @precondition(lambda self: not self.setup.compiled)
    @rule(dtype=st.sampled_from(DTYPES))
    def move_dtype(self, dtype: torch.dtype) -> None:
        if self.setup.offloaded:  # the weights are on no device then
            self.setup.switch_offloading()
        self.setup.network.float().to(dtype)
        self.setup.naive.network.load_state_dict(self.setup.network.state_dict())
        self.setup.naive.network.to(dtype)
        self.setup.naive.network.load_state_dict(self.setup.network.state_dict())
        self.setup.dtype = dtype
        COUNTS["moves of dtype"] += 1

    @rule(name=st.sampled_from(sorted(SCHEDULERS)), second=st.booleans())
    def swap_scheduler(self, name: str, second: bool) -> None:
        self.setup.pipes[second].scheduler = SCHEDULERS[name]()
        COUNTS["schedulers swapped"] += 1

    @precondition(lambda self: self.enabled and not self.setup.compiled)
    @rule()
    def another_thread_in_the_midst_of_a_call_is_refused(self) -> None:
        """The call under way goes on; what it had kept is its own."""
        setup, refused = self.setup, []
        arguments = torch.zeros(1, 2, 8, 8, dtype=setup.dtype), torch.zeros(1), torch.tensor([1])

        def intrude(*_: Any) -> None:
            def call() -> None:
                with pytest.raises(sostenuto.EngineError, match="one thread at a time"):
                    setup.network(*arguments)
                refused.append(1)

            _run_threads(call)
            hook.remove()

        hook = setup.network.pos_embed.register_forward_pre_hook(intrude)
        generation = Generation(
            3, "none", (0, 0), frozenset(), 1, 8, 0, None, None, False, False, False, True, False, False
        )
        setup.generate(generation)
        hook.remove()
        COUNTS["calls refused"] += len(refused)

    @precondition(lambda self: self.may_compile and not self.enabled)
    @rule()
    def compile(self) -> None:
        if self.setup.offloaded:
            self.setup.switch_offloading()
        if self.setup.compiled:
            self.setup.replace_network(copy.deepcopy(self.setup.network))  # a copy is not compiled
        else:
            torch._dynamo.reset()
            self.setup.network.compile(backend="aot_eager")
            COUNTS["compilations"] += 1
        self.setup.compiled = not self.setup.compiled

    def teardown(self) -> None:
        if hasattr(self, "setup"):
            self.setup.disable()


class CompilingMachine(SamplingMachine):
    """The same, and the network may be compiled."""

    may_compile = True


def _run_threads(*tasks: Any) -> None:
    """Run functions at the same time; the first error of them is raised here."""
    errors: list[BaseException] = []

    def guarded(task: Any) -> None:
        try:
            task()
        except BaseException as error:  # raised again below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
