"""Methods as files: JSON or YAML that names a method, its parameters and its limits, for servers; read, checked, written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeGuard

from sostenuto.errors import ConfigError, DependencyError, MethodError, SostenutoError
from sostenuto.files import publish_text
from sostenuto.methods import available_methods, no_method
from sostenuto.methods.base import Method, parts
from sostenuto.methods.token_cycle import RatioSchedule
from sostenuto.router import Router

FORMAT, VERSION = "sostenuto-config", 1
SUFFIXES = (".json", ".yaml", ".yml")
_KEYS = ("format", "version", "method", "max_cache_bytes")
_MAX_BYTES = 2**20  # a method has a few dozen parameters


@dataclass(frozen=True)
class Config:
    """A method with its limits: what a configuration file says.

    Attributes:
        method: the method or combination.
        max_cache_bytes: as for :func:`sostenuto.enable`; ``None``: no limit.
    """

    method: Method
    max_cache_bytes: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise MethodError(f"a Config's method is a method object, not {self.method!r}")
        check_max_cache_bytes(self.max_cache_bytes)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, or as YAML where the name ends so. Files that the method names are written relative to it.

        What was measured and is only in memory (a cache table, a router) is saved in a file of its own beside this one.

        Raises:
            ConfigError: a parameter can't be written, or the name has another ending.
            DependencyError: YAML is wanted and pyyaml isn't installed.
        """
        path = _file(path)
        yaml = _yaml() if path.suffix.lower() != ".json" else None
        methods = [_written(method, path, place) for place, method in enumerate(parts(self.method), 1)]
        content: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        content["method"] = methods[0] if len(methods) == 1 else methods
        if self.max_cache_bytes is not None:
            content["max_cache_bytes"] = self.max_cache_bytes
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        publish_text(path, text if yaml is None else yaml.safe_dump(content, sort_keys=False))


def check_max_cache_bytes(value: Any) -> None:
    """Refuse what is no number of bytes.

    Raises:
        MethodError: it is neither ``None`` nor a whole number of 0 or more.
    """
    if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        raise MethodError(f"max_cache_bytes must be a whole number of 0 or more, not {value!r}")


def is_config_path(value: Any) -> TypeGuard[str]:
    """Whether a text is the path of a configuration file by its ending, and no method's name."""
    return isinstance(value, str) and value.lower().endswith(SUFFIXES)


def load_config(path: str | Path) -> Config:
    """Read a configuration file.

    The file is a mapping of ``format`` (``"sostenuto-config"``) and ``version`` (1), both optional, ``method`` and
    ``max_cache_bytes``. ``method`` is a name of :func:`sostenuto.available_methods`, a mapping of ``name`` and that method's
    parameters, or a list of these, which are combined as by ``|``. Paths in it are relative to the file.

    Args:
        path: a ``.json``, ``.yaml`` or ``.yml`` file; YAML needs pyyaml.

    Raises:
        ConfigError: the file can't be read, or is no configuration; the message names the key and value.
        MethodError, TableError: as where the method is made in Python.
        DependencyError: it is YAML and pyyaml isn't installed.
    """
    path = _file(path)
    content = _content(path)
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} holds a {type(content).__name__}, where a configuration is a mapping with a method")
    kind, version = content.get("format", FORMAT), content.get("version", VERSION)
    if kind != FORMAT:
        hint = ": name it as the table of a method" if "table" in str(kind) else ""
        raise ConfigError(f"{path} is a {kind!r}, not a {FORMAT!r}{hint}")
    if version != VERSION:
        raise ConfigError(f"{path} has version {version!r}, this sostenuto reads version {VERSION}")
    _check_keys(str(path), content, _KEYS)
    if "method" not in content:
        raise ConfigError(f"{path} names no method: add one, such as {{'method': 'fora'}}")
    method = parse_method(content["method"], path.parent)
    try:
        return Config(method, content.get("max_cache_bytes"))
    except MethodError as error:
        raise MethodError(f"{path}: {error}") from None


def parse_method(value: Any, folder: Path) -> Method:
    """The method that a value of a configuration describes.

    Args:
        value: a name, a mapping of ``name`` and parameters, or a list of these.
        folder: what relative paths are relative to.

    Raises:
        ConfigError: the value is of another kind.
        MethodError, TableError: there is no such method, or a parameter is wrong.
    """
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, Mapping):
        return _parsed(value, folder)
    if not isinstance(value, list) or not value:
        raise ConfigError(
            f"a configuration's method is a name, a mapping with a name, or a list of these, not {value!r}"
        )
    method = parse_method(value[0], folder)
    for other in value[1:]:
        method = method | parse_method(other, folder)
    return method


