import json
import logging
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file

import sostenuto
from conftest import build_tiny
from sostenuto import ABCache, Forecast
from sostenuto.cli import main
from sostenuto.cli.common import SamplerChoice
from sostenuto.demo import compare as comparison
from sostenuto.demo.compare import compare
from sostenuto.demo.compare import entries as all_entries
from sostenuto.demo.rows import Settings, batches_of, share_of
from sostenuto.refusals import check_graph
from unets import build_plain


def test_methods_and_inspect_write_what_they_print(tmp_path, capsys):
    assert main(["methods", "--json", str(tmp_path / "m.json")]) == 0
    names = [row["name"] for row in json.loads((tmp_path / "m.json").read_text())]
    assert {"none", "eb", "fora", "epsilon-scaling"} <= set(names)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert main(["inspect", "--json", str(tmp_path / "s.json")]) == 0
    sites = json.loads((tmp_path / "s.json").read_text())
    assert len(sites) == 16
    assert sites[0]["id"] == "transformer_blocks.0.attn1"


def test_the_rows_say_what_works_on_a_unet_and_on_a_compiled_network(tiny, scheduler):
    def taken(check, *arguments):
        try:
            check(*arguments)
        except sostenuto.SostenutoError:
            return False
        return True

    unet = build_plain()
    for kind in sostenuto.available_methods().values():
        method = ABCache() | kind() if kind is Forecast else kind()  # which is nothing by itself
        fits = taken(lambda method: sostenuto.enable(unet, method, scheduler=scheduler).disable(), method)
        assert fits == (kind.denoisers != "transformer"), kind
        compiles = taken(check_graph, kind(), tiny, True)
        assert compiles == (kind.compiles and "compiled only" not in kind.summary), kind


def test_inspect_groups_the_sites_of_a_tiny_network_and_proves_them(capsys, tmp_path):
    numbers = tmp_path / "s.json"
    assert main(["inspect", "--model", "tiny:FluxTransformer2DModel", "--verify", "--json", str(numbers)]) == 0
    printed = capsys.readouterr().out
    assert "tiny: FluxTransformer2DModel" in printed
    assert re.search(r"transformer_blocks\.0-\d\.attn +joint-attention", printed)
    assert re.search(r"single_transformer_blocks\.0-\d\.proj_out +fused", printed)
    assert re.search(r"9 sites in \d blocks: 2 joint-attention, 4 mlp, 3 fused|9 sites", printed)
    assert "proved: 9 sites" in printed
    assert re.search(r"reuse of stack +leaves +\d+\.\d%", printed)
    assert len(json.loads(numbers.read_text())) == 9
    assert main(["inspect", "--model", "tiny:FluxTransformer"]) == 1
    assert "no tiny 'FluxTransformer'; there are FluxTransformer2DModel" in capsys.readouterr().err


class TwoNetworks:
    """Stands for a pipeline with a network for each half of the steps."""

    def __init__(self, first, second):
        self.transformer, self.transformer_2, self.scheduler = first, second, DDPMScheduler()

    def __call__(self, prompt, num_inference_steps, generator, output_type):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(1, 2, 8, 8, generator=generator)
        for step, timestep in enumerate(self.scheduler.timesteps):
            network = self.transformer if 2 * step < num_inference_steps else self.transformer_2
            with torch.no_grad():
                latents = network(latents, timestep.expand(1), torch.tensor([1])).sample[:, :2]


