"""A row of a benchmark: what it says is what ran; large models counted without weights; how methods are written."""

import functools
from dataclasses import replace

import pytest
import torch

import sostenuto
from fake_peer import DIT, FLUX, QUICK, fake_peers  # noqa: F401 (a fixture)
from sostenuto.bench import quality
from sostenuto.bench.cases import Case, Settings
from sostenuto.bench.dry import planned
from sostenuto.bench.generation import Timed, counted, timed
from sostenuto.bench.networks import network_of
from sostenuto.bench.published import DIT_XL, LARGE
from sostenuto.bench.runner import measure, step_figures
from sostenuto.bench.session import RESULTS, run
from sostenuto.bench.specs import method_of, parse
from sostenuto.bench.subjects import build_subject
from sostenuto.cli import main
from sostenuto.cli.bench import said_of

# --- what is counted and timed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "method"), [
    (DIT, "fora:interval=2"),
    (FLUX, "taylorseer:interval=2,order=1,first_enhance=1"),
    (DIT, "dbcache:front_blocks=1,warmup=1,threshold=9"),
    ("tiny:PixArtTransformer2DModel", "reuse-stack:interval=3"), (DIT, "toca:interval=2"),
])  # fmt: skip
def test_what_is_counted_while_a_generation_runs_is_what_the_engine_says_it_did(model, method):
    subject = build_subject(model, 2, QUICK)
    with sostenuto.enable(subject.target, method_of(method, 5), scheduler=subject.owner.scheduler) as handle:
        count = counted(subject, 0, 5)
        stats = handle.stats
    assert count.macs == stats.macs < stats.macs_uncached
    assert len(count.step_macs) == 5
    assert sum(count.step_macs) == count.macs


def test_what_stood_around_a_schedulers_step_is_called_and_stays():
    subject, steps = build_subject(DIT, 1, QUICK), []
    scheduler = subject.owner.scheduler
    own = scheduler.step

    @functools.wraps(own)
    def counting(*args, **kwargs):
        steps.append(1)
        return own(*args, **kwargs)

    scheduler.step = counting
    counted(subject, 0, 3)
    assert len(timed(subject, 0, 3).step_s) == 3
    assert len(steps) == 6
    assert scheduler.step is counting
    assert "set_timesteps" not in vars(scheduler)


def test_a_row_holds_the_documented_columns_and_its_ideal_is_that_of_the_steps_skipped():
    row = measure(Case("f", "fora:interval=2,anchor=start", DIT, 4), QUICK)
    assert row.error is None
    content = row.as_dict()
    documented = {"name", "method", "num_inference_steps", "wall_s", "speedup", "ideal_speedup", "frechet_distance",
                  "inception_score", "class_accuracy", "psnr", "precision", "recall", "ssim", "lpips", "macs", "efficiency",
                  "cache_bytes_peak", "peer", "wall_s_min", "wall_s_max"}  # fmt: skip
    assert documented <= content.keys()
    full, reused = row.step_macs[0], row.step_macs[1]
    assert row.step_macs == [full, reused, full, reused]
    assert row.plan == "c r c r"
    assert row.baseline_step_macs == [full] * 4
    assert row.ideal_speedup == pytest.approx(4 * full / (2 * full + 2 * reused))
    assert row.efficiency == pytest.approx(row.speedup / row.ideal_speedup)
    assert row.wall_s_min <= row.wall_s <= row.wall_s_max
    assert len(row.step_s) == len(row.baseline_step_s) == 4
    assert sum(row.step_s) <= 1.5 * row.wall_s_max
    assert row.cache_bytes_peak == 2 * 2 * (2 * 16 * 64) * 4  # blocks × branches × tokens of the batch × float32
    assert row.relative_error > 0
    assert {"psnr", "lpips", "frechet_distance", "recall", "graphs"} <= set(row.blank)
    assert set(row.missing) == set(row.blank)
    assert all(content[name] is None for name in row.blank)


def test_nothing_enabled_is_its_own_baseline_and_everything_computed_has_no_error():
    reference = measure(Case("u", "uncached", DIT, 3), QUICK)
    assert reference.speedup == reference.ideal_speedup == 1
    computed = measure(Case("n", "none", DIT, 3), QUICK)
    assert computed.relative_error == 0
    assert computed.ideal_speedup == 1
    assert computed.cache_bytes_peak == 0
    assert computed.computed_step_overhead is not None
    assert computed.skipped_step_share is None