def file_digests(method: Method) -> list[str]:
    """What the files that a method names hold (tables, routers, ratios), by sha256; those that are there."""
    named = [Path(value) for part in parts(method) for value in vars(part).values() if isinstance(value, (str, Path))]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in named if path.is_file()]


def _file(path: str | Path) -> Path:
    if not isinstance(path, (str, Path)):
        raise ConfigError(f"a configuration is loaded from a path, not from {path!r}")
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path} is no configuration by its name: it must end in {', '.join(SUFFIXES)}")
    return path


def _content(path: Path) -> Any:
    yaml = _yaml() if path.suffix.lower() != ".json" else None
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes: that is no configuration")
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if yaml is None else yaml.safe_load(text)
    except SostenutoError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} can't be read as a configuration: {error}") from None
    except Exception as error:  # pyyaml's errors have a base of their own
        raise ConfigError(f"{path} can't be read as a configuration: {' '.join(str(error).split())}") from None


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise DependencyError(
            "a configuration in YAML needs pyyaml, which is not installed: pip install pyyaml, or write it as JSON"
        ) from None
    return yaml


def _check_keys(where: str, given: Mapping[Any, Any], known: Sequence[str]) -> None:
    odd = [key for key in given if key not in known]
    if odd:
        raise ConfigError(f"{where} has the key {odd[0]!r}, which means nothing: there are {', '.join(known)}")


def _parsed(value: Mapping[Any, Any], folder: Path) -> Method:
    name, methods = value.get("name"), available_methods()
    if not isinstance(name, str) or name not in methods:
        raise no_method(name)
    make: Any = methods[name]
    known = {field.name: str(field.type) for field in fields(make)}
    given = {key: item for key, item in value.items() if key != "name"}
    odd = [key for key in given if key not in known]
    if odd:
        raise MethodError(f"{name} has no parameter {odd[0]!r}; it has {', '.join(known) or 'none'}")
    return make(**{key: _value(item, known[key], folder) for key, item in given.items()})


def _value(value: Any, kind: str, folder: Path) -> Any:
    """A parameter as its method wants it: lists as tuples, paths from the folder, a schedule from its numbers."""
    if isinstance(value, str) and "Path" in kind:
        return folder / value
    if isinstance(value, Mapping) and "MLPBroadcast" in kind:
        return {_number(key): _tuples(item) for key, item in value.items()}
    if isinstance(value, Mapping) and "RatioSchedule" in kind:
        _check_keys("ratio_schedule", value, [field.name for field in fields(RatioSchedule)])
        return RatioSchedule(**{key: _tuples(item) for key, item in value.items()})
    return _tuples(value)


def _number(key: Any) -> Any:
    """A key that JSON made a text of, as the number that it says; another one as it is."""
    try:
        return float(key) if isinstance(key, str) else key
    except ValueError:
        return key


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _written(method: Method, path: Path, place: int) -> Any:
    """A method, the n-th of a combination, as a configuration says it: its name, and what differs from the defaults."""
    if available_methods().get(method.name) is not type(method):
        raise ConfigError(
            f"a {type(method).__name__} is none of sostenuto's methods and has no name in a configuration"
        )
    content: dict[str, Any] = {"name": method.name}
    for field in fields(method):
        value = getattr(method, field.name)
        if value == (field.default if field.default_factory is MISSING else field.default_factory()):
            continue
        if "Path" in str(field.type) and isinstance(value, (str, Path)):
            content[field.name] = _relative(value, path.parent)
        elif is_dataclass(value) and hasattr(value, "save"):
            name = method.name if place == 1 else f"{method.name}-{place}"  # of two alike each has a file
            content[field.name] = _saved(value, f"{name}-{field.name}", path)
        else:
            content[field.name] = _plain(value, f"{method.name}'s {field.name}")
    return content if len(content) > 1 else method.name


def _saved(measured: Any, name: str, path: Path) -> str:
    """What was measured, in a file beside the configuration; returns its name."""
    beside = path.with_name(f"{path.stem}.{name}{'.safetensors' if isinstance(measured, Router) else '.json'}")
    measured.save(beside)
    return beside.name


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, RatioSchedule):
        return {field.name: _plain(getattr(value, field.name), name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, name) for key, item in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_plain(item, name) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(f"{name} can't be written into a configuration: {value!r} is no plain value and has no file")


def _relative(file: str | Path, folder: Path) -> str:
    """The path from the folder where there is one, else (another drive) the whole."""
    try:
        return Path(os.path.relpath(file, folder)).as_posix()
    except ValueError:
        return Path(file).resolve().as_posix()
