"""The promises of the engine, each against the stock model or the independent oracle."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sostenuto
from conftest import build_tiny, sample_loop
from oracle import naive_forward
from sostenuto import (
    FORA,
    AlreadyEnabledError,
    AnatomyError,
    CacheTable,
    EBCache,
    EngineError,
    EpsilonScaling,
    MethodError,
    NoCache,
    StepState,
    TableError,
    ToCa,
)

C, A, M, B = StepState
STATES = (C, B, A, C, M, B, C)


def leftovers(model):
    return [
        (name, key)
        for name, module in model.named_modules()
        for key in vars(module)
        if "sostenuto" in key or key in ("forward", "_compiled_call_impl")
    ]


def run_oracle(model, scheduler, skip, num_steps, order, separate=False, **kwargs):
    """The sampling loop on the naive forward: same loop, other network code."""
    features = {}

    class Naive:
        def __call__(self, latents, timestep, labels):
            step = [float(t) for t in scheduler.timesteps].index(float(timestep[0]))
            which = features.setdefault("uncond" if separate and int(labels[0]) == 10 else "cond", {})
            return type(
                "Out", (), {"sample": naive_forward(model, latents, timestep, labels, skip, which, step, order)}
            )

    return sample_loop(Naive(), scheduler, num_steps, separate_guidance=separate, **kwargs)


@pytest.mark.parametrize("separate", [False, True])
def test_computing_everything_is_bit_identical_to_the_stock_model(tiny, scheduler, separate):
    stock, _ = sample_loop(tiny, scheduler, separate_guidance=separate)
    with sostenuto.enable(tiny, "none", scheduler=scheduler) as handle:
        cached, _ = sample_loop(tiny, scheduler, separate_guidance=separate)
        assert handle.stats.ideal_speedup == 1.0
    assert torch.equal(stock, cached)


def test_disabling_restores_output_and_leaves_no_attribute(tiny, scheduler):
    stock, _ = sample_loop(tiny, scheduler)
    handle = sostenuto.enable(tiny, FORA(2), scheduler=scheduler)
    changed, _ = sample_loop(tiny, scheduler)
    handle.disable()
    again, _ = sample_loop(tiny, scheduler)
    assert not torch.equal(stock, changed)
    assert torch.equal(stock, again)
    assert leftovers(tiny) == []
    handle.disable()
    sostenuto.disable(tiny)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("separate", [False, True])
def test_a_table_gives_what_the_naive_oracle_gives(tiny, scheduler, order, separate):
    table = CacheTable(STATES, forecast_order=order)

    def skip(site, step):
        return STATES[step] is B or STATES[step] is (A if "attn" in site else M)

    expected, _ = run_oracle(tiny, scheduler, skip, len(STATES), order, separate)
    with sostenuto.enable(tiny, EBCache(table), scheduler=scheduler) as handle:
        got, _ = sample_loop(tiny, scheduler, len(STATES), separate_guidance=separate)
        carried = handle.stats.plan
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for step, state in enumerate(STATES):
        assert [action != "compute" for action in carried[step]] == [state.skips(site) for site in handle.sites]


def test_counted_macs_are_those_of_a_real_run(tiny, scheduler):
    with sostenuto.enable(tiny, EBCache(CacheTable(STATES)), scheduler=scheduler) as handle:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            sample_loop(tiny, scheduler, len(STATES))
        assert handle.stats.macs == counter.get_total_flops() // 2
        assert handle.stats.macs_uncached > handle.stats.macs


def test_the_norm_before_a_skipped_branch_sees_one_token(tiny, scheduler):
    seen = []
    tiny.transformer_blocks[1].norm3.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    original = tiny.transformer_blocks[1].norm3.forward
    tiny.transformer_blocks[1].norm3.forward = lambda x: (seen.append(x.shape[1]), original(x))[1]
    with sostenuto.enable(tiny, FORA(2, anchor="start"), scheduler=scheduler):
        sample_loop(tiny, scheduler, 2)
    assert seen == [16, 16, 16, 1]  # hook and forward of the computed step, then of the reused one
    assert "forward" in vars(tiny.transformer_blocks[1].norm3)  # a forward of the user's own is given back


def test_an_exception_inside_a_block_drops_the_state(tiny, scheduler):
    with sostenuto.enable(tiny, FORA(3), scheduler=scheduler):
        expected, _ = sample_loop(tiny, scheduler, 7, seed=5)
    calls = []
    original = tiny.transformer_blocks[2].ff.net[2].forward

    def failing(x):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return original(x)

    with sostenuto.enable(tiny, FORA(3), scheduler=scheduler) as handle:
        tiny.transformer_blocks[2].ff.net[2].forward = failing
        with pytest.raises(RuntimeError, match="out of memory"):
            sample_loop(tiny, scheduler, 7, seed=1)
        assert all(tap.slots == [] for tap in handle._mount.taps)
        got, _ = sample_loop(tiny, scheduler, 7, seed=5)
    assert torch.equal(expected, got)


def test_a_site_that_a_call_goes_around_is_an_error(tiny, scheduler):
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler):
        tiny.transformer_blocks[1].forward = lambda hidden_states, **_: hidden_states
        with pytest.raises(EngineError, match=r"never reached transformer_blocks\.1\.attn1"):
            sample_loop(tiny, scheduler, 4)


def test_a_network_that_writes_into_a_reused_output_is_refused(tiny, scheduler):
    block = tiny.transformer_blocks[0]
    with sostenuto.enable(tiny, FORA(4, anchor="start"), scheduler=scheduler):
        tapped = block.ff.forward
        block.ff.forward = lambda x: tapped(x).add_(1)
        with pytest.raises(EngineError, match="writes into"):
            sample_loop(tiny, scheduler, 4)


def test_one_module_at_two_sites_is_refused(tiny, scheduler):
    tiny.transformer_blocks[1].ff = tiny.transformer_blocks[0].ff
    with pytest.raises(AnatomyError, match="one branch only"):
        sostenuto.enable(tiny, "none", scheduler=scheduler)


def test_a_compilation_made_while_enabled_survives_disabling(tiny, scheduler):
    stock, _ = sample_loop(tiny, scheduler, 3)
    handle = sostenuto.enable(tiny, FORA(2), scheduler=scheduler)
    tiny.compile(backend="eager")
    handle.disable()
    assert tiny._compiled_call_impl is not None
    again, _ = sample_loop(tiny, scheduler, 3)
    assert torch.equal(stock, again)


def test_state_is_freed_after_its_last_reader_and_peak_is_as_predicted(tiny, scheduler):
    with sostenuto.enable(tiny, EBCache(CacheTable(STATES, forecast_order=1)), scheduler=scheduler) as handle:
        assert handle.predicted_cache_bytes is None
        sample_loop(tiny, scheduler, len(STATES))
        assert handle.stats.cache_bytes_peak == handle.predicted_cache_bytes == 6 * 2 * (2 * 16 * 32 * 4)
        assert all(state.num_bytes == 0 for state in handle._passes.values())


def test_max_cache_bytes_computes_the_last_sites_instead(tiny, scheduler):
    one = 2 * 16 * 32 * 4
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler, max_cache_bytes=4 * one) as handle:
        sample_loop(tiny, scheduler)
        assert handle.stats.cache_bytes_peak == 4 * one
        assert handle.stats.plan[2] == ["reuse"] * 4 + ["compute"] * 2


def test_a_dropped_model_is_collected_though_still_enabled(scheduler):
    model = build_tiny()
    sostenuto.enable(model, FORA(2), scheduler=scheduler)
    sample_loop(model, scheduler)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_enabling_twice_is_refused_and_the_first_stays(tiny, scheduler):
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler) as handle:
        with pytest.raises(AlreadyEnabledError, match="disable"):
            sostenuto.enable(tiny, "none", scheduler=scheduler)
        assert handle.enabled


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("stop_at", [None, 3])
def test_a_copy_of_an_enabled_model_is_the_plain_one_and_the_original_goes_on(tiny, scheduler, how, stop_at, caplog):
    stock = sample_loop(tiny, scheduler)[0]
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler) as handle:
        expected = sample_loop(tiny, scheduler)[0]
        if stop_at is None:
            sample_loop(tiny, scheduler)
        else:
            with pytest.raises(KeyboardInterrupt):
                sample_loop(tiny, scheduler, stop_at=stop_at)
        twin = how(tiny)
        assert vars(twin).keys() == vars(build_tiny()).keys()
        assert all("forward" not in vars(module) for module in twin.modules())
        assert sostenuto.engine.handle_of(twin) is None
        assert sostenuto.engine.handle_of(tiny) is handle
        assert torch.equal(sample_loop(twin, scheduler)[0], stock)
        assert torch.equal(sample_loop(tiny, scheduler)[0], expected)
    assert ("plain network" in caplog.text) == (how is copy.deepcopy)
    assert torch.equal(sample_loop(tiny, scheduler)[0], stock)


def test_attributes_that_somebody_else_put_on_the_model_stay(tiny, scheduler):
    mine, newer = object(), object()
    tiny.compile = mine
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler):
        assert tiny.compile is not mine
    assert tiny.compile is mine
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler):
        tiny.compile = newer
    assert tiny.compile is newer


def test_a_pickle_of_an_enabled_model_holds_no_second_set_of_weights(tiny, scheduler):
    size = len(pickle.dumps(tiny))
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler):
        assert len(pickle.dumps(tiny)) == pytest.approx(size, rel=0.01)
        twin, weight = pickle.loads(pickle.dumps((tiny, tiny.proj_out_2.weight)))
    assert twin.proj_out_2.weight is weight


def test_a_copy_in_the_middle_of_a_call_is_refused_and_the_call_goes_on(tiny, scheduler):
    with sostenuto.enable(tiny, FORA(2), scheduler=scheduler):
        expected, refused = sample_loop(tiny, scheduler)[0], []

        def copies(*_):
            with pytest.raises(EngineError, match="middle of a call can't be copied"):
                copy.deepcopy(tiny)
            refused.append(1)

        hook = tiny.pos_embed.register_forward_pre_hook(copies)
        assert torch.equal(sample_loop(tiny, scheduler)[0], expected)
        hook.remove()
    assert refused


class Nothing(torch.nn.Module):
    def forward(self, x, timestep):
        return x


@pytest.mark.parametrize(
    ("target", "method", "error", "words"),
    [
        (lambda m: Nothing(), "none", AnatomyError, "register_anatomy"),
        (lambda m: object(), "none", AnatomyError, "no transformer"),
        (lambda m: m, "nonsense", MethodError, "no method 'nonsense'; there are"),
        (lambda m: m, "EBCache", MethodError, r"no method 'EBCache' \(did you mean 'eb'\?\)"),
        (lambda m: m, sostenuto.FORA, MethodError, r"make one, FORA\(\)"),
        (lambda m: m, 3, MethodError, "method object"),
        (lambda m: m, "eb", MethodError, "calibrate"),
        (
            lambda m: m,
            EBCache(CacheTable(STATES, model={"fingerprint": "0" * 64, "class": "Other"})),
            TableError,
            "made for Other",
        ),
        (
            lambda m: m,
            EBCache(CacheTable(STATES, model={"class": "PixArtTransformer2DModel"})),
            TableError,
            "made for PixArtTransformer2DModel, this is a DiTTransformer2DModel: calibrate",
        ),
        (
            lambda m: m,
            EBCache(CacheTable(STATES, model={"class": "DiTTransformer2DModel", "num_blocks": 28})),
            TableError,
            "made for 28 blocks, this DiTTransformer2DModel has 3: calibrate",
        ),
        (lambda m: m, EBCache(CacheTable(STATES, scheduler={"class": "DDIMScheduler"})), TableError, "DDIMScheduler"),
    ],
)
def test_a_refused_enable_leaves_the_model_as_it_was(tiny, scheduler, target, method, error, words):
    with pytest.raises(error, match=words) as caught:
        sostenuto.enable(target(tiny), method, scheduler=scheduler)
    assert isinstance(caught.value, sostenuto.SostenutoError)
    assert leftovers(tiny) == []


class Finetuned(DiTTransformer2DModel):
    """What users, and wrappers such as FSDP's, make of a class."""


