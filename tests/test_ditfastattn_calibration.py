"""DiTFastAttn's calibration: the loss by hand, the greedy search against a naive one, and what becomes of its table."""

import pytest
import torch

import sostenuto
from conftest import sample_loop
from naive_attention import SITES, WG, C, G, R, W, guided_loop, naive_copy
from sostenuto import CacheTable, DiTFastAttn, DiTFastAttnCalibration, TableError
from sostenuto.attention_tap import is_guided, usual_half
from sostenuto.calibrations.ditfastattn import CANDIDATES, compression_loss
from sostenuto.cli import ModelChoice, main
from sostenuto.zoo import TINY_MODELS
from tiny_pixart import build_pixart


def test_the_loss_by_hand():
    y, y_hat = torch.tensor([2.0, -2.0, 1.0, 0.0]), torch.tensor([1.0, -1.0, -1.0, 5.0])
    assert compression_loss(y, y_hat) == pytest.approx((0.5 + 0.5 + 2 + 1) / 4)
    assert compression_loss(y, y_hat, "ratio_signed") == pytest.approx((0.5 + 0 + 2 + 1) / 4)  # −1/−1 is clipped to 0
    assert compression_loss(torch.tensor([-1.0]), torch.tensor([0.0]), "ratio_signed") == 10
    assert compression_loss(y, y) == 0


def calibrated(model, scheduler, calibration, num_steps=4, loop=guided_loop, num_samples=4):
    def sample(model, generator, num_inference_steps):
        return loop(model, scheduler, num_inference_steps)

    return sostenuto.calibrate(
        model, calibration, sample, num_inference_steps=num_steps, num_samples=num_samples, scheduler=scheduler
    )


@pytest.mark.parametrize("loss", ["ratio_abs", "ratio_signed"])
def test_the_greedy_plan_keeps_the_bound_and_takes_the_cheapest_that_does(tiny, scheduler, loss):
    theta, window = 0.35, 2
    table = calibrated(tiny, scheduler, DiTFastAttnCalibration(theta, window, loss=loss))
    rows = [tuple(step[site] for site in SITES) for step in table.actions]
    assert len({action for row in rows for action in row}) >= 3  # the bound matters
    naive, attentions = naive_copy(tiny, window)
    checked = []

    def run(row, keep, *inputs):
        for attention, action in zip(attentions, row, strict=True):
            attention.action, attention.keep = action, keep
        return naive(*inputs).sample

    def gap(y, y_hat):
        largest = torch.maximum(y, y_hat) if loss == "ratio_signed" else torch.maximum(y.abs(), y_hat.abs())
        return ((y - y_hat).abs() / (largest + 1e-6)).clip(0, 10).mean().item()

    class Checked:
        def __call__(self, *inputs):
            row = rows[len(checked)]
            fresh = run((C, C, C), False, *inputs)
            for layer, action in enumerate(row):
                bound = (layer + 1) / 3 * theta
                tried = [*CANDIDATES, C]
                for candidate in tried[: tried.index(action) + 1] if checked else []:
                    if candidate is C:
                        continue
                    loss = gap(fresh, run((*row[:layer], candidate, *(C,) * (2 - layer)), False, *inputs))
                    assert (loss < bound) == (candidate is action)
            checked.append(row)
            return type("Out", (), {"sample": run(row, True, *inputs)})

    guided_loop(Checked(), scheduler, 4)
    assert rows[0] == (C, C, C)
    assert len(checked) == 4
    method = DiTFastAttn(table)
    with sostenuto.enable(tiny, method, scheduler=scheduler) as handle:
        guided_loop(tiny, scheduler, 4)
        assert handle.stats.macs / handle.stats.macs_uncached == pytest.approx(table.macs_fraction)
        assert handle.method.window == window


def test_the_bound_decides_between_nothing_and_the_cheapest(tiny, scheduler):
    strict = calibrated(tiny, scheduler, DiTFastAttnCalibration(1e-9), 2)
    assert all(action is C for step in strict.actions for action in step.values())
    assert strict.macs_fraction == 1
    loose = calibrated(tiny, scheduler, DiTFastAttnCalibration(1e9), 2)
    assert all(action is R for step in loose.actions[1:] for action in step.values())
    windows = calibrated(tiny, scheduler, DiTFastAttnCalibration(1e9, candidates=(W, G)), 2)
    assert all(action is W for step in windows.actions[1:] for action in step.values())
    wide = calibrated(tiny, scheduler, DiTFastAttnCalibration(1e9, 8, candidates=(W,)), 2)
    assert wide.macs_fraction == 1  # two chunks that see all 16 tokens save nothing


