"""Hostile files, parameters and command lines: what reads them must refuse them in one sentence of ours, or take them whole."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import DDPMScheduler
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

import sostenuto
from conftest import build_tiny
from sostenuto import cli
from sostenuto.bench.rows import Row, read_results
from sostenuto.config import load_config
from sostenuto.demo.batches import read_batch
from sostenuto.errors import InputError, SostenutoError, TableError
from sostenuto.methods.base import Facts
from sostenuto.report.bench_table import terminal_table

COUNTS: Counter[str] = Counter()
"""Inputs so far, by what read them."""
ACCEPTED: Counter[str] = Counter()
"""How many of them made sense."""

_FOLDER = tempfile.TemporaryDirectory()
FOLDER = Path(_FOLDER.name)
_MODEL = build_tiny()
_SCHEDULER = DDPMScheduler(beta_schedule="linear")
_SCHEDULER.set_timesteps(4)
_SITES = [site.id for site in sostenuto.inspect(_MODEL)]
_TIMESTEPS = tuple(_SCHEDULER.timesteps.tolist())

# --- strategies ------------------------------------------------------------------------------------------------------

_NUMBERS = st.one_of(
    st.integers(-3, 60),
    st.sampled_from([2**31, 2**63, -(2**64), 10**400, 1e308, 5e-324, float("nan"), float("inf"), -0.0, True]),
    st.floats(),
)
_TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["", ".", "..", "/dev/zero", "\0", "compute", "é\ud800", "a/../b"])
)
_SCALARS = st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXTS)
JSONS = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def _damaged(valid: bytes) -> st.SearchStrategy[bytes]:
    """The bytes of a file with some of them replaced, or cut off."""

    def damage(at: int, gone: int, put: bytes) -> bytes:
        return valid[:at] + put + valid[at + gone :]

    place = st.integers(0, len(valid))
    replaced = st.builds(damage, place, st.integers(0, 40), st.binary(max_size=12))
    return st.one_of(replaced, place.map(lambda end: valid[:end]), st.binary(max_size=200))


@st.composite
def _changed(draw: Any, content: dict[str, Any]) -> dict[str, Any]:
    """An object with some of its values, at any depth, replaced, left out or put elsewhere."""
    changed = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        owner: Any = changed
        while True:
            keys = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(owner[key], (dict, list)) and owner[key] and draw(st.booleans()):
                owner = owner[key]
                continue
            if draw(st.integers(0, 4)):
                owner[key] = draw(JSONS)
            else:
                del owner[key]
            break
    return changed


def _texts(content: dict[str, Any]) -> st.SearchStrategy[bytes]:
    valid = json.dumps(content).encode()
    return st.one_of(
        _changed(content).map(lambda changed: json.dumps(changed).encode()),
        JSONS.map(lambda value: json.dumps(value).encode()),
        _damaged(valid),
    )


# --- readers ---------------------------------------------------------------------------------------------------------


def _reads(name: str, path: Path, content: bytes, load: Callable[[Path], Any], error: type = TableError) -> Any:
    """What is loaded of a file with this content, or ``None`` where it is refused as it should be."""
    COUNTS[name] += 1
    path.write_bytes(content)
    try:
        value = load(path)
    except error:
        return None
    ACCEPTED[name] += 1
    return value


def _same_again(value: Any) -> None:
    """Saved and loaded it is the same."""
    path = FOLDER / "again"
    value.save(path)
    assert type(value).load(path) == value


def _used(*uses: Callable[[], Any]) -> None:
    """Whatever was accepted works, or is refused later in a sentence of ours."""
    for use in uses:
        with contextlib.suppress(SostenutoError):
            use()


def _use_table(table: sostenuto.CacheTable) -> None:
    _same_again(table)
    _used(
        lambda: table.check(_MODEL, _SCHEDULER),
        lambda: table.check_steps(_TIMESTEPS),
        lambda: table.plan(sostenuto.inspect(_MODEL)),
        lambda: table.resample(7).strip(),
        lambda: table.filled(1),
    )


_TABLE = {
    "format": "sostenuto-cache-table",
    "version": 1,
    "method": "eb",
    "order": "sampling",
    "num_inference_steps": 3,
    "eps_scale": [1.0, 0.9, 1.1],
    "forecast_order": 0,
    "fill": "branches",
    "include_cross": True,
    "actions": ["compute", "reuse-attn", dict.fromkeys(_SITES, "reuse")],
    "model": {"class": "DiTTransformer2DModel", "num_blocks": 3, "fingerprint": "00"},
    "scheduler": {"class": "DDPMScheduler", "prediction_type": "epsilon", "timesteps": [900, 500, 100]},
    "calibration": {"threshold": [0.1]},
    "macs_fraction": 0.5,
}


def tables() -> Callable[[], None]:
    @given(_texts(_TABLE))
    @example(b"[" * 100_000)
    @example(b'{"format": "sostenuto-cache-table", "version": 1, "actions": ' + b"9" * 5000 + b"}")
    @example(json.dumps(_TABLE | {"model": {"fingerprint": "ff", "class": [1]}}).encode())
    @example(json.dumps(_TABLE | {"model": {"more": float("inf")}}).encode())
    @example(json.dumps(_TABLE).replace("0.5", "1e999").encode())
    @example(json.dumps(_TABLE | {"scheduler": {"class": {"a": 1}, "prediction_type": 3}}).encode())
    def test(content: bytes) -> None:
        table = _reads("cache table", FOLDER / "table.json", content, sostenuto.CacheTable.load)
        if table is not None:
            _use_table(table)

    return test


def _npy(shape: str, descr: str, order: str, data: bytes, version: int) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode("latin1", "replace")
    length = struct.pack("<H", len(header) % 65536) if version == 1 else struct.pack("<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


def arrays() -> Callable[[], None]:
    buffer = io.BytesIO()
    np.save(buffer, np.array([0, 1, 2, 0]))
    made = st.builds(
        _npy,
        st.sampled_from(
            ["(4,)", "()", "(0,)", "(2, 2)", "(99999999999999,)", "(-1,)", "(2**62,)", "4", "(4.0,)", "(True,)"]
        ),
        st.sampled_from(
            ["'<i8'", "'|O'", "'<f8'", "'<U9999999'", "'V2147483647'", "[('a', 'O')]", "'|i1'", "None", "'M8[s]'"]
        ),
        st.sampled_from(["False", "True", "3", "__import__('os')"]),
        st.binary(max_size=64) | st.just(bytes([0, 1, 2, 0])),
        st.sampled_from([1, 2, 3, 9]),
    )

    @given(st.one_of(made, _damaged(buffer.getvalue())))
    @example(_npy("(10**10,)", "'<i8'", "False", b"", 1))
    @example(_npy("(9999999999,)", "'<i8'", "False", b"", 1))
    @example(_npy("-" * 9000 + "1", "'<i8'", "False", b"", 1))
    def test(content: bytes) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = _reads(".npy table", FOLDER / "table.npy", content, sostenuto.CacheTable.load)
        if table is not None:
            _use_table(table)

    return test


_ROUTER = {
    "format": "sostenuto-router",
    "version": 1,
    "method": "l2c",
    "order": "sampling",
    "num_inference_steps": 6,
    "sites": _SITES,
    "model": {"class": "DiTTransformer2DModel", "fingerprint": "00"},
    "scheduler": {"class": "DDIMScheduler", "timesteps": [900, 700, 500, 300, 100, 0]},
    "training": {"penalty": 1e-4},
}


def _safetensors(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _tensor_files(metadata: st.SearchStrategy[Any], name: str, tensor: torch.Tensor) -> st.SearchStrategy[bytes]:
    """Files of one tensor whose header lies."""
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F64", "U8", "BOOL", "F99", 3]),
            "shape": st.lists(st.sampled_from([0, 1, 3, 6, 2**40, 2**63, -1]), max_size=4)
            | st.just(list(tensor.shape)),
            "data_offsets": st.lists(st.sampled_from([0, 72, 2**62, -1]), max_size=3) | st.just([0, tensor.nbytes]),
        }
    )
    headers = st.builds(lambda entry, meta: {name: entry, "__metadata__": meta}, entry, metadata)
    lengths = st.sampled_from([None, None, None, 0, 2**62, 5])
    return st.builds(_safetensors, headers, st.just(bytes(tensor.nbytes)) | st.binary(max_size=80), lengths)


def _valid_router(path: Path, content: Any) -> bytes:
    save_file({"logits": torch.zeros(3, 6)}, path, {"sostenuto-router": json.dumps(content)})
    return path.read_bytes()


def routers() -> Callable[[], None]:
    source = FOLDER / "valid"
    changed = (_changed(_ROUTER) | JSONS).map(lambda content: _valid_router(source, content))
    metadata = st.just({"sostenuto-router": json.dumps(_ROUTER)}) | JSONS
    lying = _tensor_files(metadata, "logits", torch.zeros(3, 6))

    @given(st.one_of(changed, lying, _damaged(_valid_router(source, _ROUTER))))
    @example(_valid_router(source, _ROUTER | {"num_inference_steps": 10**400}))
    @example(_valid_router(source, _ROUTER | {"model": {"more": float("inf")}}))
    def test(content: bytes) -> None:
        router = _reads("router", FOLDER / "router.safetensors", content, sostenuto.Router.load)
        if router is not None:
            _same_again(router)
            table = router.to_table()
            _used(lambda: router.check(_MODEL, _SCHEDULER), lambda: router.check_steps(_TIMESTEPS), table.strip)

    return test


def measured() -> Callable[[], None]:
    shared = {"version": 1, "order": "sampling", "model": {}, "scheduler": {}, "calibration": {}}
    ratios = {"format": "sostenuto-magcache", "ratios": [1.0, 1.1, 0.9], **shared}
    fit = {"format": "sostenuto-teacache", "coefficients": [1.0, 0.0], "threshold": 0.1, **shared}

    @given(st.sampled_from([sostenuto.MagCacheRatios, sostenuto.TeaCacheFit]), st.one_of(_texts(ratios), _texts(fit)))
    @example(sostenuto.MagCacheRatios, json.dumps(ratios | {"scheduler": {"timesteps": [10**400]}}).encode())
    def test(kind: Any, content: bytes) -> None:
        value = _reads("ratios and fits", FOLDER / "measured.json", content, kind.load)
        if value is not None:
            _same_again(value)
            method = {sostenuto.MagCacheRatios: sostenuto.MagCache, sostenuto.TeaCacheFit: sostenuto.TeaCache}[kind]
            _used(lambda: _plans(method(value), 4))

    return test


def batches() -> Callable[[], None]:
    images = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    source = FOLDER / "batch"
    save_file({"images": images}, source, {"wall_s": "1.5", "stats": '{"macs": 3}'})
    lying = _tensor_files(JSONS | st.just({"wall_s": "1", "stats": "[]"}), "images", images)
    texts = st.one_of(JSONS.map(json.dumps), _TEXTS.filter(lambda text: text.isprintable()))

    def with_stats(stats: str, wall: str) -> bytes:
        save_file({"images": images}, source, {"wall_s": wall, "stats": stats})
        return source.read_bytes()

    valid = source.read_bytes()

    @given(st.one_of(lying, _damaged(valid), st.builds(with_stats, texts, texts)))
    @example(with_stats("[" * 100_000, "1"))
    def test(content: bytes) -> None:
        found = _reads("batch of results", FOLDER / "batch.safetensors", content, read_batch, InputError)
        assert found is None or isinstance(found[2]["macs"], int)

    return test


def configurations() -> Callable[[], None]:
    """Of the form that ``enable`` takes; a path in one may lead to a table that lies."""
    valid = {
        "format": "sostenuto-config",
        "version": 1,
        "method": {"name": "fora", "interval": 3},
        "max_cache_bytes": 9,
    }
    combined = valid | {"method": [{"name": "eb", "table": "table.json"}, {"name": "epsilon-scaling", "scale": 1.01}]}

    @given(st.one_of(_texts(valid), _texts(combined)), st.sampled_from([".json", ".yaml"]))
    @example(b"method: !!python/object/apply:os.getcwd []", ".yaml")
    @example(b"a: &a [x, x]\nb: &b [*a, *a]\nmethod: [*b, *b]", ".yaml")
    def test(content: bytes, ending: str) -> None:
        config = _reads("configuration", FOLDER / f"config{ending}", content, load_config, SostenutoError)
        if config is not None:
            _used(lambda: _plans(config.method, 4))

    return test


def benchmarks() -> Callable[[], None]:
    row = Row(key="k", name="n", method="fora", model="demo", num_inference_steps=3, wall_s=1.0, step_s=[0.1, 0.2])
    header = {"format": "sostenuto-bench", "version": 1, "machine": {"processor": "p", "threads": 1}}

    def lines(*contents: Any) -> bytes:
        return b"".join(json.dumps(content).encode() + b"\n" for content in contents)

    changed = st.builds(lines, _changed(header) | JSONS, _changed(row.as_dict()) | JSONS)
    kept = st.builds(lines, st.just(header), _changed(row.as_dict()))

    @given(st.one_of(changed, kept, _damaged(lines(header, row.as_dict()))))
    def test(content: bytes) -> None:
        found = _reads("results of a benchmark", FOLDER / "results.jsonl", content, read_results, InputError)
        if found is not None and found[1]:
            terminal_table(found[1], found[0]["machine"])

    return test


# --- parameters ------------------------------------------------------------------------------------------------------

_ARGUMENTS = st.one_of(
    st.integers(0, 8),
    st.floats(0, 1),
    _SCALARS,
    st.lists(_NUMBERS, max_size=4).map(tuple),
    st.dictionaries(_SCALARS, _SCALARS | st.tuples(_NUMBERS, _NUMBERS), max_size=2),
    st.sampled_from(
        [sostenuto.CacheTable((sostenuto.StepState.COMPUTE,) * 4), "start", "lagrange", "random", object()]
    ),
)


def _plans(method: Any, steps: int) -> None:
    """What happens to a method when it is enabled and a generation begins."""
    ready = method.prepare(_MODEL, _SCHEDULER)
    facts = Facts(ready.sites(_MODEL), _TIMESTEPS[:steps], _MODEL, _SCHEDULER)
    ready.plan(facts)
    ready.policy(facts)
    ready.noise_scale(facts)


def parameters() -> Callable[[], None]:
    methods = sorted(sostenuto.available_methods().items())

    @st.composite
    def made(draw: Any) -> tuple[Any, dict[str, Any]]:
        kind = draw(st.sampled_from([kind for _, kind in methods]))
        names = [field.name for field in fields(kind)]
        chosen = draw(st.lists(st.sampled_from(names), max_size=3, unique=True)) if names else []
        return kind, {name: draw(_ARGUMENTS) for name in chosen}

    @given(made(), st.integers(1, 4))
    @example((sostenuto.EpsilonScaling, {"scale": 2.1e174, "end": 1e308}), 4)
    @example((sostenuto.EpsilonScaling, {"scale": 10**400}), 4)
    def test(call: tuple[Any, dict[str, Any]], steps: int) -> None:
        kind, arguments = call
        COUNTS["parameters of methods"] += 1
        try:
            _plans(kind(**arguments), steps)
        except SostenutoError:
            return
        ACCEPTED["parameters of methods"] += 1

    return test


def options() -> Callable[[], None]:
    """The arguments of ``enable`` itself."""

    methods = st.sampled_from(["fora", "none", "ab", "teacache", sostenuto.FORA(2) | sostenuto.Forecast(1)])
    most = st.none() | st.integers(0, 10**6)

    @given(methods | _ARGUMENTS, most | _ARGUMENTS, st.booleans() | _ARGUMENTS)
    @example("fora", 10**400, True)
    def test(method: Any, most: Any, finite: Any) -> None:
        COUNTS["arguments of enable"] += 1
        before = {name: dict(vars(module)) for name, module in _MODEL.named_modules()}
        try:
            with sostenuto.enable(
                _MODEL, method, scheduler=_SCHEDULER, max_cache_bytes=most, check_finite=finite
            ) as handle:
                assert handle.enabled
                ACCEPTED["arguments of enable"] += 1
        except SostenutoError:
            pass
        assert {name: dict(vars(module)) for name, module in _MODEL.named_modules()} == before

    return test


# --- the command line ------------------------------------------------------------------------------------------------


def _flags() -> list[str]:
    kinds = [*cli.COMMANDS.values(), cli.ModelChoice]
    return sorted({"--" + field.name.replace("_", "-") for kind in kinds for field in fields(kind)})


def command_lines() -> Callable[[], None]:
    values = st.one_of(
        st.sampled_from(
            ["-1", "0", "3", "1e400", "nan", "None", "True", "demo", "eb", "--", "-", "@x", "{}", "9" * 5000]
        ),
        st.text(max_size=6).filter(lambda text: "\0" not in text),
    )
    words = st.one_of(st.sampled_from(_flags()), values, st.sampled_from([*cli.COMMANDS, "--debug", "--help"]))
    lines = st.tuples(st.sampled_from([*cli.COMMANDS, "", "nothing"]), st.lists(words, max_size=6))

    @given(lines)
    @example(("generate", ["--seed", "9" * 5000]))
    def test(line: tuple[str, list[str]]) -> None:
        COUNTS["command line"] += 1
        with contextlib.ExitStack() as stack:
            for command in cli.COMMANDS.values():  # parsing alone: what they do has tests of its own
                stack.enter_context(mock.patch.object(command, "run", return_value=None))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            errors = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            try:
                status = cli.main([line[0], *line[1]])
            except SystemExit as left:
                status = left.code
        assert status in (0, 1, 2)
        assert "Traceback" not in errors.getvalue()
        ACCEPTED["command line"] += status == 0

    return test


TARGETS: dict[str, tuple[Callable[[], Callable[[], None]], float]] = {
    "cache table": (tables, 1.0),
    ".npy table": (arrays, 1.0),
    "router": (routers, 1.0),
    "ratios and fits": (measured, 1.0),
    "batch of results": (batches, 1.0),
    "configuration": (configurations, 0.5),
    "results of a benchmark": (benchmarks, 0.5),
    "parameters of methods": (parameters, 1.0),
    "arguments of enable": (options, 0.25),
    "command line": (command_lines, 0.1),
}
"""What makes a test of random inputs for each reader, and how many of them in comparison to the first: some are slow."""
