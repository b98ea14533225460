"""The errors of the public interface: each also derives from the built-in that fits."""

from __future__ import annotations


class SostenutoError(Exception):
    """Base of every error that this package raises on purpose."""


class MethodError(SostenutoError, ValueError):
    """A method's parameters are wrong, or the method doesn't fit the model, scheduler or number of steps."""


class InputError(SostenutoError, ValueError):
    """An argument of a generation makes no sense."""


class TableError(SostenutoError, ValueError):
    """A cache table is malformed or belongs to something else."""


class ConfigError(SostenutoError, ValueError):
    """A configuration file is malformed, or something can't be written into one."""


class AnatomyError(SostenutoError, TypeError):
    """The sites of a denoiser can't be found, or the object is no denoiser."""


class AlreadyEnabledError(SostenutoError, RuntimeError):
    """The denoiser already has a method attached."""


class ClockError(SostenutoError, RuntimeError):
    """The denoising step of a call can't be told from its data."""


class EngineError(SostenutoError, RuntimeError):
    """A call took a way through the model that the engine can't follow."""


class NotFiniteError(SostenutoError, ArithmeticError):
    """A feature holds NaN or infinity; the message names the site and the step."""


class DependencyError(SostenutoError, ImportError):
    """A package that something needs is not installed, or too old; the message names what to install."""


class VerificationError(SostenutoError, RuntimeError):
    """The proof that caching is exact on this model failed; the message names the site."""


class MetricError(SostenutoError, RuntimeError):
    """A metric can't be computed here; the message says which package or weights it needs and how to pass them."""
