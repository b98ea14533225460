"""The ComfyUI pack: its nodes are what ComfyUI expects, and a patched model's sampling does what the method says."""

import importlib.util
import inspect as python_inspect
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import comfy_stub
import sostenuto
from comfy_stub import (
    CONST,
    EPS,
    BaseModel,
    Flux,
    ModelPatcher,
    WanModel,
    build,
    generate,
    sample_heun,
    sampler_between,
)
from sostenuto import BlockList
from sostenuto.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from sostenuto.comfyui.caching import Caching, patched, wrapper_of
from sostenuto.comfyui.networks import teach

PACK = Path(__file__).parents[1] / "comfyui" / "comfyui-sostenuto"
CACHE, CONFIG, CALIBRATE, REPORT = (
    NODE_CLASS_MAPPINGS[f"Sostenuto{name}"]() for name in ("Cache", "Config", "Calibrate", "Report")
)


def cached(model, method, limit=0, **parameters):
    return CACHE.apply(model, method, json.dumps(parameters), limit)[0]


def is_untouched(model):
    network = model.model.diffusion_model
    own = [module for module in network.modules() if {"forward", "_compiled_call_impl"} & vars(module).keys()]
    return not own and "_sostenuto_handle" not in vars(network)


def report_of(model):
    return REPORT.report(model, {})[1]


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_a_node_is_what_comfyui_expects(name):
    node = NODE_CLASS_MAPPINGS[name]
    inputs = node.INPUT_TYPES()
    assert set(inputs) <= {"required", "optional", "hidden"}
    names = [each for group in inputs.values() for each in group]
    taken = python_inspect.signature(getattr(node, node.FUNCTION)).parameters
    assert list(taken) == ["self", *names]
    assert isinstance(node.RETURN_TYPES, tuple)
    assert all(isinstance(kind, str) for kind in node.RETURN_TYPES)
    assert len(getattr(node, "RETURN_NAMES", node.RETURN_TYPES)) == len(node.RETURN_TYPES)
    assert node.CATEGORY
    assert NODE_DISPLAY_NAME_MAPPINGS[name]
    for kind, *options in (spec for group in inputs.values() for spec in group.values()):
        assert isinstance(kind, (str, list))
        assert all(isinstance(option, dict) for option in options)
        if isinstance(kind, list):
            assert options[0]["default"] in kind
    validate = getattr(node, "VALIDATE_INPUTS", None)
    assert validate is None or set(python_inspect.signature(validate).parameters) <= set(names)


