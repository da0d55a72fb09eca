"""Define a model, config/models/NAME.yaml: the size of its networks and their training."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from .section import Section

Even = Annotated[int, Field(gt=0, multiple_of=2)]


class Network(Section):
    """Size of the network (docs/method.md)."""

    lmax: PositiveInt | Literal["auto"] = Field(
        "auto", description="highest degree of the features; auto: what the basis couples to"
    )
    channels: Even = Field(16, description="channels per degree and order; half of them have natural parity, half unnatural")
    layers: PositiveInt = Field(2, description="message-passing layers")
    hidden: Even = Field(16, description="channels between the two SO(2) convolutions, of both parities")
    heads: PositiveInt = Field(2, description="attention heads")
    values: Even = Field(16, description="channels per head, of both parities")
    attention: PositiveInt = Field(16, description="scalars per head that make the attention weight")
    feed_forward: Even = Field(64, description="channels inside the feed-forward, of both parities")
    gaussians: PositiveInt = Field(
        64, ge=2, description="Gaussians of the distance, from 0 to the cutoff, as wide as they are apart: fewer are smoother"
    )
    radial: PositiveInt = Field(64, description="width of the radial network")
    crystal_field: bool = Field(True, description="the first layer is told the reference's crystal field at each atom")


class Training(Section):
    """How the weights are found (docs/method.md)."""

    unsaid = frozenset({"start_from"})

    networks: PositiveInt = Field(
        1, description="networks, alike but for their seeds (seed, seed + 1, ...), whose mean is the prediction"
    )
    steps: PositiveInt = Field(1000, description="optimiser steps of each network")
    batch: PositiveInt = Field(1, description="structures per step")
    learning_rate: PositiveFloat = Field(5e-3, description="rate of Adam after the warm-up")
    schedule: Literal["cosine", "plateau", "constant"] = Field(
        "cosine", description="how the rate goes on: falls to zero as a cosine, falls when validation stops to improve, stays"
    )
    warmup: int = Field(20, ge=0, description="steps of linear warm-up")
    patience: PositiveInt = Field(10, description="plateau: validations without improvement before the rate drops")
    factor: PositiveFloat = Field(0.5, lt=1, description="plateau: what the rate is multiplied by")
    weight_decay: NonNegativeFloat = Field(
        0.0, description="shrinks weights by rate x this each step, apart from the gradient (AdamW): against learning by heart"
    )
    average: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay per step of a moving average of the weights, which is then what is validated and written; 0: none",
    )
    gradient_clip: PositiveFloat = Field(1.0, description="largest norm of the gradient")
    l2_scale_mev: PositiveFloat = Field(10.0, description="loss = mean |d| + mean d^2 / this (meV)")
    onsite_weight: PositiveFloat = Field(0.1, description="weight of the onsite blocks' loss beside that of the offsite ones")
    eigenvalue_weight: NonNegativeFloat = Field(
        0.0, description="weight of the root mean square error of eigenvalues, to first order, beside the loss of blocks"
    )
    directions: PositiveInt = Field(32, description="random sums of states per structure that eigenvalue errors are taken of")
    validate_every: PositiveInt = Field(50, description="steps")
    seed: int = Field(0, description="of the first weights and of the order of the structures; network K has seed + K")
    precision: Literal["float32", "float64", "mixed"] = Field(
        "float32", description="mixed: bfloat16 messages, the rest float32"
    )
    recompute: bool = Field(False, description="recompute chunks of edges in the backward pass: less memory, more time")
    chunk: PositiveInt = Field(768, description="edges per chunk, rounded to whole destinations")
    cache_gib: NonNegativeFloat = Field(
        2.0,
        description="memory of each rank in which structures stay once they are read; others are read again whenever they are "
        "needed, while a step computes (GiB)",
    )
    start_from: str | None = Field(
        None,
        description="folder of a model of the same elements, basis sets and `network`, e.g. results/hfo2/models/hfo2, with "
        "whose weights training begins instead of random ones",
    )
    tensorboard: bool = Field(False, description="write errors for TensorBoard, beside the checkpoint")


class Model(Section):
    """Settings of a model: the content of config/models/NAME.yaml."""

    description: str = Field("", description="what the model is, for people")
    network: Network = Field(Network(), description="size of the network")
    training: Training = Field(Training(), description="how the weights are found")

    def of_weights(self) -> dict:
        """Return the settings on which the weights of a network depend, in the types of JSON."""
        return self.model_dump(mode="json", exclude={"description": True, "training": {"networks", "cache_gib"}})
