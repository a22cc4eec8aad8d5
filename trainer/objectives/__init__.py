"""Objectives: the loss of data x coupled with noise eps, one file for each."""

from trainer.objectives.base import Objective
from trainer.objectives.consistency import Consistency
from trainer.objectives.distribution import DistributionMatching
from trainer.objectives.matching import Matching
from trainer.objectives.meanflow import MeanFlow
from trainer.objectives.online import Online
from trainer.objectives.phased import Phased
from trainer.objectives.progressive import Progressive
from trainer.objectives.regression import Regression
from trainer.objectives.shortcut import Shortcut
from trainer.objectives.step_maps import StepMaps

__all__ = [
    "Consistency",
    "DistributionMatching",
    "Matching",
    "MeanFlow",
    "Objective",
    "Online",
    "Phased",
    "Progressive",
    "Regression",
    "Shortcut",
    "StepMaps",
]
