"""Turn caching on and off for a pipeline: one handle for each of its denoisers, and one for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sostenuto import compat
from sostenuto.config import Config, is_config_path, load_config
from sostenuto.engine import Handle, attach, handle_of
from sostenuto.errors import EngineError
from sostenuto.foreign_configs import is_foreign_config, translated
from sostenuto.methods.base import Method
from sostenuto.stats import Statistics, current, joined
from sostenuto.switch import DisabledHandle, is_switched_off
from sostenuto.telemetry import Generation


class JointHandle:
    """A method attached to the several denoisers of a pipeline; also a context manager that disables at its end.

    Attributes:
        handles: the handle of each denoiser, by its name in the pipeline.
    """

    def __init__(self, handles: Mapping[str, Handle]) -> None:
        self.handles = dict(handles)

    @property
    def method(self) -> Method:
        """The method, as it is ready for the first denoiser."""
        return next(iter(self.handles.values())).method

    @property
    def stats(self) -> Statistics:
        """Statistics of the last generation over all denoisers; sites bear the name of their denoiser in front.

        Raises:
            EngineError: nothing was generated yet.
        """
        records = {name: handle._record for name, handle in self.handles.items() if handle._record is not None}
        if not records:
            raise EngineError("no statistics: no denoiser has been called since sostenuto was enabled")
        records = current(records)
        return joined(records, {name: self.handles[name].stats for name in records})

    @property
    def predicted_cache_bytes(self) -> int | None:
        """Sum over the denoisers that were called yet of the most bytes that each keeps; ``None`` before the first call."""
        known = [handle.predicted_cache_bytes for handle in self.handles.values()]
        return None if all(size is None for size in known) else sum(size or 0 for size in known)

    def share(self, pipeline: Any) -> None:
        """Tell of another pipeline that calls the same denoisers, or some of them, with a scheduler of its own.

        Raises:
            MethodError: the pipeline has other denoisers, or the method doesn't fit its scheduler.
        """
        theirs = [handle_of(denoiser) for denoiser in compat.find_denoisers(pipeline).values()]
        sharing = [handle for handle in self.handles.values() if handle in theirs]
        for handle in sharing or self.handles.values():
            handle.share(pipeline)

    def listen(self, listener: Callable[[Generation], None]) -> None:
        """Call a function with every generation of each denoiser."""
        for handle in self.handles.values():
            handle.listen(listener)

    def disable(self) -> None:
        """Take every trace away; does nothing when already disabled."""
        for handle in reversed(self.handles.values()):
            handle.disable()

    @property
    def enabled(self) -> bool:
        """Whether the method is attached to any of them."""
        return any(handle.enabled for handle in self.handles.values())

    def __enter__(self) -> JointHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()


def enable(
    target: Any,
    method: str | Path | Method | Config | Any,
    *,
    scheduler: Any = None,
    max_cache_bytes: int | None = None,
    check_finite: bool = False,
) -> Handle | JointHandle | DisabledHandle:
    """Attach a method to a pipeline's denoisers, or to a denoiser itself.

    Args:
        target: a diffusers pipeline with a transformer or a U-Net, or the ``torch.nn.Module`` that is its denoiser. Wrap it
            with ``torch.compile(…)`` before; its own ``compile()`` may also come after. Where the pipeline has several
            denoisers (Wan 2.2, Ideogram 4), all of them; for a method of its own on each, call this on each denoiser with
            ``scheduler=pipe.scheduler``.
        method: a method, a combination ``A | B``, a name of :func:`sostenuto.available_methods`, or a configuration: one of
            :func:`sostenuto.load_config`, the path of its ``.json``, ``.yaml`` or ``.yml`` file, or one of diffusers' own
            caches, such as ``FirstBlockCacheConfig``; the method that it becomes is logged, and it is ``handle.method``.
        scheduler: the scheduler that drives the denoiser; by default the pipeline's, also when that is replaced later.
        max_cache_bytes: most bytes of kept features for each pass of a generation; where the plan needs more, the last
            sites of the network are computed always. Given here it stands before that of a configuration.
        check_finite: whether to look for NaN and infinity in the latents, in what every site computes and in the output. It
            costs one reading of each of these, and the device is waited for once in every call. Such a call then raises
            :class:`~sostenuto.errors.NotFiniteError`, which names the site and the step, and nothing of it is kept.

    Returns:
        A handle with the statistics and ``disable()``; also a context manager. With several denoisers one for all of them.
        With ``SOSTENUTO_DISABLE=1`` in the environment one that does nothing, whatever the arguments.

    Raises:
        AlreadyEnabledError: a method is attached already.
        AnatomyError: the object has no denoiser, or its sites are not known.
        MethodError, TableError: the method is unknown, or doesn't fit this model and scheduler.
        ConfigError: the configuration can't be read.
    """
    if is_switched_off():
        return DisabledHandle()
    if isinstance(method, Path) or is_config_path(method):
        method = load_config(method)
    if isinstance(method, Config):
        max_cache_bytes = method.max_cache_bytes if max_cache_bytes is None else max_cache_bytes
        method = method.method
    if is_foreign_config(method):
        method = translated(method)
    handles: dict[str, Handle] = {}
    try:
        for name, denoiser in compat.find_denoisers(target).items():
            handles[name] = attach(
                target,
                method,
                scheduler=scheduler,
                max_cache_bytes=max_cache_bytes,
                check_finite=check_finite,
                denoiser=denoiser,
            )
    except BaseException:
        JointHandle(handles).disable()
        raise
    return JointHandle(handles) if len(handles) > 1 else next(iter(handles.values()))


def disable(target: Any) -> None:
    """Take a method off a pipeline's denoisers or a denoiser; does nothing where none is attached.

    Raises:
        AnatomyError: the object has no denoiser.
    """
    for denoiser in compat.find_denoisers(target).values():
        handle = handle_of(denoiser)
        if handle is not None:
            handle.disable()
