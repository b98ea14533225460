"""Which degree of forecast a network's features bear: the differences, and what is held fast meanwhile."""

import json
import sys
from pathlib import Path

import pytest
import torch

from sostenuto.demo.pipeline import load_demo_pipeline

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "scripts")]
import smoothness  # noqa: E402
from quality_tables import smoothness as table  # noqa: E402


def test_differences_of_a_polynomial_vanish_from_its_degree_on_and_those_of_noise_grow():
    parabola = [torch.tensor([1.0, 2.0]) * step**2 for step in range(1, 8)]
    first, second, third = smoothness.differences(parabola)
    assert second == pytest.approx(2 * 5**0.5 / (20 * 5**0.5))  # 2 over the mean of 1, 4 … 49
    assert first > second > third == pytest.approx(0, abs=1e-6)
    noise = torch.randn(7, 10_000, generator=torch.Generator().manual_seed(0)).unbind()
    first, second, third = smoothness.differences(noise)
    assert second / first == pytest.approx(3**0.5, rel=0.05)
    assert third / second == pytest.approx((20 / 6) ** 0.5, rel=0.05)


def test_the_demo_answers_the_latents_smoothly_and_the_timestep_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["smoothness.py", "--num-samples", "2", "--json", str(tmp_path / "s.json")])
    smoothness.main()
    found = json.loads((tmp_path / "s.json").read_text())
    ratios = {(row["step"], row["moves"]): row["differences"][2] / row["differences"][1] for row in found["rows"]}
    assert len(ratios) == 9
    assert all(ratio < 1 for (_, moves), ratio in ratios.items() if moves == "latents")
    assert all(ratio > 1 for (_, moves), ratio in ratios.items() if moves != "latents")
    assert capsys.readouterr().out.count("\n") == 10
    assert table(found).count("\n|") == 10
    network = load_demo_pipeline().transformer
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
