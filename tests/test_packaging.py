"""What is installed: complete, typed, quick to import, and with nothing optional loaded before it is used."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import release_check

ROOT = release_check.ROOT
OPTIONAL = [
    "accelerate",
    "DeepCache",
    "PIL",
    "SmoothCache",
    "cache_dit",
    "diffusers",
    "gradio",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "mkdocs",
    "opentelemetry",
    "peft",
    "scipy",
    "skimage",
    "torchao",
    "torchmetrics",
    "torchvision",
    "tqdm",
    "transformers",
    "tyro",
    "yaml",
]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    pytest.importorskip("hatchling")
    return release_check.build(ROOT, tmp_path_factory.mktemp("dist"))


def run(program, **env):
    """Standard output of a Python program in a process of its own."""
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(__file__),
        env={**os.environ, **env},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_wheel_and_sdist_hold_what_they_must(distributions):
    wheel, sdist = distributions
    assert not list(release_check.missing("the wheel", release_check.wheel_names(wheel), release_check.IN_WHEEL))
    assert not list(release_check.missing("the sdist", release_check.sdist_names(sdist), release_check.IN_SDIST))


def test_the_wheel_holds_every_file_of_the_package(distributions):
    package = ROOT / "src"
    ours = {
        path.relative_to(package).as_posix()
        for path in (package / "sostenuto").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in release_check.wheel_names(distributions[0]) if ".dist-info/" not in name}
    assert held == ours


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """A folder with the package as pip installs it, compiled."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*pip, str(distributions[0])], check=True)
    return folder


def test_the_installed_wheel_works_by_itself(installed):
    told = run(
        """
        import pathlib, sostenuto, sostenuto.tables
        home = pathlib.Path(sostenuto.__file__).parent
        print(home, sostenuto.__version__, (home / "py.typed").exists(), len(list((home / "tables").glob("*.json"))))
        """,
        PYTHONPATH=str(installed),
    )
    tables = len(list((ROOT / "src/sostenuto/tables").glob("*.json")))
    assert told == f"{installed / 'sostenuto'} {release_check.versions(ROOT)['pyproject.toml']} True {tables}"


def test_the_import_takes_less_than_a_fifth_of_a_second_beyond_torch(installed):
    program = """
        import time, torch
        began = time.process_time()
        import sostenuto
        print(time.process_time() - began)
    """
    assert any(float(run(program, PYTHONPATH=str(installed))) < 0.2 for _ in range(6))  # other tests run beside it


PLAIN = """
    import sys, torch
    from torch import nn
    before = set(sys.modules)

    class Hiding:  # as if these were not installed
        def __init__(self, finder):
            self.finder = finder
        def find_spec(self, name, path=None, target=None):
            hidden = name.partition(".")[0] in %r
            return None if hidden else self.finder.find_spec(name, path, target)

    sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
    for name in [name for name in sys.modules if name.partition(".")[0] in %r]:
        del sys.modules[name]
    import sostenuto

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(4, 16)
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(16, 4)
        def forward(self, x, timestep):
            return self.head(self.encoder(self.embed(x) + timestep.float()[:, None, None] / 1000))

    class scheduler:
        timesteps = None

    torch.backends.mha.set_fastpath_enabled(False)
    network, x = Network().eval(), torch.randn(1, 6, 4)
    with sostenuto.enable(network, "fora", scheduler=scheduler) as handle, torch.no_grad():
        scheduler.timesteps = torch.linspace(1000, 1, 6)
        for timestep in scheduler.timesteps:
            x = x - network(x, timestep.expand(1)) / 6
    print(handle.stats.actions["reuse"], handle.stats.macs < handle.stats.macs_uncached)
    print(sorted({name.partition(".")[0] for name in set(sys.modules) - before} & set(%r)))
"""


def test_nothing_optional_is_needed_or_loaded_for_a_plain_network():
    told = run(PLAIN % (OPTIONAL, OPTIONAL, OPTIONAL)).splitlines()
    assert told == ["8 True", "[]"]  # 2 of 6 steps reused, 2 blocks of 2 branches


def test_every_module_of_the_core_imports_without_anything_optional():
    core = [
        f"sostenuto.{path.relative_to(ROOT / 'src/sostenuto').with_suffix('').as_posix().replace('/', '.')}"
        for path in sorted((ROOT / "src/sostenuto").rglob("*.py"))
        if path.parts[-2] not in ("analysis", "cli", "demo", "zoo", "quality", "report", "studio", "bench", "peers")
        and path.name not in ("__init__.py", "__main__.py")
    ]
    program = PLAIN.partition("    import sostenuto\n")[0] + f"    import importlib\n    for name in {core!r}:\n"
    run((program + "        importlib.import_module(name)\n") % (OPTIONAL, OPTIONAL))
    assert "sostenuto.telemetry" in core
    assert "sostenuto.comfyui.nodes" in core


@pytest.mark.parametrize("command", ["sostenuto", "sostenuto.demo.train", "sostenuto.demo.train_classifier"])
def test_help_is_told_without_loading_what_only_the_command_itself_needs(command):
    told = run(
        f"""
        import contextlib, io, runpy, sys
        sys.argv = ["{command}", "--help"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            runpy.run_module("{command}", run_name="__main__", alter_sys=True)
        heavy = {{"diffusers", "transformers", "matplotlib", "peft"}}
        print(sorted({{name.partition(".")[0] for name in sys.modules}} & heavy))
        """
    )
    assert told == "[]"


def test_the_extras_are_documented():
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = re.findall(r"^(\w+) = ", section, re.MULTILINE)
    page = (ROOT / "docs" / "install.md").read_text()
    assert {"diffusers", "cli", "yaml", "telemetry", "dev"} <= set(extras)
    assert [extra for extra in extras if f"`{extra}`" not in page] == []


def test_the_conda_recipe_asks_for_what_the_package_does():
    yaml = pytest.importorskip("yaml")
    recipe = yaml.safe_load((ROOT / "conda" / "recipe.yaml").read_text())
    text = (ROOT / "pyproject.toml").read_text()
    wanted = re.findall(r'"([\w-]+)(>=[\d.]+)"', re.search(r"^dependencies = (\[.*\])$", text, re.MULTILINE)[1])
    names = {"torch": "pytorch"}
    run_needs = recipe["requirements"]["run"]
    assert [f"{names.get(name, name)} {bound}" for name, bound in wanted] == run_needs[1:]
    assert run_needs[0] == "python " + re.search(r'requires-python = "([^"]+)"', text)[1]
    extras = dict(re.findall(r'"([\w-]+)(>=[\d.]+)"', text.partition("[project.optional-dependencies]")[2]))
    other = {"matplotlib-base": "matplotlib"}
    for need in recipe["requirements"]["run_constraints"]:
        name, bound = need.split()
        assert extras[other.get(name, name)] == bound
    (entry,) = recipe["build"]["python"]["entry_points"]
    assert entry.replace(" = ", ' = "') + '"' in text
