"""sostenuto: faster sampling for diffusion transformers by feature caching, with exposure bias repaired."""

from sostenuto.anatomy import Anatomy, Branch, Site, SiteKind, inspect, register_anatomy
from sostenuto.calibrations import EBCalibration, MagCacheCalibration, TeaCacheCalibration, calibrate
from sostenuto.engine import Handle, disable, enable
from sostenuto.errors import (
    AlreadyEnabledError,
    AnatomyError,
    ClockError,
    EngineError,
    InputError,
    MethodError,
    SostenutoError,
    TableError,
    VerificationError,
)
from sostenuto.methods import (
    FORA,
    DBCache,
    DeltaDiT,
    EBCache,
    EpsilonScaling,
    MagCache,
    MagCacheRatios,
    NoCache,
    TeaCache,
    TeaCacheFit,
    available_methods,
)
from sostenuto.plan import Action, Plan
from sostenuto.table import CacheTable, StepState
from sostenuto.verify import verify

__version__ = "0.1.0"

__all__ = [
    "FORA",
    "Action",
    "AlreadyEnabledError",
    "Anatomy",
    "AnatomyError",
    "Branch",
    "CacheTable",
    "ClockError",
    "DBCache",
    "DeltaDiT",
    "EBCache",
    "EBCalibration",
    "EngineError",
    "EpsilonScaling",
    "Handle",
    "InputError",
    "MagCache",
    "MagCacheCalibration",
    "MagCacheRatios",
    "MethodError",
    "NoCache",
    "Plan",
    "Site",
    "SiteKind",
    "SostenutoError",
    "StepState",
    "TableError",
    "TeaCache",
    "TeaCacheCalibration",
    "TeaCacheFit",
    "VerificationError",
    "available_methods",
    "calibrate",
    "disable",
    "enable",
    "inspect",
    "register_anatomy",
    "verify",
]
