"""The methods, one file per paper. ``available_methods`` lists them by the names that users type."""

from __future__ import annotations

from difflib import get_close_matches

from sostenuto.errors import MethodError
from sostenuto.methods.ab import ABCache
from sostenuto.methods.base import Combination, Method
from sostenuto.methods.dbcache import DBCache
from sostenuto.methods.deepcache import DeepCache
from sostenuto.methods.delta_dit import DeltaDiT
from sostenuto.methods.ditfastattn import DiTFastAttn
from sostenuto.methods.duca import DuCa
from sostenuto.methods.eb import EBCache
from sostenuto.methods.epsilon_scaling import EpsilonScaling, NoiseScales
from sostenuto.methods.feb import FEBCache
from sostenuto.methods.fora import FORA
from sostenuto.methods.forecast import Forecast
from sostenuto.methods.l2c import L2C
from sostenuto.methods.magcache import MagCache, MagCacheRatios
from sostenuto.methods.none import NoCache
from sostenuto.methods.pab import PAB
from sostenuto.methods.smoothcache import SmoothCache
from sostenuto.methods.taylorseer import TaylorSeer
from sostenuto.methods.teacache import TeaCache, TeaCacheFit
from sostenuto.methods.time_shift import TimeShift
from sostenuto.methods.toca import ToCa

_METHODS: tuple[type[Method], ...] = (
    NoCache,
    EBCache,
    FEBCache,
    ABCache,
    DuCa,
    ToCa,
    FORA,
    DeltaDiT,
    L2C,
    DiTFastAttn,
    PAB,
    SmoothCache,
    DeepCache,
    TaylorSeer,
    TeaCache,
    DBCache,
    MagCache,
    EpsilonScaling,
    TimeShift,
    Forecast,
)

__all__ = [
    "FORA",
    "L2C",
    "PAB",
    "ABCache",
    "Combination",
    "DBCache",
    "DeepCache",
    "DeltaDiT",
    "DiTFastAttn",
    "DuCa",
    "EBCache",
    "EpsilonScaling",
    "FEBCache",
    "Forecast",
    "MagCache",
    "MagCacheRatios",
    "Method",
    "NoCache",
    "NoiseScales",
    "SmoothCache",
    "TaylorSeer",
    "TeaCache",
    "TeaCacheFit",
    "TimeShift",
    "ToCa",
    "available_methods",
    "by_name",
]


def available_methods() -> dict[str, type[Method]]:
    """The method classes by name."""
    return {method.name: method for method in _METHODS}


def by_name(name: str) -> Method:
    """The method of that name with its default parameters.

    Raises:
        MethodError: there is none of that name.
    """
    methods = available_methods()
    if name not in methods:
        raise no_method(name)
    return methods[name]()


def no_method(name: object) -> MethodError:
    """The error for a name that no method has, with the one that is meant most likely and all that there are."""
    methods = available_methods()
    meant = {text.lower(): known for known, kind in methods.items() for text in (known, kind.__name__)}
    near = get_close_matches(str(name).lower(), meant, 1, 0.7)
    guess = f" (did you mean {meant[near[0]]!r}?)" if near else ""
    return MethodError(f"there is no method {name!r}{guess}; there are {', '.join(sorted(methods))}")
