"""Partial steps of ToCa and DuCa in other families: blocks whose attention and MLP share a projection, modulation by token."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch

import sostenuto
from sostenuto import DuCa, MethodError, SiteKind, ToCa
from sostenuto.errors import SostenutoError
from sostenuto.plan import Action
from sostenuto.sites import inspect
from sostenuto.tokens import TokenSelector, _attention_of_blocks
from sostenuto.zoo import TINY_MODELS
from sostenuto.zoo.sampling import flow_sampler

STEPS = 6
OPTIONS = {
    "selection": "random",
    "spatial_bonus": 0.0,
    "ratio_schedule": "constant",
    "fresh_ratio": 0.4,
    "threshold_weight": 0.0,
    "middle_interval": None,
    "anchor": "last-full",
}
SINGLE_STREAM = (
    "FluxTransformer2DModel",
    "ChromaTransformer2DModel",
    "BriaTransformer2DModel",
    "BriaFiboTransformer2DModel",
    "HunyuanImageTransformer2DModel",
    "HunyuanVideoTransformer3DModel",
    "HunyuanVideoFramepackTransformer3DModel",
    "MotifVideoTransformer3DModel",
    "LongCatImageTransformer2DModel",
    "OvisImageTransformer2DModel",
)


@pytest.fixture
def chosen(monkeypatch):
    """The tokens that were chosen: ``[partial step][site index]``."""
    steps = []
    select = TokenSelector.select

    def recording(self, step, wanted, device):
        tokens = select(self, step, wanted, device)
        steps.append((step, dict(zip([site.site for site in wanted], tokens, strict=True))))
        return tokens

    monkeypatch.setattr(TokenSelector, "select", recording)
    return steps


def written_out(network, sample, kinds, tokens):
    """The same on the stock network: every module runs for all tokens, and hooks put in its place what the paper says."""
    sites, step, handles, memory = inspect(network), [-1], [], {}

    def count(*_):
        step[0] += 1

    def reused(key, output):
        if kinds[step[0]] == "F":
            memory[key] = output
        return memory[key]

    def refreshed(index, output):
        if kinds[step[0]] == "F":
            memory[index] = output.clone()
        elif index in tokens.get(step[0], {}):
            places = tokens[step[0]][index]
            memory[index] = memory[index].index_copy(1, places, output[:, places])
        return memory[index]

    handles.append(network.register_forward_pre_hook(count))
    for index, site in enumerate(sites):
        for path in site.hollow if site.kind is SiteKind.FUSED else ():
            hook = lambda _module, _args, output, path=path: reused(path, output)  # noqa: E731
            handles.append(network.get_submodule(path).register_forward_hook(hook))
        partial = site.takes_some_tokens and site.kind in (SiteKind.MLP, SiteKind.FUSED, SiteKind.CROSS_ATTENTION)
        fill = refreshed if partial else reused
        hook = lambda _module, _args, output, index=index, fill=fill: fill(index, output)  # noqa: E731
        handles.append(network.get_submodule(site.id).register_forward_hook(hook))
    try:
        return sample(network, torch.Generator().manual_seed(1), STEPS)
    finally:
        for handle in handles:
            handle.remove()


QUICK = ("FluxTransformer2DModel", "HunyuanVideoTransformer3DModel", "SanaWMLTX2RefinerTransformer3DModel")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TINY_MODELS])
def test_a_partial_step_is_that_of_toca_written_out(name, chosen):
    """Also where every token has a timestep of its own and so a modulation, as in the refiner of Sana-WM."""
    try:
        network, sample, scheduler = flow_sampler(TINY_MODELS[name])
        sample(network, torch.Generator().manual_seed(1), STEPS)
    except (ImportError, SostenutoError) as error:
        pytest.skip(str(error))
    with sostenuto.enable(network, ToCa(interval=3, **OPTIONS), scheduler=scheduler) as handle:
        cached = sample(network, torch.Generator().manual_seed(1), STEPS)
        fused = [index for index, site in enumerate(handle.sites) if site.kind is SiteKind.FUSED]
        if name in SINGLE_STREAM:
            assert all(handle.stats.plan[1][index] == Action.PARTIAL.value for index in fused[-1:])
    if not chosen:
        pytest.skip("nothing of it can be run for some tokens")
    assert [step for step, _ in chosen] == [1, 2, 4, 5]
    expected = written_out(network, sample, "FCCFCC", dict(chosen))
    torch.testing.assert_close(cached, expected, rtol=1e-5, atol=1e-5)


def test_the_work_is_that_of_the_tokens_that_run_and_the_memory_is_predicted():
    """By hand for width d: the MLP of a token takes 4·d² in and out, the shared projection 5·d²; plain reuse still puts one
    token into the MLP."""
    name = "FluxTransformer2DModel"
    network, sample, scheduler = flow_sampler(TINY_MODELS[name])
    macs = []
    for ratio in (0.0, 0.4):
        method = ToCa(interval=3, **{**OPTIONS, "fresh_ratio": ratio})
        with sostenuto.enable(network, method, scheduler=scheduler) as handle:
            sample(network, torch.Generator().manual_seed(1), 3)  # one full step and two partial ones
            macs.append(handle.stats.macs)
            assert handle.stats.cache_bytes_peak == handle.predicted_cache_bytes
    inputs = TINY_MODELS[name].inputs(900.0, torch.Generator().manual_seed(0))
    rows, image = inputs["hidden_states"].shape[:2]
    text = inputs["encoder_hidden_states"].shape[1]
    single = len(network.single_transformer_blocks) * (int(0.4 * (image + text)) * 9 - 4)
    double = len(network.transformer_blocks) * (int(0.4 * image) + int(0.4 * text)) * 8
    assert macs[1] - macs[0] == 2 * rows * (single + double) * network.inner_dim**2


def test_a_ratio_of_one_computes_the_branch_and_reuses_joint_attention():
    network, sample, scheduler = flow_sampler(TINY_MODELS["FluxTransformer2DModel"])
    with sostenuto.enable(network, ToCa(interval=3, **{**OPTIONS, "fresh_ratio": 1.0}), scheduler=scheduler) as handle:
        sample(network, torch.Generator().manual_seed(1), 3)
        kinds = {site.kind: action for site, action in zip(handle.sites, handle.stats.plan[1], strict=True)}
    assert kinds[SiteKind.FUSED] == Action.COMPUTE.value
    assert kinds[SiteKind.JOINT_ATTENTION] == Action.REUSE.value


@pytest.mark.parametrize("method", [ToCa.flux_dev, DuCa.flux_dev, ToCa.hunyuan_video, DuCa.hunyuan_video])
def test_the_published_presets_refresh_tokens_of_single_stream_blocks(method):
    name = "FluxTransformer2DModel" if "flux" in method.__name__ else "HunyuanVideoTransformer3DModel"
    network, sample, scheduler = flow_sampler(TINY_MODELS[name])
    with sostenuto.enable(network, method(), scheduler=scheduler) as handle:
        first = sample(network, torch.Generator().manual_seed(1), 8)
        assert torch.equal(sample(network, torch.Generator().manual_seed(1), 8), first)
        plan = handle.plan
    fused = [index for index, site in enumerate(handle.sites) if site.kind is SiteKind.FUSED]
    assert any(Action.PARTIAL in [row[index] for index in fused] for row in plan.actions)


def test_compiled_blocks_give_the_same():
    network, sample, scheduler = flow_sampler(TINY_MODELS["FluxTransformer2DModel"])
    method = ToCa(interval=3, **OPTIONS)
    with sostenuto.enable(network, method, scheduler=scheduler):
        eager = sample(network, torch.Generator().manual_seed(1), STEPS)
    torch._dynamo.reset()
    network.compile_repeated_blocks(backend="aot_eager", fullgraph=True)

    def compiled_sample():
        with torch.compiler.set_stance("default"):
            return sample(network, torch.Generator().manual_seed(1), STEPS)

    with sostenuto.enable(network, method, scheduler=scheduler):
        torch.testing.assert_close(compiled_sample(), eager, rtol=1e-4, atol=1e-4)


def test_where_attention_and_mlp_are_one_module_nothing_is_partial():
    network, sample, scheduler = flow_sampler(TINY_MODELS["Flux2Transformer2DModel"])
    with sostenuto.enable(network, ToCa(interval=3, **OPTIONS), scheduler=scheduler) as handle:
        sample(network, torch.Generator().manual_seed(1), STEPS)
        fused = [row[i] for row in handle.stats.plan for i, s in enumerate(handle.sites) if s.kind is SiteKind.FUSED]
    assert set(fused) == {Action.COMPUTE.value, Action.REUSE.value}


def test_the_list_above_is_complete():
    found = set()
    for name, tiny in TINY_MODELS.items():
        try:
            sites = inspect(tiny.build())
        except (ImportError, SostenutoError):
            continue
        if any(site.kind is SiteKind.FUSED and site.takes_some_tokens for site in sites):
            found.add(name)
    assert found == {name for name in SINGLE_STREAM if hasattr(diffusers, name)}  # the oldest has fewer


# --- scores where text and image attend to each other ----------------------------------------------------------------

TEXT_FIRST = {
    "FluxTransformer2DModel": True,
    "QwenImageTransformer2DModel": True,
    "CogVideoXTransformer3DModel": True,
    "SD3Transformer2DModel": False,
    "HunyuanVideoTransformer3DModel": False,
}


def with_as_much_text_as_image(tiny):
    """FLUX, such that no length tells which stream is meant."""

    def inputs(timestep, generator):
        given = tiny.inputs(timestep, generator)
        image = given["hidden_states"].shape[1]
        text = torch.randn(2, image, given["encoder_hidden_states"].shape[-1], generator=generator)
        return given | {"encoder_hidden_states": text, "txt_ids": torch.zeros(image, 3)}

    return replace(tiny, inputs=inputs)


def scored_by_hand(network, sample, selection, text_first, monkeypatch):
    """The scores of the tokens of every MLP and shared projection at the first step, on the stock network."""
    joined, values, lengths, scores, handles = {}, {}, {}, {}, []
    under_way = [None]  # a refiner of the text attends before
    attend = torch.nn.functional.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, **kwargs):
        logits = torch.einsum("bhqd,bhkd->bhqk", query, key) / query.shape[-1] ** 0.5
        if attn_mask is not None:
            logits = logits + torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
        joined.setdefault(under_way[-1], logits.softmax(-1).mean(1).sum(1))
        return attend(query, key, value, attn_mask=attn_mask, **kwargs)

    sites = inspect(network)
    of_block = {}
    for site in sites:
        if site.kind in (SiteKind.JOINT_ATTENTION, SiteKind.FUSED):
            path = of_block.setdefault(site.block, site.hollow[0] if site.hollow else site.id)
            module = network.get_submodule(path)
            handles.append(module.register_forward_pre_hook(lambda *_, path=path: under_way.append(path)))
            for name in ("to_v", "add_v_proj"):
                if getattr(module, name, None) is not None:
                    hook = lambda _module, _args, out, path=path: values.setdefault(path, []).append(out)  # noqa: E731
                    handles.append(getattr(module, name).register_forward_hook(hook))
        if site.kind in (SiteKind.MLP, SiteKind.FUSED):
            hook = lambda _module, _args, out, site=site: lengths.update({site.id: out.shape[1]})  # noqa: E731
            handles.append(network.get_submodule(site.id).register_forward_hook(hook))
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        sample(network, torch.Generator().manual_seed(1), 1)
    for handle in handles:
        handle.remove()
    for index, site in enumerate(sites):
        if site.id in lengths:
            path, length = of_block[site.block], lengths[site.id]
            is_text = any(word in site.id for word in ("context", "txt"))
            if selection == "value-norm":
                value = values[path][int(is_text)]
                score = (1 - value.unflatten(-1, (network.get_submodule(path).heads, -1)).norm(dim=-1)).sum(-1)
            else:
                score = joined[path][:, :length] if is_text is text_first else joined[path][:, -length:]
            assert score.shape[1] == length
            scores[index] = score / score.norm(dim=-1, keepdim=True)
    return scores


@pytest.mark.parametrize("selection", ["attention", pytest.param("value-norm", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*TEXT_FIRST, "as much text as image"])
def test_the_chosen_rows_of_joint_attention_have_the_highest_scores(name, selection, chosen, monkeypatch):
    known = TINY_MODELS.get(name) or with_as_much_text_as_image(TINY_MODELS["FluxTransformer2DModel"])
    network, sample, scheduler = flow_sampler(known)
    scores = scored_by_hand(network, sample, selection, TEXT_FIRST.get(name, True), monkeypatch)
    method = ToCa(interval=3, **{**OPTIONS, "selection": selection})
    chosen.clear()
    with sostenuto.enable(network, method, scheduler=scheduler) as handle:
        output = sample(network, torch.Generator().manual_seed(1), 4)
        assert handle.stats.actions["partial"] > 0
    assert output.isfinite().all()
    assert [step for step, _ in chosen] == [1, 2]
    first = chosen[0][1]
    assert first.keys() == scores.keys()
    for site, tokens in first.items():
        best = scores[site].topk(tokens.shape[1], dim=-1).indices
        assert torch.equal(tokens.sort().values, best.sort().values)


def test_values_that_several_queries_share_have_fewer_heads():
    network = TINY_MODELS["Lumina2Transformer2DModel"].build()
    assert (network.config.num_attention_heads, network.config.num_kv_heads) == (2, 1)
    assert {read.heads for read in _attention_of_blocks("value-norm", network, inspect(network)).values()} == {1}


@pytest.mark.parametrize("selection", ["attention", "value-norm"])
def test_rows_of_fused_guidance_are_scored_as_in_separate_calls(selection, chosen):
    tiny = TINY_MODELS["FluxTransformer2DModel"]
    network, _, scheduler = flow_sampler(tiny)
    method = ToCa(interval=3, **{**OPTIONS, "selection": selection})

    @torch.no_grad()
    def sample(fused):
        scheduler.set_timesteps(STEPS)
        latents = tiny.inputs(0.0, torch.Generator().manual_seed(1))["hidden_states"][:1]
        for timestep in scheduler.timesteps:
            given = tiny.inputs(float(timestep), torch.Generator().manual_seed(2)) | {
                "hidden_states": latents.repeat(2, 1, 1)
            }
            parts = [slice(None)] if fused else [slice(0, 1), slice(1, 2)]
            calls = [{k: v if "ids" in k else v[part] for k, v in given.items()} for part in parts]
            one, other = torch.cat([network(**call).sample for call in calls]).split(1)
            latents = scheduler.step(other + 3 * (one - other), timestep, latents).prev_sample
        return latents

    with sostenuto.enable(network, method, scheduler=scheduler):
        fused, together = sample(True), [tokens for _, tokens in chosen]
        chosen.clear()
        separate, apart = sample(False), [tokens for _, tokens in chosen]
    torch.testing.assert_close(fused, separate, rtol=1e-4, atol=1e-4)
    assert 2 * len(together) == len(apart) > 0
    for tokens, one, other in zip(together, apart[::2], apart[1::2], strict=True):
        for site, both in tokens.items():
            assert torch.equal(both.sort().values, torch.stack([one[site], other[site]]).sort().values)
    assert any(not torch.equal(*both.sort().values) for tokens in together for both in tokens.values())


def test_joint_attention_without_projections_of_its_own_is_refused_by_name():
    network, _, scheduler = flow_sampler(TINY_MODELS["FluxTransformer2DModel"])
    del network.transformer_blocks[1].attn.to_v
    for selection, remedy in {"attention": '"random" or "value-norm"', "value-norm": '"random"'}.items():
        with pytest.raises(MethodError, match=rf"blocks\.1\.attn has no to_v.* use selection={remedy}$"):
            sostenuto.enable(network, ToCa(**{**OPTIONS, "selection": selection}), scheduler=scheduler)
    assert "_sostenuto_handle" not in vars(network)
