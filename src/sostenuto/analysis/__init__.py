"""Instruments that show what caching and correction do, apart from how good the images are."""

from sostenuto.analysis.exposure_bias import NormCurves, error_variance_growth, noise_norm_curves

__all__ = ["NormCurves", "error_variance_growth", "noise_norm_curves"]