def test_a_table_for_a_class_and_depth_also_serves_subclasses_and_compiled_networks(tiny, scheduler):
    method = EBCache(CacheTable(STATES, model={"class": "DiTTransformer2DModel", "num_blocks": 3}))
    method.table.check(torch.compile(tiny), scheduler)
    tiny.__class__ = Finetuned
    sostenuto.enable(tiny, method, scheduler=scheduler).disable()


def test_a_bare_denoiser_without_scheduler_is_refused(tiny):
    with pytest.raises(MethodError, match="scheduler="):
        sostenuto.enable(tiny, "none")


def test_a_table_of_another_length_is_refused_at_the_first_step_with_the_remedy(tiny, scheduler):
    with (
        sostenuto.enable(tiny, EBCache(CacheTable(STATES)), scheduler=scheduler),
        pytest.raises(TableError, match=r"resample\(5\)"),
    ):
        sample_loop(tiny, scheduler, 5)
    assert leftovers(tiny) == []


def test_noise_scale_multiplies_noise_and_leaves_learned_variance_alone(scheduler):
    model = build_tiny(out_channels=4)
    _, stock = sample_loop(model, scheduler, 1)
    with sostenuto.enable(model, EpsilonScaling(1 / 0.9), scheduler=scheduler):
        _, scaled = sample_loop(model, scheduler, 1)
    torch.testing.assert_close(scaled[0][:, :2], stock[0][:, :2] * 0.9)
    assert torch.equal(scaled[0][:, 2:], stock[0][:, 2:])


