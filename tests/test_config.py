"""Configuration files: what they say is what runs, in JSON and YAML, and what is wrong in them is named."""

import builtins
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

import sostenuto
from conftest import build_tiny, sample_loop
from sostenuto import (
    FORA,
    PAB,
    ABCache,
    CacheTable,
    Config,
    EBCache,
    EpsilonScaling,
    Forecast,
    JointHandle,
    MethodError,
    RatioSchedule,
    SmoothCache,
    StepState,
    TeaCache,
    ToCa,
)
from sostenuto.cli import ModelChoice, main
from sostenuto.methods import available_methods
from sostenuto.methods.base import parts
from sostenuto.plan import Action

EXAMPLES = [
    FORA(interval=3, anchor="start"),
    FORA(2) | Forecast(order=2, rule="taylor"),
    ABCache(order=3, warmup=2, interval=4),
    ToCa(ratio_schedule=RatioSchedule(0.4, streams=(("double", 0.5), ("single", 2.0)))),
    PAB(2, None, 6, window=(100, 800), mlp={600: ((0, 1), 2), 400.5: ((3,), 4)}),
    PAB(cross_range=6),
    TeaCache(coefficients=(1.5, 0.25, 0.0)),
    sostenuto.EpsilonScaling((1.0, 1.01, 1.02)),
    sostenuto.NoCache(),
]


def table(num_steps=6):
    states = (StepState.COMPUTE, StepState.REUSE_BOTH) * (num_steps // 2)
    return CacheTable(states, method="eb")


def write(path, **content):
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("suffix", ["json", "yaml"])
@pytest.mark.parametrize("method", EXAMPLES, ids=lambda method: method.name or "combination")
def test_a_method_comes_back_equal(method, suffix, tmp_path):
    path = tmp_path / f"c.{suffix}"
    Config(method, max_cache_bytes=7).save(path)
    assert sostenuto.load_config(path) == Config(method, 7)


def test_every_method_of_the_library_has_a_configuration_by_its_name(tmp_path):
    for name, kind in available_methods().items():
        assert sostenuto.load_config(write(tmp_path / "c.json", method=name)).method == kind()


def test_a_configured_method_generates_what_the_object_does(tmp_path):
    path = write(tmp_path / "c.json", method=[{"name": "fora", "interval": 3}, {"name": "forecast", "order": 1}])
    results = []
    for method in (FORA(3) | Forecast(1), str(path), path, sostenuto.load_config(path)):
        network, scheduler = build_tiny(), DDPMScheduler()
        with sostenuto.enable(network, method, scheduler=scheduler) as handle:
            results.append(sample_loop(network, scheduler)[0])
            assert handle.stats.actions["compute"] < handle.stats.num_steps * len(handle.stats.sites)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_table_is_found_beside_the_file_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "server" / "tables").mkdir(parents=True)
    table().save(tmp_path / "server" / "tables" / "t.json")
    path = write(tmp_path / "server" / "c.json", method={"name": "eb", "table": "tables/t.json"})
    monkeypatch.chdir("/")
    network, scheduler = build_tiny(), DDPMScheduler()
    with sostenuto.enable(network, path, scheduler=scheduler) as handle:
        sample_loop(network, scheduler)
        assert handle.stats.actions["reuse"] == 3 * 6


def test_a_table_in_memory_is_saved_beside_the_file_and_moves_with_it(tmp_path):
    (tmp_path / "a").mkdir()
    Config(EBCache(table(), eps_scale=0.99)).save(tmp_path / "a" / "c.json")
    (tmp_path / "a").rename(tmp_path / "b")
    loaded = sostenuto.load_config(tmp_path / "b" / "c.json").method
    assert CacheTable.load(loaded.table).actions == table().actions
    assert loaded.eps_scale == 0.99


def test_a_table_s_path_is_written_relative_to_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "etc").mkdir()
    Config(EBCache("t.json")).save(tmp_path / "etc" / "c.json")
    assert json.loads((tmp_path / "etc" / "c.json").read_text())["method"]["table"] == "../t.json"


