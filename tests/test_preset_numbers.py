"""Every number of the presets, against those that were published, written down once more."""

import pytest
from diffusers import FluxTransformer2DModel

from sostenuto import FORA, PAB, ABCache, Action, DeltaDiT, DuCa, TaylorSeer, TeaCache, ToCa
from sostenuto.methods.base import Facts

_EVENLY = dict(spatial_bonus=0.0, threshold_weight=0.0, middle_interval=None)
_DIT = dict(tile=2, threshold_weight=0.4, middle_interval=2, staleness_weight=0.25, ratio_schedule="ddim50")
_PIXART = dict(
    anchor="start", spatial_bonus=0.4, tile=4, middle_interval=None, staleness_weight=0.25, ratio_schedule="pixart"
)
_VIDEO = dict(ratio_schedule="open-sora", anchor="start", first_full_steps=3, cross_attention_every=2, **_EVENLY)
_FLUX = dict(ratio_schedule="flux", anchor="last-full", first_full_steps=3, **_EVENLY)
_UPWARD = dict(ratio_schedule="constant", anchor="last-full", first_full_steps=1, **_EVENLY)
_ODD_FIRST = dict(selection="random", pattern_start="conservative_first")
_GAP = dict(differences="last-gap")

PRESETS = [
    (ToCa.dit_xl_2(), ToCa(3, 0.07, "attention", spatial_bonus=0.6, **_DIT)),
    (ToCa.dit_xl_2_ddpm250(), ToCa(4, 0.07, "attention", spatial_bonus=0.6, **{**_DIT, "ratio_schedule": "ddpm250"})),
    (ToCa.pixart_alpha(), ToCa(3, 0.3, "cross-entropy", threshold_weight=0.2, **_PIXART)),
    (ToCa.open_sora(), ToCa(3, 0.1, "random", **_VIDEO)),
    (ToCa.flux_dev(), ToCa(4, 0.1, "attention", **_FLUX)),
    (ToCa.flux_dev(12, "random"), ToCa(12, 0.1, "random", **_FLUX)),
    (ToCa.hunyuan_video(), ToCa(5, 0.1, "random", **_UPWARD)),
    (DuCa.dit_xl_2(), DuCa(3, 0.05, "random", spatial_bonus=0.8, **_DIT)),
    (DuCa.dit_xl_2(5), DuCa(5, 0.05, "random", spatial_bonus=0.8, **_DIT)),
    (DuCa.pixart_alpha(), DuCa(3, 0.75, "random", threshold_weight=0.0, **_PIXART)),
    (DuCa.open_sora(), DuCa(3, 0.1, "random", **_VIDEO)),
    (DuCa.flux_dev(), DuCa(5, 0.1, **_FLUX, **_ODD_FIRST)),
    (DuCa.flux_dev(10), DuCa(10, 0.1, **_FLUX, **_ODD_FIRST)),
    (DuCa.hunyuan_video(), DuCa(5, 0.1, **_UPWARD, **_ODD_FIRST)),
    (DuCa.qwen_image(), DuCa(9, 0.2, **_UPWARD, **_ODD_FIRST)),
    (DuCa.qwen_image(12, 0.1), DuCa(12, 0.1, **_UPWARD, **_ODD_FIRST)),
    (FORA.dit_xl_2(), FORA(3, "end")),
    (FORA.dit_xl_2(5), FORA(5, "end")),
    (FORA.pixart_alpha(), FORA(3, "end")),
    (FORA.flux_dev(6), FORA(6, "end")),
    (FORA.hunyuan_video(), FORA(5, "start")),
    (FORA.qwen_image(), FORA(4, "start")),
    (FORA.qwen_image(6), FORA(6, "start")),
    (TaylorSeer.dit_xl_2(), TaylorSeer(3, 3, 2, **_GAP)),
    (TaylorSeer.dit_xl_2(4, 4), TaylorSeer(4, 4, 2, **_GAP)),
    (TaylorSeer.flux_dev(), TaylorSeer(6, 2, 3, **_GAP)),
    (TaylorSeer.flux_dev(6, 1), TaylorSeer(6, 1, 3, **_GAP)),
    (TaylorSeer.hunyuan_video(), TaylorSeer(5, 1, 1, **_GAP)),
    (TaylorSeer.hidream(), TaylorSeer(4, 2, 1, **_GAP)),
    (TaylorSeer.qwen_image(3), TaylorSeer(3, 2, 3, **_GAP)),
    (ABCache.flux_dev(), ABCache(2, 5, 6, "literal")),
    (PAB.pab_246(), PAB(2, 4, 6, (100, 800))),
    (PAB.pab_357(), PAB(3, 5, 7, (100, 800))),
    (PAB.pab_579(), PAB(5, 7, 9, (100, 800))),
    (PAB.open_sora(), PAB(2, 4, 6, (450, 930), {t: (range(5), 2) for t in (676, 788, 864)})),
    (PAB.open_sora_plan(), PAB(2, 4, 6, (100, 850), {426 + 24 * n: (range(7), 2) for n in range(14)})),
    (PAB.latte(), PAB(2, 3, 6, (100, 800), {t: (range(5), 2) for t in (400, 480, 560, 640, 720)})),
    (PAB.cogvideox_5b(), PAB(2, None, None, (100, 850))),
    (PAB.vchitect(), PAB(2, 4, 6, (100, 800))),
]