def test_a_peer_is_counted_too_named_with_its_version_and_leaves_nothing(peers):
    row = measure(Case("p", "peer:fake", DIT, 4), QUICK)
    assert row.error is None
    assert row.peer == "fakelib 1.2"
    assert row.parameters == {"every": 2}
    assert row.ideal_speedup == 2
    assert row.step_macs[1::2] == [0, 0]
    assert row.skipped_step_share < 0.9
    assert row.cache_bytes_peak is None
    assert row.missing["cache_bytes_peak"]
    assert row.plan is None
    assert row.missing["plan"] == "the library doesn't say what it skips"
    assert row.baseline_macs == 2 * row.macs


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["--methods", "fora:intervall=3"], "no parameter 'intervall'"),
        (["--methods", "fora", "--only", "nothing"], "nothing to measure"),
        (["--models", "dit"], "--models is for --methods"),
        (["--suite", "overhead", "--schedulers", "DDIMScheduler"], "--schedulers is for --methods"),
        (["--methods", "fora", "--repeats", "0"], "repeats"),
    ],
)
def test_a_command_that_cannot_run_leaves_what_was_measured(words, refusal, tmp_path, capsys):
    (tmp_path / RESULTS).write_text("measured")
    assert main(["bench", "--fresh", "--output", str(tmp_path), *words]) == 1
    assert refusal in capsys.readouterr().err
    assert (tmp_path / RESULTS).read_text() == "measured"


def test_lpips_is_computed_where_its_network_is_at_hand(monkeypatch):
    at_once = []

    def network():
        return lambda images, twins: at_once.append(len(images)) or (images.float() - twins.float()).flatten(1).mean(1)

    monkeypatch.setattr(quality, "_lpips_network", network)
    assert quality._lpips(torch.full((20, 1, 8, 8), 0.8), torch.full((20, 1, 8, 8), 0.4)) == pytest.approx(102)
    assert at_once == [16, 4]


def test_the_demo_is_judged_and_compared_in_pairs(tmp_path):
    row = measure(Case("f", "fora:interval=2", "demo", 4), QUICK, tmp_path)
    assert row.error is None
    assert row.n == 8
    assert row.frechet_distance > 0
    (few,) = said_of([row, replace(row, frechet_distance=None, n=9)])
    assert few.startswith("FID of 8 says little, it wants 128; 8 real images get ")
    assert 0 <= row.class_accuracy <= 1
    assert 0 < row.psnr < 100
    assert 0 < row.ssim < 1
    assert row.lpips is None
    assert "torchvision" in row.missing["lpips"] or "weights" in row.missing["lpips"]
    assert (tmp_path / row.samples).read_bytes()[:4] == b"\x89PNG"
    fewer = measure(Case("3 steps", "uncached", "demo", 3, baseline_steps=4), QUICK)
    assert fewer.psnr is None
    assert "other noise" in fewer.missing["psnr"]
    assert fewer.ideal_speedup == pytest.approx(4 / 3)


def test_schedulers_are_choosable_and_given_back():
    subject = build_subject("demo", 2, QUICK)
    before = subject.owner.scheduler
    with subject.scheduled("DDIMScheduler"):
        assert type(subject.owner.scheduler).__name__ == "DDIMScheduler"
    assert subject.owner.scheduler is before
    assert measure(Case("d", "fora:interval=2", DIT, 3, scheduler="DPMSolverMultistepScheduler"), QUICK).error is None
    assert "no scheduler" in measure(Case("d", "none", DIT, 3, scheduler="NoScheduler"), QUICK).error


@pytest.mark.slow
def test_a_compiled_row_counts_graphs_and_recompiles():
    row = measure(
        Case("c", "fora:interval=2", "dit:layers=1,width=64,tokens=16", 4, "DDPMScheduler", "compiled"),
        Settings(repeats=1, compiler="aot_eager"),
    )
    assert row.error is None
    # one graph where everything is stored, one where it is reused, one where the last step only computes
    assert row.graphs == 3
    assert row.graph_breaks == row.recompiles == 0


def timings(*runs):
    return [Timed(sum(run), list(run), torch.zeros(1), None) for run in runs]


def test_step_figures_pair_each_step_with_the_baselines_same_step():
    own = timings([1.1, 0.2, 1.1], [2.2, 0.4, 2.2])  # the second pair ran on a machine half as fast
    other = timings([1.0, 1.0, 1.0], [2.0, 2.0, 2.0])
    figures = step_figures(own, other, [10, 1, 10], [10, 10, 10])
    assert figures.overhead == pytest.approx(0.1)
    assert figures.share == pytest.approx(0.2)
    assert not figures.missing
    alike = step_figures(own, other, [10, 10, 10], [10, 10, 10])
    assert alike.share is None
    assert alike.missing == {"skipped_step_share": "no step is skipped"}
    shorter = step_figures(timings([1.0]), timings([1.0, 1.0]), [10], [10, 10])
    assert shorter.overhead is None
    assert "other steps" in shorter.missing["computed_step_overhead"]


# --- large models -------------------------------------------------------------------------------------------------------


def test_counting_without_weights_agrees_with_counting_what_runs():
    network = network_of(DIT)
    subject = build_subject(DIT, 2, QUICK)
    for method in ("fora:interval=2", "toca:interval=2,selection=random", "taylorseer:interval=3", "duca:interval=3"):
        with sostenuto.enable(subject.target, method_of(method, 6), scheduler=subject.owner.scheduler) as handle:
            run_count = counted(subject, 0, 6)
            peak = handle.stats.cache_bytes_peak
        inputs = network.inputs(network, 2, torch.Generator()) | {"timestep": torch.zeros(2)}
        bare = {name: value.to("meta") for name, value in inputs.items()}
        dry = planned(network.build("meta"), method_of(method, 6), subject.owner.scheduler, 6, bare)
        assert dry.step_macs == run_count.step_macs
        assert dry.cache_bytes_peak == peak