@pytest.mark.parametrize("separate", [False, True])
def test_without_guidance_in_the_batch_nothing_is_shared_between_its_halves(tiny, scheduler, separate):
    def loop(model, scheduler, num_steps):
        return sample_loop(model, scheduler, num_steps, separate_guidance=separate)

    table = calibrated(tiny, scheduler, DiTFastAttnCalibration(0.3, candidates=(WG, G, W)), 2, loop)
    actions = {action for step in table.actions for action in step.values()}
    assert actions <= {C, W}
    assert table.calibration["num_samples"] == 4  # two generations of two rows each, which vote
    with sostenuto.enable(tiny, DiTFastAttn(table), scheduler=scheduler):
        loop(tiny, scheduler, 2)


def test_a_pass_that_begins_late_or_pauses_begins_by_computing(tiny, scheduler):
    """While calibrating as with the table: guidance in calls of its own, at steps 1 and 3."""
    outputs = []

    def loop(model, scheduler, num_steps):
        outputs.append(torch.stack(sample_loop(model, scheduler, num_steps, separate_guidance=(1, 3))[1]))

    for candidate in (R, W):
        calibration = DiTFastAttnCalibration(1e9, 2, candidates=(candidate,))
        table = calibrated(tiny, scheduler, calibration, 4, loop, num_samples=2)
        assert all(action is candidate for step in table.actions[1:] for action in step.values())
        with sostenuto.enable(tiny, DiTFastAttn(table), scheduler=scheduler):
            loop(tiny, scheduler, 4)
        torch.testing.assert_close(outputs[-1], outputs[-2])


def test_guidance_in_one_call_is_seen_in_a_list_of_samples_too():
    one, other, small = torch.randn(2, 4, 1, 8, 8), torch.randn(2, 4, 1, 8, 8), torch.randn(4, 1, 8, 4)
    assert is_guided([*one, *one])
    assert not is_guided([*one, *other])
    assert is_guided([one[0], small, one[0], small])
    assert not is_guided([one[0], small, small, one[0]])


def test_the_search_keeps_one_output_and_one_residual_per_layer(tiny, scheduler):
    seen = []

    def sample(model, generator, num_inference_steps):
        guided_loop(model, scheduler, num_inference_steps)
        seen.append(vars(model)["_sostenuto_handle"]._record.bytes_peak)

    calibration = DiTFastAttnCalibration(0.3)
    sostenuto.calibrate(tiny, calibration, sample, num_inference_steps=3, num_samples=4, scheduler=scheduler)
    assert seen == [3 * 2 * (4 * 16 * 32 * 4)]


def test_a_table_comes_back_from_its_file_with_window_and_half(tiny, scheduler, tmp_path):
    table = calibrated(tiny, scheduler, DiTFastAttnCalibration(0.35, 2))
    table.save(tmp_path / "table.json")
    with sostenuto.enable(tiny, DiTFastAttn(table), scheduler=scheduler):
        expected, _ = guided_loop(tiny, scheduler, 4)
    with sostenuto.enable(tiny, DiTFastAttn(tmp_path / "table.json"), scheduler=scheduler) as handle:
        got, _ = guided_loop(tiny, scheduler, 4)
        assert (handle.method.window, handle.method.conditional_half) == (2, "first")
    assert torch.equal(got, expected)
    bad = (tmp_path / "table.json").read_text().replace('"compute"', '"sideways"')
    (tmp_path / "table.json").write_text(bad)
    with pytest.raises(TableError, match=r"window\+share-guidance"):
        CacheTable.load(tmp_path / "table.json")


def test_the_presets_are_the_published_ones():
    d3 = DiTFastAttnCalibration.dit_xl_2(3)
    assert (d3.theta, d3.window, d3.conditional_half) == (0.075, 128, "first")
    assert DiTFastAttnCalibration.pixart_alpha(6) == DiTFastAttnCalibration(0.15, 512, "second")
    assert DiTFastAttnCalibration.pixart_sigma(1).window == DiTFastAttn.pixart_sigma().window == 2048
    assert DiTFastAttnCalibration.open_sora(5, 50) == DiTFastAttnCalibration(0.05, 50, "first")
    assert DiTFastAttn.open_sora() == DiTFastAttn(window=200, conditional_half="first")


def test_the_command_line_calibrates_and_takes_the_table(tmp_path, capsys):
    path = tmp_path / "t.json"
    choice = ["--method", "ditfastattn", "--num-inference-steps", "2", "--labels", "3", "--guidance-scale", "2"]
    assert main(["calibrate", *choice, "--num-samples", "1", "--theta", "100", "--output", str(path)]) == 0
    method = ModelChoice(method="ditfastattn", table=path).method_object()
    assert method == DiTFastAttn(path)
    assert CacheTable.load(path).calibration["theta"] == 100
    capsys.readouterr()


def test_the_conditional_half_is_where_the_pipelines_of_such_a_network_put_it(tiny):
    assert usual_half(tiny) == "first"  # class labels
    assert usual_half(build_pixart()) == "second"  # prompts
    assert usual_half(TINY_MODELS["FluxTransformer2DModel"].build()) == "second"
