"""sostenuto: faster sampling for diffusion transformers by feature caching, with exposure bias repaired."""

from sostenuto.anatomy import Anatomy, Branch, Site, SiteKind, inspect, register_anatomy
from sostenuto.calibrations import EBCalibration, L2CCalibration, calibrate
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
from sostenuto.methods import FORA, L2C, EBCache, EpsilonScaling, NoCache, available_methods
from sostenuto.plan import Action, Plan
from sostenuto.router import Router
from sostenuto.table import CacheTable, StepState
from sostenuto.verify import verify

__version__ = "0.1.0"

__all__ = [
    "FORA",
    "L2C",
    "Action",
    "AlreadyEnabledError",
    "Anatomy",
    "AnatomyError",
    "Branch",
    "CacheTable",
    "ClockError",
    "EBCache",
    "EBCalibration",
    "EngineError",
    "EpsilonScaling",
    "Handle",
    "InputError",
    "L2CCalibration",
    "MethodError",
    "NoCache",
    "Plan",
    "Router",
    "Site",
    "SiteKind",
    "SostenutoError",
    "StepState",
    "TableError",
    "VerificationError",
    "available_methods",
    "calibrate",
    "disable",
    "enable",
    "inspect",
    "register_anatomy",
    "verify",
]