def test_the_folder_for_custom_nodes_loads_by_its_path():
    spec = importlib.util.spec_from_file_location("custom_nodes.pack", PACK / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS is NODE_CLASS_MAPPINGS


def test_the_example_workflow_uses_the_nodes_as_they_are():
    workflow = json.loads((PACK / "workflows" / "flux-fora.json").read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    ours = [node for node in nodes.values() if node["type"].startswith("Sostenuto")]
    assert {node["type"] for node in ours} == {"SostenutoCache", "SostenutoReport"}
    for node in ours:
        kind = NODE_CLASS_MAPPINGS[node["type"]]
        required = kind.INPUT_TYPES()["required"]
        sockets = [name for name, (kind_of, *_) in required.items() if kind_of in ("MODEL", "LATENT")]
        assert [given["name"] for given in node["inputs"]] == sockets
        assert [made["type"] for made in node["outputs"]] == list(kind.RETURN_TYPES)
        values = dict(
            zip([name for name in required if name not in sockets], node.get("widgets_values", []), strict=True)
        )
        assert not values or kind.VALIDATE_INPUTS(**values) is True
    for link, source, out_slot, target, in_slot, kind in workflow["links"]:
        assert link in nodes[source]["outputs"][out_slot]["links"]
        assert nodes[target]["inputs"][in_slot]["link"] == link
        assert nodes[source]["outputs"][out_slot]["type"] == kind
        assert nodes[target]["inputs"][in_slot]["type"] in (kind, "*")


@pytest.mark.parametrize(
    ("parameters", "words"),
    [("{", "no JSON"), ("[3]", "JSON object"), ('{"n": 3}', "no parameter 'n'"), ('{"interval": 0}', "interval")],
)
def test_wrong_widgets_are_told_before_anything_runs(parameters, words):
    assert words in CACHE.VALIDATE_INPUTS("fora", parameters, 0)
    with pytest.raises(sostenuto.SostenutoError, match=words):
        CACHE.apply(build(), "fora", parameters)
    assert CACHE.VALIDATE_INPUTS("fora", "", 0) is True
    linked = [
        CACHE.VALIDATE_INPUTS("fora", None, 0),
        CACHE.VALIDATE_INPUTS(None, "{}", 0),
        CONFIG.VALIDATE_INPUTS(None),
    ]
    linked += [CACHE.VALIDATE_INPUTS("fora", "{}", None), CALIBRATE.VALIDATE_INPUTS("eb", None, 1, "a")]
    assert linked == [True] * 5  # what another node gives isn't there yet


def test_a_file_s_node_runs_anew_when_the_file_changes(tmp_path):
    path = tmp_path / "c.json"
    assert "can't be read" in CONFIG.VALIDATE_INPUTS(str(path))
    before = CONFIG.IS_CHANGED(path=str(path), model=None)
    path.write_text(json.dumps({"method": [{"name": "fora", "interval": 2}, "forecast"]}))
    second = CONFIG.IS_CHANGED(path=str(path), model=None)
    assert second != before
    table = path.with_name("measured.json")
    path.write_text(json.dumps({"method": {"name": "eb", "table": table.name}}))
    seen = {second, CONFIG.IS_CHANGED(path=str(path), model=None)}
    for text in ("{}", "[]"):  # what was measured lies beside it
        table.write_text(text)
        seen.add(CONFIG.IS_CHANGED(path=str(path), model=None))
    assert len(seen) == 4
    assert CONFIG.IS_CHANGED(path=None, model=None) == ""
    path.write_text(json.dumps({"method": [{"name": "fora", "interval": 2}, "forecast"]}))
    assert CONFIG.VALIDATE_INPUTS(str(path)) is True
    model = CONFIG.apply(build(), str(path))[0]
    generate(model)
    assert "forecast" in report_of(model)


# --- sampling ---------------------------------------------------------------------------------------------------------


class Stale(nn.Module):
    """A block of Flux by hand: at some steps it adds what it added at the last other one."""

    def __init__(self, block, clock):
        super().__init__()
        self.block, self.clock, self.kept = block, clock, {}

    def forward(self, *args, transformer_options, **kwargs):
        names = ("img", "txt") if "img" in kwargs else ("x",)
        streams = [kwargs[name] for name in names] if args == () else [args[0]]
        step, key = self.clock(transformer_options["sigmas"]), tuple(transformer_options["cond_or_uncond"])
        if step in self.clock.skipped:
            out = [stream + kept for stream, kept in zip(streams, self.kept[key], strict=True)]
        else:
            before = [stream.clone() for stream in streams]
            out = self.block(*args, transformer_options=transformer_options, **kwargs)
            out = list(out) if isinstance(out, tuple) else [out]
            self.kept[key] = [o - b for o, b in zip(out, before, strict=True)]
            out = [o.clone() for o in out]
        return tuple(out) if len(out) > 1 else out[0]


def stale_flux(skipped, model_sampling=CONST, calls_each=None):
    """Flux by hand, which is stale at some of its steps: told from eight noise levels, or by counting calls."""
    model = build(Flux, model_sampling)
    sigmas, calls = torch.linspace(1, 0, 9), []

    def clock(sigma):
        return int((sigmas - sigma[0]).abs().argmin()) if calls_each is None else (len(calls) - 1) // calls_each

    clock.skipped = skipped
    network = model.model.diffusion_model
    network.register_forward_pre_hook(lambda *_: calls.append(None))
    for name in ("double_blocks", "single_blocks"):
        setattr(network, name, nn.ModuleList(Stale(block, clock) for block in getattr(network, name)))
    return model


@pytest.mark.parametrize("batched", [True, False], ids=["one-batch", "one-by-one"])
def test_the_blocks_of_flux_are_reused_as_by_hand(batched):
    model = cached(build(Flux), "fora", interval=3, anchor="start")
    result, guider = generate(model, batched=batched)
    expected, _ = generate(stale_flux({1, 2, 4, 5, 7}), batched=batched)
    stock, _ = generate(build(Flux))
    torch.testing.assert_close(result, expected)
    assert (result - stock).abs().max() > 0.01
    assert guider.calls == 8 * (2 - batched)
    # 8 steps, 3 computed, 5 blocks.
    assert report_of(model).startswith("8 steps, ")
    assert f"{15 * (2 - batched)} compute, {25 * (2 - batched)} reuse" in report_of(model)


def test_what_a_controlnet_adds_between_blocks_is_that_of_the_step():
    model = cached(build(Flux), "fora", interval=2, anchor="start")
    result, _ = generate(model, controlled=True)
    expected, _ = generate(stale_flux({1, 3, 5, 7}), controlled=True)
    torch.testing.assert_close(result, expected)
    assert not torch.allclose(result, generate(model)[0])


def test_nothing_changes_with_no_method_and_nothing_is_left_behind():
    model = build(Flux)
    stock, _ = generate(model)
    idle = patched(model, Caching(sostenuto.Config(sostenuto.NoCache())))
    assert torch.equal(generate(idle)[0], stock)
    caching = cached(model, "fora")
    assert not torch.equal(generate(caching)[0], stock)
    assert is_untouched(model)
    assert torch.equal(generate(model)[0], stock)  # the clones share their network


@pytest.mark.parametrize(
    ("network", "method", "parameters"),
    [
        (WanModel, "taylorseer", {"interval": 3, "order": 1}),
        (WanModel, "ab", {"warmup": 2, "interval": 3}),
        (WanModel, "duca", {}),
        (WanModel, "toca", {}),
        (Flux, "taylorseer", {"interval": 3, "order": 1}),
        (Flux, "ab", {"warmup": 2, "interval": 3}),
        (Flux, "delta-dit", {}),
        (Flux, "dbcache", {"front_blocks": 1, "warmup": 2, "threshold": 10.0, "max_consecutive": 2}),
        (Flux, "teacache", {"threshold": 10.0}),
        (Flux, "magcache", {"ratios": [1.0] * 8, "retention": 0.1}),
    ],
)
def test_methods_skip_and_the_image_stays_near(network, method, parameters):
    model = cached(build(network), method, **parameters)
    stock, _ = generate(build(network))
    result, _ = generate(model)
    assert "forecast" in report_of(model) or "reuse" in report_of(model)
    assert float(report_of(model).split("steps, ")[1].split("x")[0]) > 1.05
    gap = (result - stock).abs().mean() / stock.abs().mean()
    assert 0 < gap < 0.5
    assert is_untouched(model)


def test_a_signal_sees_what_blocks_in_front_add_although_they_add_in_place():
    model = cached(build(Flux), "dbcache", front_blocks=1, warmup=1, threshold=1e-6)
    stock, _ = generate(build(Flux))
    assert torch.equal(generate(model)[0], stock)  # the residual changes, so nothing is ever skipped


def test_blocks_that_write_in_place_undeclared_are_handled_or_refused():
    network = build(Flux).model.diffusion_model
    places = (BlockList("double_blocks", (BLOCK,), ("img", "txt")), BlockList("single_blocks", (BLOCK,), ("x",)))
    model = ModelPatcher(BaseModel(Undeclared(), CONST()))
    sostenuto.register_anatomy(Undeclared, sostenuto.Anatomy(places))
    model.model.diffusion_model.load_state_dict(network.state_dict())
    expected, _ = generate(cached(build(Flux), "fora", interval=2))
    assert torch.equal(generate(cached(model, "fora", interval=2))[0], expected)  # inference tensors don't tell
    with (
        pytest.raises(sostenuto.EngineError, match="in_place=True"),
        sostenuto.enable(model.model.diffusion_model, "fora", scheduler=PLAIN),
    ):
        sample_plain(model.model.diffusion_model, torch.Generator(), 3)


BLOCK = sostenuto.Branch(sostenuto.SiteKind.FUSED, "")


class Undeclared(Flux):
    """The same blocks, of which nobody said that they write into their streams."""


def test_a_block_is_its_only_branch_and_fused():
    for wrong in (
        lambda: sostenuto.Branch(sostenuto.SiteKind.MLP, ""),
        lambda: sostenuto.Branch(sostenuto.SiteKind.FUSED, "", front=("norm",)),
        lambda: BlockList("blocks", (BLOCK, sostenuto.Branch(sostenuto.SiteKind.MLP, "ff"))),
    ):
        with pytest.raises(sostenuto.AnatomyError, match="the block itself"):
            wrong()


def test_branches_of_a_network_that_has_them_as_modules_are_sites():
    network = build(WanModel).model.diffusion_model
    teach(network)
    kinds = [site.kind.value for site in sostenuto.inspect(network)]
    assert kinds == ["self-attention", "cross-attention", "mlp"] * 3
    proved = sostenuto.verify(network, "fora", sample_plain, scheduler=PLAIN, num_inference_steps=2)
    assert proved["sites"] == 9


def test_what_the_pack_knows_of_flux_is_proved_exact():
    network = build(Flux).model.diffusion_model
    teach(network)
    proved = sostenuto.verify(network, "fora", sample_plain, scheduler=PLAIN, num_inference_steps=2)
    assert proved["sites"] == 5
    assert proved["macs"]["branches"] < 0.4


class PLAIN:
    timesteps = None


def sample_plain(network, generator, num_inference_steps):
    PLAIN.timesteps = torch.linspace(1, 0, num_inference_steps + 1)[:-1]
    x = torch.randn(1, 4, 8, 8, generator=generator)
    cond = comfy_stub.conditionings(type(network))[0]
    named = {"context": cond["c_crossattn"]} | {name: value for name, value in cond.items() if name == "y"}
    for t in PLAIN.timesteps:
        with torch.no_grad():
            x = x - network(x, t.expand(1), **named) / num_inference_steps


def test_noise_prediction_on_a_grid_is_cached_and_scaled():
    sigmas = torch.cat((EPS.grid[[999, 700, 500, 300, 200, 100]], torch.zeros(1)))
    stock, _ = generate(build(WanModel, EPS), sigmas=sigmas)
    model = cached(build(WanModel, EPS), "epsilon-scaling", scale=1.25)
    result, _ = generate(model, sigmas=sigmas)
    half, _ = generate(HalfNoise.build(), sigmas=sigmas)
    torch.testing.assert_close(result, half, rtol=1e-3, atol=1e-4)
    assert not torch.equal(result, stock)
    model = cached(build(WanModel, EPS), "fora", interval=2)
    generate(model, sigmas=sigmas)
    assert "6 steps" in report_of(model)


class HalfNoise(WanModel):
    """The same network, whose noise is divided by 1.25 by hand."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) / 1.25

    @staticmethod
    def build():
        return build(HalfNoise, EPS)


def odds_between(begin, end, ratio=0.5):
    """The level of a flow whose odds of noise lie between those of two, geometrically."""
    odds = (begin / (1 - begin)) ** (1 - ratio) * (end / (1 - end)) ** ratio
    return odds / (1 + odds)


def begun_below_one(begin, end, r=0.5):
    return odds_between(begin.clamp(max=0.9999), end, r)


# Of an ancestral step with η = 1 from σ to σ′ the level that it goes down to is σ′² / σ.
SECOND = {
    "heun": (None, lambda begin, end: end),
    "dpm_2": (None, lambda begin, end: (begin * end) ** 0.5),
    "dpm_2_ancestral": (None, lambda begin, end: end),
    "dpmpp_2s_ancestral": (EPS, lambda begin, end: end),
    "dpmpp_2s_ancestral of a flow": (
        CONST,
        lambda begin, end: 0.9999 if begin == 1 else odds_between(begin, end**2 / begin),
    ),
    "dpm_2_ancestral, η = 0": (None, lambda begin, end, eta: (begin * end) ** 0.5),
    "dpmpp_sde_gpu": (EPS, lambda begin, end, r: begin ** (1 - r) * end**r),
    "dpmpp_sde of a flow": (CONST, begun_below_one),
}
OPTIONS = {"dpm_2_ancestral, η = 0": {"eta": 0.0}, "dpmpp_sde_gpu": {"r": 0.25}}
FLOW_SIGMAS = torch.linspace(1, 0, 7)
GRID_SIGMAS = torch.cat((EPS.grid[[999, 700, 500, 300, 200, 100]], torch.zeros(1)))


@pytest.mark.parametrize(
    "batched", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["one-batch", "one-by-one"]
)
@pytest.mark.parametrize("model_sampling", [CONST, EPS])
@pytest.mark.parametrize("name", SECOND)
def test_of_a_sampler_of_second_order_each_call_of_the_model_is_a_step(name, model_sampling, batched):
    only, between = SECOND[name]
    if only not in (None, model_sampling):
        pytest.skip("of the other kind of noise levels")
    sampler = sampler_between(name.partition(" ")[0].strip(","), between)
    sigmas = FLOW_SIGMAS if model_sampling is CONST else GRID_SIGMAS
    if name == "dpmpp_sde of a flow":  # the sampler itself begins a little lower; its caller doesn't know
        inner, sampler = sampler, None

        def sampler(guider, sigmas, *args, **options):
            return inner(guider, torch.cat((torch.tensor([0.9999]), sigmas[1:])), *args, **options)

        sampler.__name__ = "sample_dpmpp_sde"
    options = dict(sigmas=sigmas, batched=batched, sampler_options=OPTIONS.get(name))
    model = cached(build(Flux, model_sampling), "fora", interval=2, anchor="start")
    result, guider = generate(model, sampler, **options)
    assert guider.calls == 11 * (2 - batched)
    assert report_of(model).startswith("11 steps")
    expected, _ = generate(stale_flux({1, 3, 5, 7, 9}, model_sampling, 2 - batched), sampler, **options)
    torch.testing.assert_close(result, expected)
    assert is_untouched(model)


def test_heun_itself_is_cached():
    model = cached(build(Flux), "fora", interval=2, anchor="start")
    result, guider = generate(model, sample_heun)
    expected, _ = generate(stale_flux({*range(1, 15, 2)}, calls_each=1), sample_heun)
    torch.testing.assert_close(result, expected)
    assert guider.calls == 15


def test_a_sampler_that_begins_a_little_below_the_first_level_is_followed():
    def sample(guider, sigmas, *args):
        return comfy_stub.sample_euler(guider, torch.cat((torch.tensor([0.9999]), sigmas[1:])), *args)

    sample.__name__ = "sample_dpmpp_2m_sde_gpu"
    model = cached(build(Flux), "fora")
    generate(model, sample)
    assert report_of(model).startswith("8 steps")


@pytest.mark.parametrize("batched", [True, False])
def test_a_sampler_whose_calls_cannot_be_foreseen_is_refused_in_words(batched):
    model = cached(build(Flux), "fora")
    unknown = sampler_between("someone_s_own", lambda begin, end: (begin + end) / 2)
    with pytest.raises(sostenuto.ClockError, match=r"Samplers that will do: .*euler.*heun"):
        generate(model, unknown, batched=batched)
    assert is_untouched(model)


def test_an_interrupted_sampling_leaves_nothing_behind():
    model = cached(build(Flux), "fora", interval=2)
    first, _ = generate(model)

    def interrupted(*args, **kwargs):
        def stop(step):
            if step == 3:
                raise KeyboardInterrupt

        args = (*args[:3], stop, *args[4:])
        return comfy_stub.sample_euler(*args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        generate(model, interrupted)
    assert is_untouched(model)
    assert torch.equal(generate(model)[0], first)


def test_a_second_sampling_of_the_rest_of_the_steps_begins_anew():
    model = cached(build(Flux), "fora", interval=2, anchor="start")
    sigmas = torch.linspace(1, 0, 9)
    generate(model, sigmas=sigmas[:5])
    generate(model, sigmas=sigmas[4:])
    assert report_of(model).startswith("4 steps")
    generate(model, sigmas=sigmas[:1])  # no step at all


def test_a_limit_of_memory_holds():
    # What the blocks add for both halves, in float32: 2 blocks with an image and a text stream, 3 with both in one.
    needed = 2 * 32 * 4 * (2 * (16 + 5) + 3 * (16 + 5))
    for limit, kept in ((None, needed), (needed, needed), (needed // 2, 2 * 32 * 4 * 2 * (16 + 5))):
        model = patched(build(Flux), Caching(sostenuto.Config(sostenuto.FORA(2), limit)))
        generate(model, num_steps=4)
        assert wrapper_of(model).stats.cache_bytes_peak == kept
    assert wrapper_of(cached(build(Flux), "fora", limit=3)).config.max_cache_bytes == 3 * 2**20


def test_what_cannot_work_is_refused_in_words_and_nothing_is_attached():
    for method, words in (
        ("deepcache", "DeepCache is for UNet"),
        ("eb", "no eb table ships"),
        ("l2c", "router"),
    ):
        model = cached(build(Flux), method)
        with pytest.raises(sostenuto.SostenutoError, match=words):
            generate(model)
        assert is_untouched(model)
    with pytest.raises(sostenuto.MethodError, match="a sostenuto node already"):
        cached(cached(build(Flux), "fora"), "ab")
    with pytest.raises(sostenuto.MethodError, match="update ComfyUI"):
        cached(object(), "fora")
    with pytest.raises(sostenuto.AnatomyError, match="no diffusion_model"):
        cached(comfy_stub.ModelPatcher(object()), "fora")
    assert report_of(build(Flux)) == "this model has no sostenuto node"
    assert report_of(cached(build(Flux), "fora")) == "nothing was sampled with this model yet"


# --- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [Flux, WanModel])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("smoothcache", {"alpha": 0.5, "max_lag": 1}),
        ("magcache", {}),
        ("teacache", {"degree": 1, "target_skipped": 0.4}),
        ("eb", {"target_fraction": 0.75}),
        ("feb", {}),
    ],
)
def test_what_a_sampling_measured_is_sampled_with_by_its_file(network, method, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stock, _ = generate(build(network))
    model = CALIBRATE.apply(build(network), method, json.dumps(options), 4, "mine")[0]
    result, guider = generate(model)
    if method in ("smoothcache", "magcache", "teacache"):  # the others measure on what they chose so far
        assert torch.equal(result, stock)
        assert guider.calls == 2 * 8  # two generations of two rows
    assert is_untouched(model)
    path = Path("sostenuto") / "mine.json"
    assert report_of(model) == f"{method} measured over 8 calls of the model: {path}"
    model = CONFIG.apply(build(network), str(path))[0]
    cached_result, _ = generate(model)
    assert sostenuto.load_config(path).method.name == method
    gap = (cached_result - stock).abs().mean() / stock.abs().mean()
    assert 0 < gap < 0.5
    if method in ("smoothcache", "eb", "feb"):  # a table is of its steps
        with pytest.raises(sostenuto.TableError, match="has 8 steps, the sampler runs 6"):
            generate(model, num_steps=6)


def test_the_second_generation_of_a_calibration_has_noise_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noises = []

    def sample(guider, sigmas, extra_args, callback, noise):
        noises.append(noise)
        return comfy_stub.sample_euler(guider, sigmas, extra_args, callback, noise)

    generate(CALIBRATE.apply(build(Flux), "magcache", "{}", 4, "mine.json")[0], sample, seed=5)
    assert torch.equal(noises[0], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)))
    assert len(noises) == 2
    assert not torch.equal(*noises)
    assert [path.name for path in Path("sostenuto").iterdir() if path.name == "mine.json"] == ["mine.json"]


@pytest.mark.parametrize(
    ("widgets", "words"),
    [
        (("eb", "{", 1, "a"), "no JSON"),
        (("magcache", '{"alpha": 1}', 1, "a"), "no option 'alpha'"),
        (("smoothcache", '{"alpha": -1}', 1, "a"), "alpha"),
        (("l2c", "{}", 1, "a"), "isn't calibrated here; smoothcache"),
        (("eb", "{}", 1, "../a"), "no plain file name"),
        (("eb", "{}", 1, "a/b"), "no plain file name"),
        (("eb", "{}", 1, ""), "no plain file name"),
        (("eb", "{}", 1, "a.py"), "no plain file name"),
    ],
)
def test_wrong_widgets_of_a_calibration_are_told_before_anything_runs(widgets, words):
    assert words in CALIBRATE.VALIDATE_INPUTS(*widgets)
    with pytest.raises(sostenuto.SostenutoError, match=words):
        CALIBRATE.apply(build(), *widgets)
    assert CALIBRATE.VALIDATE_INPUTS("eb", "", 1, "a") is True


def test_a_calibration_that_is_switched_off_samples_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = CALIBRATE.apply(build(Flux), "magcache", "{}", 1, "mine")[0]
    assert report_of(model) == "nothing was sampled with this model yet"
    monkeypatch.setenv("SOSTENUTO_DISABLE", "1")
    assert torch.equal(generate(model)[0], generate(build(Flux))[0])
    assert report_of(model) == "nothing was measured: SOSTENUTO_DISABLE is set"
    assert not Path("sostenuto").exists()


def test_the_emergency_switch_reaches_comfyui(monkeypatch):
    monkeypatch.setenv("SOSTENUTO_DISABLE", "1")
    model = cached(build(Flux), "fora")
    assert torch.equal(generate(model)[0], generate(build(Flux))[0])
    assert "SOSTENUTO_DISABLE is set" in report_of(model)
    assert torch.equal(generate(cached(build(Flux), "deepcache"))[0], generate(build(Flux))[0])  # whatever is wrong
