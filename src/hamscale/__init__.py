"""From DFT to the predicted Hamiltonian of device-sized materials.

model = hamscale.load_model("resources/models/hfo2")
predicted = model.predict(atoms)    # H and S, with .at_k, .eigenvalues, .bands, .dos, .to_sisl
hamscale.read_operators("h.h5")     # the same of a file
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import Model, Operators, load_model, read_operators

__version__ = "0.2.0"
__all__ = ["Model", "Operators", "load_model", "read_operators"]


def __getattr__(name: str) -> object:
    """Import what is asked for when it is asked for: torch takes seconds, and most commands do without it."""
    if name in __all__:
        return getattr(import_module(".api", __name__), name)
    raise AttributeError(f"module 'hamscale' has no attribute {name!r}")
