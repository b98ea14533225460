"""A line in the log and a span for every generation, and nothing at all where nobody asked."""

import logging
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

import sostenuto
from conftest import build_tiny, sample_loop
from sostenuto import FORA, Forecast, telemetry
from sostenuto.stats import Record


@pytest.fixture
def network():
    return build_tiny(num_layers=2), DDPMScheduler()


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "sostenuto"]


@pytest.mark.parametrize("separate", [False, True])
def test_one_line_tells_of_each_generation_when_it_is_done(network, separate, caplog):
    model, scheduler = network
    with (
        caplog.at_level(logging.INFO, "sostenuto"),
        sostenuto.enable(model, FORA(3) | Forecast(1), scheduler=scheduler),
    ):
        for number in (1, 2):
            sample_loop(model, scheduler, 6, separate_guidance=separate)
            assert len(lines(caplog)) == number  # not only when the next begins
    assert len(lines(caplog)) == 2
    # The first step and those with 3 and 0 still to come are computed, in 2 layers of 2 branches, for each pass.
    passes = 1 + separate
    assert lines(caplog)[0].startswith("FORA | Forecast on DiTTransformer2DModel: 6 steps in ")
    assert f" s, {3 * 4 * passes} compute, " in lines(caplog)[0]
    assert lines(caplog)[0].endswith("MiB kept")


def test_a_generation_given_up_is_told_of_when_the_next_begins_or_caching_ends(network, caplog):
    model, scheduler = network
    with caplog.at_level(logging.INFO, "sostenuto"), sostenuto.enable(model, "fora", scheduler=scheduler):
        with pytest.raises(KeyboardInterrupt):
            sample_loop(model, scheduler, 6, stop_at=4)
        assert lines(caplog) == []
        sample_loop(model, scheduler, 5)
        assert ["4 of 6 steps" in lines(caplog)[0], "5 steps in" in lines(caplog)[1]] == [True, True]
        with pytest.raises(KeyboardInterrupt):
            sample_loop(model, scheduler, 6, stop_at=2)
    assert "2 of 6 steps" in lines(caplog)[2]


def test_nothing_is_counted_where_nobody_asked(network, monkeypatch):
    model, scheduler = network
    monkeypatch.setattr(Record, "actions", property(lambda *_: pytest.fail("actions were counted")))
    logging.getLogger("sostenuto").setLevel(logging.WARNING)
    with sostenuto.enable(model, "fora", scheduler=scheduler):
        sample_loop(model, scheduler, 4)


def test_a_line_in_the_log_takes_no_dry_run(network, caplog, monkeypatch):
    model, scheduler = network
    monkeypatch.setattr(Record, "statistics", lambda *_: pytest.fail("multiply-accumulates were counted"))
    with caplog.at_level(logging.INFO, "sostenuto"), sostenuto.enable(model, "fora", scheduler=scheduler):
        sample_loop(model, scheduler, 4)
    assert len(lines(caplog)) == 1


def test_statistics_of_a_generation_that_is_over_are_those_of_no_other(network):
    model, scheduler = network
    heard, told = [], []
    with sostenuto.enable(model, "fora", scheduler=scheduler) as handle:
        handle.listen(lambda generation: (heard.append(generation), told.append(generation.statistics())))
        sample_loop(model, scheduler, 4)
        sample_loop(model, scheduler, 5)
        assert [stats.num_steps for stats in told] == [4, 5]
        assert heard[0].statistics() is None
        assert heard[1].statistics() == told[1]


def test_a_listener_that_fails_leaves_nothing_attached(network):
    model, scheduler = network
    handle = sostenuto.enable(model, "fora", scheduler=scheduler)
    handle.listen(lambda generation: 1 / 0)
    with pytest.raises(KeyboardInterrupt):
        sample_loop(model, scheduler, 4, stop_at=2)
    with pytest.raises(ZeroDivisionError):
        handle.disable()
    assert not [module for module in model.modules() if "forward" in vars(module)]
    sostenuto.enable(model, "fora", scheduler=scheduler).disable()


def test_the_line_changes_nothing_in_the_result(network, caplog):
    model, scheduler = network
    results = []
    for level in (logging.WARNING, logging.INFO):
        with caplog.at_level(level, "sostenuto"), sostenuto.enable(model, "fora", scheduler=scheduler):
            results.append(sample_loop(model, scheduler, 5)[0])
    assert torch.equal(*results)