def test_the_limit_of_a_file_holds_unless_one_is_given(tmp_path):
    path = write(tmp_path / "c.json", method="fora", max_cache_bytes=0)
    kept = []
    for more in ({}, {"max_cache_bytes": 10**9}):
        network, scheduler = build_tiny(), DDPMScheduler()
        with sostenuto.enable(network, path, scheduler=scheduler, **more) as handle:
            sample_loop(network, scheduler)
            kept.append(handle.stats.cache_bytes_peak)
    assert kept[0] == 0 < kept[1]


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ({}, sostenuto.ConfigError, "names no method"),
        ({"method": "fora", "interval": 3}, sostenuto.ConfigError, "key 'interval'"),
        ({"method": 3}, sostenuto.ConfigError, "not 3"),
        ({"method": []}, sostenuto.ConfigError, r"not \[\]"),
        ({"method": "fora", "version": 2}, sostenuto.ConfigError, "version 2"),
        (
            {"format": "sostenuto-cache-table", "method": "eb"},
            sostenuto.ConfigError,
            "name it as the table of a method",
        ),
        ({"method": "forra"}, sostenuto.MethodError, r"no method 'forra' \(did you mean 'fora'\?\); there are ab, "),
        ({"method": {"interval": 3}}, sostenuto.MethodError, "no method None"),
        (
            {"method": {"name": "fora", "n": 3}},
            sostenuto.MethodError,
            "fora has no parameter 'n'; it has interval, anchor",
        ),
        ({"method": {"name": "fora", "interval": 0}}, sostenuto.MethodError, "interval"),
        ({"method": ["fora", "ab"]}, sostenuto.MethodError, "can't be combined"),
        ({"method": "fora", "max_cache_bytes": -1}, sostenuto.MethodError, "max_cache_bytes must be .* not -1"),
        ({"method": {"name": "toca", "ratio_schedule": {"mpl": 1}}}, sostenuto.ConfigError, "key 'mpl'"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(content, error, words, tmp_path):
    with pytest.raises(error, match=words):
        sostenuto.load_config(write(tmp_path / "c.json", **content))


def test_files_that_are_none_are_refused_with_their_name(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "large.json").write_text(" " * (2**20 + 1))
    for name, words in (
        ("bad.json", "can't be read"),
        ("bad.yaml", "can't be read"),
        ("gone.json", "can't be read"),
        ("list.json", "holds a list"),
        ("large.json", "bytes"),
        ("c.toml", "must end in .json, .yaml, .yml"),
    ):
        with pytest.raises(sostenuto.ConfigError, match=words) as caught:
            sostenuto.load_config(tmp_path / name)
        assert name in str(caught.value)


def test_two_methods_of_one_kind_keep_a_file_each(tmp_path):
    tables = [
        CacheTable((StepState.COMPUTE, {"blocks.0.attn": action, "blocks.0.mlp": other}), method="smoothcache")
        for action, other in ((Action.REUSE, Action.COMPUTE), (Action.COMPUTE, Action.REUSE))
    ]
    Config(SmoothCache(tables[0]) | SmoothCache(tables[1])).save(tmp_path / "c.json")
    first, second = parts(sostenuto.load_config(tmp_path / "c.json").method)
    assert [CacheTable.load(part.table) for part in (first, second)] == tables


def test_a_refused_file_leaves_the_network_alone(tmp_path):
    network = build_tiny()
    with pytest.raises(sostenuto.ConfigError):
        sostenuto.enable(network, tmp_path / "gone.json", scheduler=DDPMScheduler())
    assert not [module for module in network.modules() if "forward" in vars(module)]


def test_yaml_without_pyyaml_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text("method: fora")
    stock = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "yaml":
            raise ImportError(name)
        return stock(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "yaml", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(sostenuto.DependencyError, match="pip install pyyaml"):
        sostenuto.load_config(tmp_path / "c.yaml")


def test_a_table_in_a_file_that_scales_nothing_goes_with_what_scales(tmp_path):
    plain, scaled = tmp_path / "plain.json", tmp_path / "scaled.json"
    actions = (StepState.COMPUTE, StepState.REUSE_BOTH)
    CacheTable(actions).save(plain)
    CacheTable(actions, eps_scale=(0.98, 0.98)).save(scaled)
    config = Config(EBCache(plain) | EpsilonScaling(1.01))
    config.save(tmp_path / "config.json")
    assert sostenuto.load_config(tmp_path / "config.json") == config
    with pytest.raises(MethodError, match="each scales the noise"):
        EBCache(scaled) | EpsilonScaling(1.01)
    with pytest.raises(MethodError, match="each scales the noise"):  # of which nothing is known yet
        EBCache(tmp_path / "later.json") | EpsilonScaling(1.01)


def test_the_ending_of_a_name_may_be_in_capitals(tmp_path):
    Config(FORA(4)).save(tmp_path / "caching.JSON")
    assert json.loads((tmp_path / "caching.JSON").read_text())["method"] == {"name": "fora", "interval": 4}
    assert sostenuto.load_config(tmp_path / "caching.JSON").method == FORA(4)


def test_a_method_of_one_s_own_has_no_configuration(tmp_path):
    class Mine(FORA):
        name = "mine"

    with pytest.raises(sostenuto.ConfigError, match="Mine is none of sostenuto's methods"):
        Config(Mine()).save(tmp_path / "c.json")
    assert not (tmp_path / "c.json").exists()


def test_the_command_line_takes_a_file(tmp_path, capsys):
    path = write(tmp_path / "c.json", method={"name": "fora", "interval": 4}, max_cache_bytes=10**8)
    choice = ModelChoice(config=path)
    assert choice.method_object() == FORA(4)
    assert choice.max_cache_bytes() == 10**8
    assert ModelChoice().max_cache_bytes() is None
    with pytest.raises(sostenuto.InputError, match="--config says the method"):
        ModelChoice(config=path, table=path).method_object()
    assert main(["generate", "--config", str(tmp_path / "gone.json")]) == 1
    assert "gone.json can't be read" in capsys.readouterr().err


def test_the_page_s_examples_are_read(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text()
    found = re.findall(r"```(json|yaml)\n([\s\S]*?)```", page)
    assert [kind for kind, _ in found] == ["json", "yaml"]
    configs = []
    for kind, text in found:
        (tmp_path / f"c.{kind}").write_text(text)
        configs.append(sostenuto.load_config(tmp_path / f"c.{kind}"))
    assert configs[0].method == EBCache(tmp_path / "tables" / "pixart-50.json", eps_scale=0.99)
    assert configs[1] == Config(FORA(3) | Forecast(2), 2 * 10**9)


# --- the emergency switch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "off"), [("1", True), ("yes", True), ("anything", True), ("0", False), ("", False)])
def test_the_switch_attaches_nothing_and_says_so(value, off, monkeypatch):
    monkeypatch.setenv("SOSTENUTO_DISABLE", value)
    network, scheduler = build_tiny(), DDPMScheduler()
    stock, _ = sample_loop(network, scheduler)
    before = {name: dict(vars(module)) for name, module in network.named_modules()}
    with sostenuto.enable(network, "fora", scheduler=scheduler) as handle:
        touched = any(vars(module).keys() != before[name].keys() for name, module in network.named_modules())
        result, _ = sample_loop(network, scheduler)
        assert touched is not off
        assert torch.equal(stock, result) is off
        assert handle.enabled is not off
        assert handle.stats.as_dict()["disabled"] is off
        assert (handle.stats.num_steps, handle.stats.macs) == (0, 0) or not off
    handle.disable()


def test_the_switch_wins_over_whatever_is_wrong(monkeypatch):
    monkeypatch.setenv("SOSTENUTO_DISABLE", "1")
    handle = sostenuto.enable(object(), "no such method")
    assert (handle.predicted_cache_bytes, handle.stats.ideal_speedup) == (0, 1.0)
    handle.share(object())
    handle.listen(print)
    assert [f.name for f in fields(handle.stats)][-1] == "disabled"


@pytest.mark.parametrize("command", [["demo"], ["bench", "--methods", "fora"], ["studio"]])
def test_what_compares_cached_with_uncached_refuses_the_switch(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SOSTENUTO_DISABLE", "1")
    monkeypatch.chdir(tmp_path)
    assert main(command) == 1
    assert "SOSTENUTO_DISABLE is set" in capsys.readouterr().err


def test_images_of_a_switched_off_method_are_not_mixed_with_its_own(tmp_path, monkeypatch, capsys):
    words = ["generate", "--method", "fora", "--num-images", "2", "--num-inference-steps", "3", "--output"]
    output, numbers = tmp_path / "images", tmp_path / "numbers.json"
    monkeypatch.setenv("SOSTENUTO_DISABLE", "1")
    assert main([*words, str(output), "--json", str(numbers)]) == 0
    assert json.loads(numbers.read_text())["ideal_speedup"] == 1.0
    monkeypatch.delenv("SOSTENUTO_DISABLE")
    assert main([*words, str(output)]) == 1
    assert "holds images of a run with another method" in capsys.readouterr().err


def test_every_handle_says_its_method_and_what_it_holds(monkeypatch):
    def told(handle):
        return handle.method, handle.plan, handle.noise_scale, [*handle.sites], [*handle.last_actions]

    network = build_tiny()
    with sostenuto.enable(network, "fora", scheduler=DDPMScheduler()) as handle:
        assert told(handle) == (FORA(), None, None, sostenuto.inspect(network), [])
        assert JointHandle({"transformer": handle}).method == FORA()
    monkeypatch.setenv("SOSTENUTO_DISABLE", "1")
    assert told(sostenuto.enable(network, "fora")) == (None, None, None, [], [])


def test_the_switch_warns_once_in_a_process():
    program = (
        "import logging, sostenuto; logging.basicConfig(format='%(name)s %(levelname)s %(message)s')\n"
        "for _ in range(3): sostenuto.enable(None, 'fora')"
    )
    env = {**os.environ, "SOSTENUTO_DISABLE": "1"}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True)
    lines = [line for line in ran.stderr.splitlines() if line.startswith("sostenuto WARNING")]
    assert len(lines) == 1
    assert "SOSTENUTO_DISABLE is set" in lines[0]
