"""From samples of pre-activations to a density: collect, pool, estimate, follow."""

from eafo_dynamic.density.estimators import Density, Gaussian, Histogram, Moments, gaussian, histogram, moments

__all__ = ["Density", "Gaussian", "Histogram", "Moments", "gaussian", "histogram", "moments"]