def test_a_calibration_s_runs_are_no_generations(network, caplog):
    model, scheduler = network

    def sample(model, generator, num_inference_steps):
        sample_loop(model, scheduler, num_inference_steps)

    with caplog.at_level(logging.INFO, "sostenuto"):
        sostenuto.calibrate(model, "eb", sample, scheduler=scheduler, num_inference_steps=3, num_samples=1)
    assert lines(caplog) == []


class Span:
    def __init__(self, name, start_time, attributes):
        self.name, self.start, self.attributes, self.end_time = name, start_time, attributes, None

    def end(self, end_time):
        self.end_time = end_time


@pytest.fixture
def opentelemetry(monkeypatch):
    """Stands for opentelemetry-api: a tracer that keeps its spans."""
    spans = []

    def start_span(name, start_time, attributes):
        spans.append(Span(name, start_time, attributes))
        return spans[-1]

    def get_tracer(name, tracer_provider=None):
        spans.append((name, tracer_provider))
        return SimpleNamespace(start_span=start_span)

    package, trace = ModuleType("opentelemetry"), ModuleType("opentelemetry.trace")
    package.trace, trace.get_tracer = trace, get_tracer
    monkeypatch.setitem(sys.modules, "opentelemetry", package)
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", trace)
    return spans


def test_a_span_has_the_numbers_of_its_generation(network, opentelemetry):
    model, scheduler = network
    with sostenuto.enable(model, FORA(2), scheduler=scheduler) as handle:
        telemetry.trace(handle, tracer_provider="mine")
        before = time.time_ns()
        sample_loop(model, scheduler, 6)
        after, stats = time.time_ns(), handle.stats
    (tracer, provider), span = opentelemetry
    assert (tracer, provider, span.name) == ("sostenuto", "mine", "sostenuto.generation")
    assert before - 10**7 <= span.start < span.end_time <= after  # the clocks of both differ by less than 10 ms
    assert span.attributes["sostenuto.method"] == "FORA"
    assert span.attributes["sostenuto.num_steps"] == span.attributes["sostenuto.num_steps_planned"] == 6
    assert span.attributes["sostenuto.actions.reuse"] == stats.actions["reuse"] == 2 * 4  # steps 2 and 4
    for name in ("num_passes", "macs", "macs_uncached", "ideal_speedup", "cache_bytes_peak"):
        assert span.attributes[f"sostenuto.{name}"] == getattr(stats, name)


def test_the_installed_opentelemetry_takes_the_span(network):
    pytest.importorskip("opentelemetry.trace")
    model, scheduler = network
    heard = []
    with sostenuto.enable(model, FORA(2), scheduler=scheduler) as handle:
        telemetry.trace(handle)  # its default provider makes spans that are not recorded
        handle.listen(heard.append)
        sample_loop(model, scheduler, 4)
    assert [generation.num_steps for generation in heard] == [4]


def test_spans_without_opentelemetry_say_what_to_install(network, monkeypatch):
    model, scheduler = network
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with (
        sostenuto.enable(model, FORA(2), scheduler=scheduler) as handle,
        pytest.raises(sostenuto.DependencyError, match="pip install opentelemetry-api"),
    ):
        telemetry.trace(handle)


def test_several_denoisers_are_told_of_one_by_one(opentelemetry, caplog):
    first, second = build_tiny(num_layers=2), build_tiny(num_layers=2, seed=1)
    pipe = SimpleNamespace(transformer=first, transformer_2=second, scheduler=DDPMScheduler())
    with caplog.at_level(logging.INFO, "sostenuto"), sostenuto.enable(pipe, "fora") as handle:
        telemetry.trace(handle)
        pipe.scheduler.set_timesteps(6)
        latents = torch.randn(1, 2, 8, 8)
        for step, timestep in enumerate(pipe.scheduler.timesteps):
            with torch.no_grad():
                (first if step < 4 else second)(latents * (step + 1), timestep.expand(1), torch.tensor([1]))
    spans = [span for span in opentelemetry if isinstance(span, Span)]
    assert sorted(span.attributes["sostenuto.num_steps"] for span in spans) == [2, 4]
    assert sorted("4 of 6 steps" in line for line in lines(caplog)) == [False, True]


def test_the_switch_traces_nothing(opentelemetry, monkeypatch, network):
    monkeypatch.setenv("SOSTENUTO_DISABLE", "1")
    model, scheduler = network
    telemetry.trace(sostenuto.enable(model, "fora", scheduler=scheduler))
    sample_loop(model, scheduler, 3)
    assert not [span for span in opentelemetry if isinstance(span, Span)]
