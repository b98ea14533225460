"""sostenuto: faster sampling for diffusion transformers by feature caching, with exposure bias repaired."""

from sostenuto.anatomy import Anatomy, Branch, Site, SiteKind, inspect, register_anatomy
from sostenuto.calibrations import (
    DiTFastAttnCalibration,
    EBCalibration,
    FEBCalibration,
    SmoothCacheCalibration,
    calibrate,
)
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
    PAB,
    ABCache,
    DiTFastAttn,
    EBCache,
    EpsilonScaling,
    FEBCache,
    Forecast,
    NoCache,
    SmoothCache,
    TaylorSeer,
    TimeShift,
    available_methods,
)
from sostenuto.plan import Action, Plan
from sostenuto.table import CacheTable, StepState
from sostenuto.verify import verify

__version__ = "0.1.0"

__all__ = [
    "FORA",
    "PAB",
    "ABCache",
    "Action",
    "AlreadyEnabledError",
    "Anatomy",
    "AnatomyError",
    "Branch",
    "CacheTable",
    "ClockError",
    "DiTFastAttn",
    "DiTFastAttnCalibration",
    "EBCache",
    "EBCalibration",
    "EngineError",
    "EpsilonScaling",
    "FEBCache",
    "FEBCalibration",
    "Forecast",
    "Handle",
    "InputError",
    "MethodError",
    "NoCache",
    "Plan",
    "Site",
    "SiteKind",
    "SmoothCache",
    "SmoothCacheCalibration",
    "SostenutoError",
    "StepState",
    "TableError",
    "TaylorSeer",
    "TimeShift",
    "VerificationError",
    "available_methods",
    "calibrate",
    "disable",
    "enable",
    "inspect",
    "register_anatomy",
    "verify",
]