@pytest.mark.parametrize(("preset", "written"), PRESETS, ids=[f"{p.name}-{n}" for n, (p, _) in enumerate(PRESETS)])
def test_a_preset_is_what_was_published(preset, written):
    assert preset == written


@pytest.mark.parametrize(
    ("preset", "coefficients", "threshold"),
    [
        (TeaCache.flux_dev(), (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861), 0.25),
        (TeaCache.hunyuan_video(), (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896), 0.1),
        (TeaCache.cogvideox_5b(), (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339), 0.1),
        (TeaCache.consisid(), (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339), 0.1),
        (TeaCache.cogvideox_2b(0.1), (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434), 0.1),
        (TeaCache.open_sora(), (217.546007, -118.329252, 26.8662585, -0.0459364272, 0.048442624), 0.1),
        (TeaCache.open_sora_plan(), (205943.668, -14875.9286, 306.085986, 1.3141808, 0.00239658469), 0.1),
        (TeaCache.latte(), (-2464.34137, 308.044764, 80.7447667, -4.11385132, 0.111001402), 0.1),
        (TeaCache.mochi(), (-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719), 0.06),
        (TeaCache.ltx_video(), (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326), 0.03),
        (TeaCache.hidream(0.1), (-31360.5009, -712.425503, 49.1363285, 8.2651549, 0.108053901), 0.1),
        (TeaCache.lumina_2(0.1), (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344), 0.1),
        (TeaCache.lumina_t2x(0.1), (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344), 0.1),
    ],
)
def test_teacaches_polynomials_are_the_published_ones(preset, coefficients, threshold):
    assert preset.coefficients.coefficients == pytest.approx(coefficients, rel=1e-12)
    assert preset.threshold == threshold


def test_delta_dit_keeps_the_single_stream_blocks_of_flux():
    """19 blocks of two streams and 38 of one: between computed steps what the last 38 add is reused."""
    sizes = dict(num_attention_heads=1, attention_head_dim=8, axes_dims_rope=(2, 2, 4), joint_attention_dim=4)
    model = FluxTransformer2DModel(in_channels=4, num_layers=19, num_single_layers=38, pooled_projection_dim=4, **sizes)
    method = DeltaDiT.flux_dev(3)
    sites = method.sites(model)
    plan = method.plan(Facts(sites, tuple(range(50, 0, -1)), model, None))
    reused = [
        [site.id for site, action in zip(sites, row, strict=True) if action is Action.REUSE] for row in plan.actions
    ]
    kept = ["single_transformer_blocks.0-37"]
    assert reused == [kept if step % 3 else [] for step in range(50)]