def test_scaling_what_holds_no_known_noise_is_refused(tiny):
    unknown = DDIMScheduler()
    unknown.register_to_config(prediction_type="trigflow")
    with (
        sostenuto.enable(tiny, EpsilonScaling(1.01), scheduler=unknown),
        pytest.raises(MethodError, match="expects trigflow"),
    ):
        sample_loop(tiny, unknown, 2)
    with sostenuto.enable(tiny, EpsilonScaling(1.0) | FORA(2), scheduler=unknown):
        unknown.set_timesteps(2)
        with torch.no_grad():
            tiny(torch.randn(1, 2, 8, 8), unknown.timesteps[:1], torch.tensor([1]))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), "x", True, (), [0.9, None]])
def test_a_noise_scale_that_is_no_factor_is_refused(scale):
    with pytest.raises(MethodError, match="eps_scale"):
        EBCache(CacheTable(STATES), eps_scale=scale)
    with pytest.raises(MethodError):
        EpsilonScaling(scale)


def test_branches_that_the_reused_stack_skips_are_counted(tiny, scheduler):
    whole = CacheTable((C, B), fill="stack")
    branches = len(sostenuto.inspect(tiny))
    with sostenuto.enable(tiny, EBCache(whole), scheduler=scheduler) as handle:
        sample_loop(tiny, scheduler, 2)
        counts = {"compute": branches + 1, "reuse": 1, "forecast": 0, "partial": 0, "skip": branches}
        assert handle.stats.actions == counts


