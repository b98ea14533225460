"""The tuner: the best plan for a model, its sampler and a budget; and advice whether caching pays at all."""

from sostenuto.tuning.advice import Advice, advise
from sostenuto.tuning.options import TuneOptions
from sostenuto.tuning.result import Point, Tuned
from sostenuto.tuning.tuner import tune

__all__ = ["Advice", "Point", "TuneOptions", "Tuned", "advise", "tune"]
