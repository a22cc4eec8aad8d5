"""Samplers integrate t from 1 (noise) to 0 (data), or back.

Of a denoiser they need what `DenoiserLike` names.
"""

from models.denoiser import DenoiserLike
from models.sampler.base import NoiseSource, Sampler, Trajectory
from models.sampler.ddim import DDIM, Ancestral
from models.sampler.grids import (
    karras,
    shifted,
    trailing,
    uniform,
    uniform_lambda,
    window_edges,
    window_grid,
)
from models.sampler.ode import (
    DormandPrince,
    DPMSolver2M,
    EDMHeun,
    Euler,
    Heun,
    Midpoint,
    RungeKutta4,
)
from models.sampler.sde import EulerMaruyama, Renoising

__all__ = [
    "DDIM",
    "DormandPrince",
    "Ancestral",
    "DPMSolver2M",
    "DenoiserLike",
    "EDMHeun",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Midpoint",
    "NoiseSource",
    "Renoising",
    "RungeKutta4",
    "Sampler",
    "Trajectory",
    "window_edges",
    "karras",
    "shifted",
    "window_grid",
    "trailing",
    "uniform",
    "uniform_lambda",
]