def test_factors_of_another_number_of_steps_are_refused_when_enabled_and_numpy_s_numbers_are_numbers(tiny, scheduler):
    with pytest.raises(MethodError, match="2"):
        sostenuto.enable(tiny, EBCache(CacheTable(STATES), eps_scale=(1.0, 0.9)), scheduler=scheduler)
    sostenuto.enable(tiny, EBCache(CacheTable(STATES), eps_scale=np.float32(0.9)), scheduler=scheduler).disable()


def test_combinations_apply_both_parts_or_are_refused(tiny, scheduler):
    with sostenuto.enable(tiny, FORA(2) | EpsilonScaling(1.1), scheduler=scheduler):
        both, _ = sample_loop(tiny, scheduler)
    with sostenuto.enable(tiny, EBCache(_fora_table(6), eps_scale=1 / 1.1), scheduler=scheduler):
        table, _ = sample_loop(tiny, scheduler)
    torch.testing.assert_close(both, table)
    with pytest.raises(MethodError, match="FORA skips branches of every kind"):
        FORA(2) | EBCache(CacheTable(STATES))
    with pytest.raises(MethodError, match="scales the noise"):
        EpsilonScaling(1.1) | EBCache(CacheTable(STATES), eps_scale=0.9)


def _fora_table(steps):
    return CacheTable(tuple(C if p == 0 or (steps - 1 - p) % 2 == 0 else B for p in range(steps)))


