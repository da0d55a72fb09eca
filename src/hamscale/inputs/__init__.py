"""From graphs and model folders to what the network takes: tensors, a rank's part, trained weights. Training and prediction use all of it."""
