"""From DFT to the predicted Hamiltonian of device-sized materials."""

__version__ = "0.2.0"