@pytest.mark.parametrize(
    ("steps", "interval", "anchor", "expected"),
    [
        (10, 3, "end", "1001001001"),
        (9, 3, "end", "101001001"),
        (10, 3, "start", "1001001001"),
        (8, 3, "start", "10010010"),
    ],
)
def test_fora_computes_every_interval_from_the_end_it_is_anchored_at(
    tiny, scheduler, steps, interval, anchor, expected
):
    with sostenuto.enable(tiny, FORA(interval, anchor), scheduler=scheduler) as handle:
        sample_loop(tiny, scheduler, steps)
        assert "".join("1" if row[0] == "compute" else "0" for row in handle.stats.plan) == expected


def test_a_plain_network_of_ones_own_is_cached_after_registering_it(scheduler):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_a, self.norm_b = torch.nn.LayerNorm(8), torch.nn.LayerNorm(8)
            self.mix, self.mlp = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x):
            x = x + self.mix(self.norm_a(x))
            return x + self.mlp(self.norm_b(x))

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Block(), Block()])

        def forward(self, tokens, t):
            tokens = tokens + t[:, None, None] / 1000
            for layer in self.layers:
                tokens = layer(tokens)
            return tokens

    kinds = sostenuto.SiteKind
    branches = (
        sostenuto.Branch(kinds.SELF_ATTENTION, "mix", front=("norm_a",)),
        sostenuto.Branch(kinds.MLP, "mlp", front=("norm_b",)),
    )
    sostenuto.register_anatomy(Own, sostenuto.Anatomy((sostenuto.BlockList("layers", branches),), timestep="t"))
    model = Own()
    scheduler.set_timesteps(4)
    with torch.no_grad(), sostenuto.enable(model, FORA(2, anchor="start"), scheduler=scheduler) as handle:
        for t in scheduler.timesteps:
            model(torch.randn(1, 5, 8), t[None])
        assert handle.stats.actions == {"compute": 8, "reuse": 8, "forecast": 0, "partial": 0}


def test_verify_proves_the_tiny_model_and_names_a_site_whose_anatomy_is_wrong(tiny, scheduler):
    def sample(model, generator, num_inference_steps):
        return sample_loop(model, scheduler, num_inference_steps)

    proved = sostenuto.verify(tiny, FORA(2), sample, scheduler=scheduler)
    assert {name: proved[name] for name in ("sites", "steps", "passes")} == {"sites": 6, "steps": 4, "passes": 1}
    assert 0 < proved["macs"]["stack"] <= proved["macs"]["branches"] < proved["macs"]["mlp"] < 1

    class Wrong(type(tiny)):
        pass

    kinds = sostenuto.SiteKind
    sostenuto.register_anatomy(
        Wrong,
        sostenuto.Anatomy(
            (sostenuto.BlockList("transformer_blocks", (sostenuto.Branch(kinds.MLP, "ff", front=("norm9",)),)),)
        ),
    )
    tiny.__class__ = Wrong
    with pytest.raises(sostenuto.AnatomyError, match="no submodule"):
        sostenuto.verify(tiny, NoCache(), sample, scheduler=scheduler)
    assert leftovers(tiny) == []


