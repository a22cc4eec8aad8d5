"""Samplers walk t from 1 (noise) to 0 (data), or back. Of a denoiser they need its call and its `interpolant`."""

from models.sampler.base import DenoiserLike, Noise, Sampler, Walk, cost
from models.sampler.grids import edges, karras, shifted, through, trailing, uniform, uniform_lambda
from models.sampler.ode import Adaptive, DPMSolver2M, EDMHeun, Euler, Heun, Midpoint, RungeKutta4
from models.sampler.sde import DDIM, Ancestral, EulerMaruyama, Renoising

__all__ = [
    "DDIM",
    "Adaptive",
    "Ancestral",
    "DPMSolver2M",
    "DenoiserLike",
    "EDMHeun",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Midpoint",
    "Noise",
    "Renoising",
    "RungeKutta4",
    "Sampler",
    "Walk",
    "cost",
    "edges",
    "karras",
    "shifted",
    "through",
    "trailing",
    "uniform",
    "uniform_lambda",
]
