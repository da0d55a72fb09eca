"""From DFT to the predicted Hamiltonian of device-sized materials."""

__version__ = "0.1.0"