# --- a step that computes everything and keeps nothing ----------------------------------------------------------------

IDLE_STEPS = EBCache(CacheTable((StepState.COMPUTE,) * 4 + (StepState.REUSE_BOTH,) * 2))  # the fourth one is read


def test_a_step_that_computes_everything_and_keeps_nothing_runs_the_modules_own_forward(tiny, scheduler):
    branch, replaced = tiny.transformer_blocks[1].ff, []
    expected = cached(tiny, scheduler)
    branch.net.register_forward_pre_hook(lambda *_: None)  # of a module within, so that nothing is around the branch
    tiny.pos_embed.register_forward_pre_hook(lambda *_: replaced.append("forward" in vars(branch)))
    with sostenuto.enable(tiny, IDLE_STEPS, scheduler=scheduler):
        assert torch.equal(sample_loop(tiny, scheduler)[0], expected)
        sample_loop(tiny, scheduler)
        # The first call of a generation tells which sites are reached; from the fourth on outputs are kept and reused.
        # What is decided is carried out before the network begins.
        assert replaced == [True, False, False, True, True, True] * 2
    assert "forward" not in vars(branch)


def cached(model, scheduler):
    """The latents where every tap stands at every step."""
    naive, table = copy.deepcopy(model), IDLE_STEPS
    with sostenuto.enable(naive, table, scheduler=scheduler) as handle:
        handle._mount.executor._step_aside = lambda: None
        handle._mount.executor._staying = handle._mount.taps
        return sample_loop(naive, scheduler)[0]


def test_meanwhile_a_call_that_the_engine_does_not_see_is_an_error(tiny, scheduler):
    with sostenuto.enable(tiny, "none", scheduler=scheduler) as handle:
        with pytest.raises(KeyboardInterrupt):
            sample_loop(tiny, scheduler, stop_at=3)
        with pytest.raises(EngineError, match="outside of a denoiser call"):
            tiny.forward(torch.randn(2, 2, 8, 8), torch.tensor([1, 1]), torch.tensor([0, 1]))
        copy.deepcopy(tiny)
        assert handle.stats.macs == handle.stats.macs_uncached > 0
    assert all("forward" not in vars(module) for module in tiny.modules())


@pytest.mark.parametrize("again", [True, False])
def test_a_forward_that_somebody_replaces_meanwhile_is_kept_and_taken_in_by_the_next_generation(tiny, scheduler, again):
    expected, calls = cached(tiny, scheduler), []
    branch = tiny.transformer_blocks[1].ff
    own = branch.forward

    def theirs(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    with sostenuto.enable(tiny, IDLE_STEPS, scheduler=scheduler):
        with pytest.raises(KeyboardInterrupt):
            sample_loop(tiny, scheduler, stop_at=3)
        branch.forward = theirs
        if again:
            assert torch.equal(sample_loop(tiny, scheduler)[0], expected)
            assert len(calls) == 4  # not where the branch is reused
        else:
            with torch.no_grad(), pytest.raises(EngineError, match="between generations"):
                tiny(torch.randn(2, 2, 8, 8), scheduler.timesteps[3].expand(2), torch.tensor([0, 1]))
    assert branch.forward is theirs


def test_a_method_that_looks_into_a_network_is_refused_as_long_as_a_part_of_it_is_compiled(tiny, scheduler):
    handle = sostenuto.enable(tiny, ToCa(2, 0.5, selection="attention"), scheduler=scheduler)
    sample_loop(tiny, scheduler)
    tiny.transformer_blocks[1].compile(backend="eager")
    for _ in range(2):  # also where a server tries again
        with pytest.raises(MethodError, match="uncompiled"):
            sample_loop(tiny, scheduler)
    handle.disable()
    with pytest.raises(MethodError, match="uncompiled"):
        _ = handle.stats  # counts a generation, with what looks into the network in place
    assert not [module for module in tiny.modules() if "forward" in vars(module)]
