"""Settings that a user writes: their schemas (schema.py), and the functions that read them (reading.py)."""

from .reading import check_configuration, load_config, load_material, load_model, read_yaml, sha256, validate
from .schema import (
    CALCULATOR_PLUGINS,
    EXCHANGES,
    EXPORTS,
    PAPER_FIGURES,
    PARTITIONERS,
    Analysis,
    Config,
    Material,
    MeltQuench,
    Model,
    Network,
    Split,
    StructureSet,
    Training,
    Transmission,
    Transport,
)

__all__ = [
    "CALCULATOR_PLUGINS", "EXCHANGES", "EXPORTS", "PAPER_FIGURES", "PARTITIONERS", "Analysis", "Config", "Material",
    "MeltQuench", "Model", "Network", "Split", "StructureSet", "Training", "Transmission", "Transport", "check_configuration",
    "load_config", "load_material", "load_model", "read_yaml", "sha256", "validate",
]  # fmt: skip
