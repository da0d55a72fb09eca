"""Settings that a user writes: their schemas, a module for each file (and sets of structures), and what reads them."""

from .material import Analysis, Material, Transmission
from .model import Model, Network, Training
from .reading import check_configuration, load_config, load_material, load_model, read_yaml, sha256, validate
from .runs import EXCHANGES, EXPORTS, PAPER_FIGURES, PARTITIONERS, Config
from .section import Section
from .structures import CALCULATOR_PLUGINS, MeltQuench, Split, StructureSet, Transport

__all__ = [
    "CALCULATOR_PLUGINS", "EXCHANGES", "EXPORTS", "PAPER_FIGURES", "PARTITIONERS", "Analysis", "Config", "Material",
    "MeltQuench", "Model", "Network", "Section", "Split", "StructureSet", "Training", "Transmission", "Transport",
    "check_configuration", "load_config", "load_material", "load_model", "read_yaml", "sha256", "validate",
]  # fmt: skip
