"""Prepare the inputs of the network from graphs and model folders: tensors, the part of a rank, trained weights.

Both training and prediction use this package.
"""