def test_dit_xl_2_costs_what_its_paper_says():
    xl = measure(Case("xl", "uncached", "dit-xl-2-256", 4, kind="count"), QUICK)
    assert xl.error is None
    assert xl.baseline_macs / 4 / 2 == pytest.approx(118.6e9, rel=0.01)  # arXiv 2212.09748, table 4


@pytest.mark.slow
def test_flux_1_dev_costs_what_the_papers_print():
    flux = measure(Case("flux", "uncached", "flux-1-dev", 50, kind="count"), QUICK)
    assert 2 * flux.macs == pytest.approx(3719.5e12, rel=0.02)  # as TaylorSeer's, ToCa's and DuCa's papers print it
    assert flux.wall_s is None
    assert flux.missing["wall_s"]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # ToCa runs other numbers of tokens at each of 250 steps
@pytest.mark.parametrize("printed", [*DIT_XL, *LARGE], ids=lambda printed: printed.name)
def test_every_printed_row_can_be_counted(printed):
    case = Case(
        printed.name, printed.method, printed.model, printed.num_inference_steps, printed.scheduler, kind="count"
    )
    row = measure(case, QUICK)
    assert row.error is None
    assert 0 < row.macs <= row.baseline_macs


def test_what_decides_while_it_runs_is_not_counted_without_running():
    row = measure(Case("t", "dbcache:front_blocks=1,threshold=0.1", "dit-xl-2-256", 4, kind="count"), QUICK)
    assert "decides while the network runs" in row.error


# --- how things are written -----------------------------------------------------------------------------------------------


def test_methods_are_written_in_one_word():
    assert method_of("fora:interval=3", 10) == sostenuto.FORA(3)
    assert method_of("fora.flux_dev", 10) == sostenuto.FORA.flux_dev()
    assert method_of("fora.qwen_image:interval=6", 10) == sostenuto.FORA(6, anchor="start")
    assert method_of("taylorseer.qwen_image:interval=3", 10) == sostenuto.TaylorSeer.qwen_image(3)
    assert method_of("pab:window=(100,850),spatial_range=3", 10) == sostenuto.PAB(3, window=(100, 850))
    assert method_of("fora:interval=2,anchor=start", 10) == sostenuto.FORA(2, anchor="start")
    combined = method_of("fora:interval=3|epsilon-scaling:scale=1.01", 10)
    assert combined.methods == (sostenuto.FORA(3), sostenuto.EpsilonScaling(1.01))
    assert method_of("reuse-stack:interval=3", 7).table.fill == "stack"


def test_a_file_needs_no_quotes_in_a_method_s_words():
    assert parse("eb:table=runs/tuned-2x.json, eps_scale=1e0")[1] == {"table": "runs/tuned-2x.json", "eps_scale": 1.0}
    assert parse("eb:table='a,b.json'")[1] == {"table": "a,b.json"}  # unless it has a comma
    assert parse("eb:table='x,a=b.json'")[1] == {"table": "x,a=b.json"}  # within quotes nothing is a word
    assert parse("x:a=None,b=-1,c=word,d=(1,2),e=2x")[1] == {"a": None, "b": -1, "c": "word", "d": (1, 2), "e": "2x"}


@pytest.mark.parametrize(("word", "match"), [
    ("foro", "did you mean fora"), ("fora:intervall=3", "did you mean interval"), ("fora.flux", "did you mean flux_dev"),
    ("fora:3", "isn't name:key=value"), ("fora:interval=", "isn't name:key=value"), ("fora:interval=0", "interval"),
    ("fora.flux_dev:intervall=3", "did you mean interval"),
    ("reuse-stack:x=1", "unexpected"),
])  # fmt: skip
def test_a_misspelt_method_is_refused_before_anything_runs(word, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        run([Case("x", word, DIT, 2)], QUICK, tmp_path, show=False)
    assert not (tmp_path / RESULTS).exists()


@pytest.mark.parametrize(("model", "match"), [
    ("dit:layer=2", "did you mean layers"), ("dit:tokens=15", "square"), ("dit:layers=0", "1 or more"),
    ("tiny:Flux", "no tiny"), ("nonsense", "no model"), ("dit-xl-2-256:layers=2", "without parameters"),
])  # fmt: skip
def test_a_misspelt_model_is_a_row_with_the_reason(model, match):
    assert match in measure(Case("x", "none", model, 2), QUICK).error


def test_settings_without_meaning_are_refused():
    for wrong in ({"repeats": 0}, {"warmup": -1}, {"batch_size": 0}, {"threads": -1}):
        with pytest.raises(sostenuto.InputError, match=next(iter(wrong))):
            Settings(**wrong)
    with pytest.raises(sostenuto.InputError, match="num_inference_steps"):
        Case("x", "none", num_inference_steps=0)
