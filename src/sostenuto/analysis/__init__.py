"""Instruments that show what caching and correction do, apart from how good the images are."""

from sostenuto.analysis.decoding import image_decoder
from sostenuto.analysis.exposure_bias import NormCurves, error_variance_growth, noise_norm_curves
from sostenuto.analysis.trajectory import Trajectory, record
from sostenuto.analysis.variance_probe import ChainVariance, Moments, VarianceProbe, probe_chain, probe_variance

__all__ = [
    "ChainVariance",
    "Moments",
    "NormCurves",
    "Trajectory",
    "VarianceProbe",
    "error_variance_growth",
    "image_decoder",
    "noise_norm_curves",
    "probe_chain",
    "probe_variance",
    "record",
]