def test_inspect_shows_every_denoiser_of_a_pipeline(capsys, monkeypatch):
    pipes = [TwoNetworks(build_tiny(2), build_tiny(3)), DDPMPipeline(build_plain(1), DDPMScheduler())]
    monkeypatch.setattr(SamplerChoice, "_load", lambda self: pipes[int(self.model)])
    assert main(["inspect", "--model", "0", "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "transformer: DiTTransformer2DModel" in printed
    assert "transformer_2: DiTTransformer2DModel" in printed
    assert "transformer_blocks.0-1.attn1" in printed
    assert "transformer_blocks.0-2.attn1" in printed
    assert "in front: norm1" in printed
    assert printed.count("proved: ") == 2
    assert main(["inspect", "--model", "1", "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "unet: UNet2DModel" in printed
    assert "deep" in printed
    assert "beyond connection 0" in printed
    assert "proved: 1 sites" in printed


def test_a_failure_is_one_line_and_exit_status_1(tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{")
    assert main(["generate", "--table", str(tmp_path / "bad.json")]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("sostenuto: ")
    assert "\n" not in error
    assert main(["generate", "--labels", "11", "--method", "none", "--num-inference-steps", "1"]) == 1
    assert "out of range" in capsys.readouterr().err
    assert main(["--debug", "generate", "--method", "nonsense"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_wrong_usage_is_exit_status_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--no-such-option"])
    assert stopped.value.code == 2
    capsys.readouterr()


def test_generate_refuses_a_name_without_a_picture_s_ending_before_it_generates(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sostenuto.cli.common.SamplerChoice.pipeline", lambda _: pytest.fail("a model was loaded"))
    assert main(["generate", "--output", str(tmp_path / "images")]) == 1
    assert "images.png" in capsys.readouterr().err


def test_generate_writes_a_picture_and_statistics(tmp_path, capsys):
    arguments = ["--method", "fora", "--num-inference-steps", "4", "--labels", "1", "8"]
    out, numbers = tmp_path / "g.png", tmp_path / "g.json"
    assert main(["generate", *arguments, "--output", str(out), "--json", str(numbers)]) == 0
    assert out.read_bytes()[:4] == b"\x89PNG"
    stats = json.loads(numbers.read_text())
    assert stats["ideal_speedup"] > 1
    assert stats["speedup"] > 0
    assert "×" in capsys.readouterr().out


def test_a_calibration_that_was_stopped_stands_in_no_other_s_way(tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr(sostenuto, "calibrate", lambda *_, folder, **__: folders.append(folder) or 1 / 0)
    words = ["calibrate", "--output", str(tmp_path / "t.json")]
    for more in ((), (), ("--seed", "2"), ("--target-fraction", "0.5"), ("--labels", "3"), ("--method", "feb")):
        assert main([*words, *more]) == 1
    assert folders[0] == folders[1]
    assert len(set(folders)) == 5
    assert {folder.parent for folder in folders} == {tmp_path}
    assert main([*words, "--method", "smoothcache"]) == 1
    assert folders[-1] is None  # one run, of which nothing is kept


def test_calibrate_and_verify_with_the_table(tmp_path, capsys):
    table = str(tmp_path / "t.json")
    few = ["--num-inference-steps", "6", "--labels", "1", "8"]
    arguments = ["--num-samples", "2", "--search-images", "10", "--eps-scale-grid", "0.98", "1.0", "--output", table]
    assert main(["calibrate", *few, *arguments]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]  # what the search kept is gone
    assert main(["verify", *few, "--table", table]) == 0
    assert "proved: 16 sites" in capsys.readouterr().out


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--output", str(folder), "--num-images", "4", "--batch-size", "4", "--search-images", "0",
                 "--json", str(folder / "demo.json")]) == 0  # fmt: skip
    return folder, json.loads((folder / "demo.json").read_text())


def test_demo_writes_the_documented_json(demo_run):
    _, results = demo_run
    assert results["n"] == 4
    assert results["seed"] == 0
    assert {"torch", "processor"} <= set(results["machine"])
    first = results["rows"][0]
    assert first["name"] == "uncached"
    assert first["speedup"] == first["ideal_speedup"] == 1.0
    documented = {"name", "method", "num_inference_steps", "wall_s", "speedup", "ideal_speedup", "frechet_distance",
                  "inception_score", "class_accuracy", "psnr"}  # fmt: skip
    assert all(documented <= set(row) for row in results["rows"])
    ideal = {row["name"]: row["ideal_speedup"] for row in results["rows"]}
    assert ideal["20 steps"] == pytest.approx(2.5)
    assert 1.4 < ideal["EB-Cache 1.5×"] < 2 < ideal["EB-Cache 2.5×"] < 3.2


def test_demo_page_is_self_contained_and_holds_the_numbers(demo_run):
    folder, results = demo_run
    page = (folder / "demo.html").read_text()
    assert all(link not in page for link in ('src="http', 'href="', "url(", "import "))
    embedded = page.split('id="results">')[1].split("</script>")[0]
    assert json.loads(embedded.replace("\\u003c", "<"))["rows"] == results["rows"]
    assert page.count("data:image/png;base64,") == 3
    assert (folder / "demo.png").stat().st_size > 20_000
    assert (folder / "same-noise.png").stat().st_size > 5_000


def test_an_interrupted_demo_goes_on_with_the_same_images(demo_run, tmp_path):
    folder, results = demo_run
    lost = sorted((folder / "batches").iterdir())[3]
    before_loss = load_file(lost)["images"]
    lost.unlink()
    again = compare(folder, Settings(num_images=4, batch_size=4, search_images=0), show=False)
    assert torch.equal(load_file(lost)["images"], before_loss)
    for before, after in zip(results["rows"], again["rows"], strict=True):
        assert before["frechet_distance"] == pytest.approx(after["frechet_distance"])


def test_a_folder_of_another_run_is_refused(demo_run):
    folder, _ = demo_run
    with pytest.raises(sostenuto.InputError, match="search_images"):  # the tables are those of another search
        compare(folder, Settings(num_images=4, batch_size=4, search_images=8), show=False)


def test_a_comparison_in_bfloat16_says_so_and_differs(tmp_path, monkeypatch, demo_run):
    monkeypatch.setattr(comparison, "entries", lambda *tables: all_entries(*tables)[:2])
    results = compare(tmp_path, Settings(num_images=4, batch_size=4, search_images=0, dtype="bfloat16"), show=False)
    assert results["machine"]["dtype"] == "bfloat16"
    first = next((tmp_path / "batches").glob("none-*-seed0-00000-*.safetensors")).name
    single, half = (load_file(folder / "batches" / first)["images"] for folder in (demo_run[0], tmp_path))
    difference = (single[:4].float() - half.float()).abs()
    assert difference.max() > 0
    with pytest.raises(sostenuto.InputError, match="dtype"):
        compare(tmp_path, Settings(num_images=4, batch_size=4, search_images=0), show=False)


@pytest.mark.slow
def test_more_images_go_on_from_those_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "entries", lambda *tables: all_entries(*tables)[1:3])
    few, many, odd = (Settings(num_images=n, batch_size=2, search_images=0) for n in (4, 6, 5))
    compare(tmp_path, few, show=False)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "batches").iterdir()}
    assert compare(tmp_path, many, show=False)["n"] == 6
    assert len(list((tmp_path / "batches").iterdir())) == len(made) * 3 // 2
    assert compare(tmp_path, odd, show=False)["n"] == 5  # half a batch is another one
    assert {path: path.stat().st_mtime_ns for path in made} == made


@pytest.mark.slow
def test_shards_share_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "entries", lambda *tables: all_entries(*tables)[:3])
    halves = [Settings(num_images=4, batch_size=2, search_images=0, shard=(part, 2)) for part in (0, 1)]
    assert compare(tmp_path, halves[0], show=False)["missing"] == 3
    assert len(compare(tmp_path, halves[1], show=False)["rows"]) == 3


def test_shards_get_as_much_to_do_where_each_seed_leaves_a_rest():
    settings = Settings(num_images=60, batch_size=50, seeds=(0, 1, 2, 3), shard=(0, 2))
    first, second = share_of(settings), share_of(replace(settings, shard=(1, 2)))
    assert [sum(len(labels) for _, _, labels in part) for part in (first, second)] == [120, 120]
    assert {batch[:2] for batch in first + second} == {batch[:2] for batch in batches_of(settings)}


@pytest.mark.parametrize("wrong", [{"num_images": 3}, {"batch_size": 0}, {"seeds": ()}, {"shard": (2, 2)}])
def test_settings_without_meaning_are_refused(wrong):
    with pytest.raises(ValueError, match=r"needs|shard"):
        Settings(**wrong)


@pytest.mark.parametrize("name", ["ddim", "DDIMSheduler", "DDIMmScheduler"])
def test_a_scheduler_that_is_misspelt_is_told_and_not_taken_for_an_old_diffusers(name, capsys):
    assert main(["generate", "--scheduler", name]) == 1
    assert f"diffusers has no scheduler {name!r}" in capsys.readouterr().err


def test_a_model_that_is_nowhere_is_told_without_asking_the_hub(capsys):
    assert main(["inspect", "--model", "models/that/is/nowhere"]) == 1
    assert "there is no folder 'models/that/is/nowhere', and it is no hub id" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "command", "words"),
    [
        ("tyro", ["methods"], "the command line needs tyro: pip install 'sostenuto[cli]'"),
        ("diffusers", ["inspect"], "diffusers can't be imported"),
        ("PIL", ["inspect"], "this needs the package PIL: pip install 'sostenuto[demo]'"),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_extra_that_brings_it(missing, command, words):
    program = (
        f"import sys; sys.modules[{missing!r}] = None; from sostenuto.cli import main; sys.exit(main({command!r}))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith(f"sostenuto: {words}")


def test_methods_are_listed_with_their_presets_and_whether_they_work_compiled(tmp_path, capsys):
    assert main(["methods", "--json", str(tmp_path / "methods.json")]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "methods.json").read_text())}
    assert "flux_dev" in rows["taylorseer"]["presets"]
    assert "taylorseer.flux_dev" in capsys.readouterr().out
    assert [rows[name]["compiles"] for name in ("fora", "toca", "teacache", "duca")] == [True, False, False, True]


def test_a_class_that_cannot_be_checked_is_named(monkeypatch, capsys):
    from sostenuto.families import ANATOMIES

    monkeypatch.setitem(ANATOMIES, "Own", ANATOMIES["DiTTransformer2DModel"])
    assert main(["models", "--check", "--names", "Own"]) == 1
    assert "there is no tiny Own to check" in capsys.readouterr().err


def test_what_draws_is_named_where_it_is_missing(tmp_path):
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import sostenuto\nfrom sostenuto.tuning.result import Tuned\n"
        "try: Tuned.draw(None, sys.argv[1])\n"
        "except sostenuto.DependencyError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "pip install 'sostenuto[report]'" in ran.stdout


def test_what_torchao_says_of_itself_is_not_shown_but_for_debug(monkeypatch, capsys):
    monkeypatch.setattr("sostenuto.cli._QUIET", ("a.package",))
    for debug, level in ((["--debug"], logging.NOTSET), ([], logging.ERROR)):
        assert main(["methods", *debug]) == 0
        assert logging.getLogger("a.package").level == level
