"""Predict H and S of any structure from a trained network, or from the reference alone."""

from .model import TrainedModel
from .prediction import K_GRID, Prediction, predict

__all__ = ["K_GRID", "Prediction", "TrainedModel", "predict"]
