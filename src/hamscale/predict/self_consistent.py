"""Find the charges of atoms that are those of the states of the H they make, and H with them.

The networks give H in one pass, with potentials u of the atoms (graph/charges.py) that are a guess from their surroundings.
With K from the reference, sought are the charges q for which

    q = Mulliken charges of the states of    H[q]_ij(R) = H_ij(R) + 1/2 (w_i + w_j) S_ij(R),    w = K q - u.

An error of u moves charge, whose potential opposes it: what the states answer takes most of the error away, which no local
model can do. One undamped pass would answer too much, a wave along a long cell most of all. So the loop begins with the mean
charge of each element, mixes charges by Anderson's method (D. G. Anderson, J. ACM 12, 547 (1965)), of the rest of which it
takes what atoms do not screen (`screened`), and lets no potential change by more than LARGEST_CHANGE_HARTREE in a step. All
states are computed in every step, so this is for structures of up to some thousand orbitals.
Reference: M. Elstner et al., Phys. Rev. B 58, 7260 (1998), whose charges are found in the same way.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from ..analysis.density import mulliken_charges
from ..analysis.spectra import analysis_grid
from ..config import Analysis
from ..graph.charges import ChargeKernel
from ..operators import Operators

TOLERANCE = 1e-4  # largest change of a charge, elementary charges, at which the loop ends
MOST_STEPS = 50
SHARE = 0.3  # of the screened rest in a step, beyond what the earlier steps tell
LARGEST_CHANGE_HARTREE = 0.02  # of a potential in a step: states that change places would throw the loop back
REMEMBERED = 6  # earlier steps from which Anderson's mixing chooses


@dataclass(frozen=True)
class Loop:
    """What `self_consistent` has done.

    steps: times that the states were computed. residual: largest difference between the charges that went into the last step
    and those that came out, in elementary charges. converged: whether it is below TOLERANCE. change: largest change of a charge
    against that in one pass. charges (A,): those found, or of one pass if the loop did not converge;
    None if there are none.
    """

    steps: int
    residual: float
    converged: bool
    change: float
    charges: np.ndarray | None

    def attributes(self) -> dict:
        """Return the attributes that a file stores (docs/files.md)."""
        return {
            "self_consistent": int(self.converged),
            "charge_steps": self.steps,
            "charge_residual": self.residual,
            "charge_change": self.change,
        }


def self_consistent(
    operators: Operators,
    kernel: ChargeKernel,
    potential: np.ndarray,
    analysis: Analysis,
    finish: Callable[[Operators], Operators] = lambda operators: operators,
) -> tuple[Operators, Loop]:
    """Compute H with self-consistent charges from that of one pass.

    potential (A,): u, the potentials that H has in one pass, Hartree.
    analysis: its k-grid and temperature.
    finish: what is done to H before its states are computed, and not part of the result, as lifting false states.
    Where the loop does not converge within MOST_STEPS, or S is not positive definite, H of one pass is returned as it is, with
    a warning.
    """
    kpoints, weights, _ = analysis_grid(operators, analysis)
    of_charges = kernel.of(operators.atoms)

    def feeling(q: np.ndarray) -> Operators:
        return operators.with_potential(of_charges(q) - potential)

    def answer(found: Operators) -> np.ndarray:
        return mulliken_charges(finish(found), kpoints, weights, analysis.temperature_kelvin)

    try:
        first = answer(operators)
    except ValueError as error:
        warnings.warn(f"charges are not self-consistent: {error} H is that of one pass.", stacklevel=2)
        return operators, Loop(0, np.nan, False, 0.0, None)
    numbers = operators.atoms.numbers
    charges = np.array([first[numbers == z].mean() for z in numbers])
    mixer, residual, steps = Anderson(of_charges.screened), np.inf, 1
    with tqdm(desc="charges", disable=None, leave=False) as bar:
        while True:
            difference = answer(feeling(charges)) - charges
            residual, steps = float(np.abs(difference).max()), steps + 1
            bar.set_postfix_str(f"change {residual:.1e} e")
            bar.update()
            if residual < TOLERANCE or steps >= MOST_STEPS:
                break
            step = mixer(charges, difference) - charges
            charges = charges + step * min(1.0, LARGEST_CHANGE_HARTREE / np.abs(of_charges(step)).max())
    if residual < TOLERANCE:
        charges = charges + difference
        return feeling(charges), Loop(steps, residual, True, float(np.abs(charges - first).max()), charges)
    warnings.warn(
        f"charges were not self-consistent after {steps} steps: they still change by {residual:.1e} e, expected less than "
        f"{TOLERANCE:g}. H is that of one pass.",
        stacklevel=2,
    )
    return operators, Loop(steps, residual, False, 0.0, first)


@dataclass(frozen=True)
class ChargeLoop:
    """What makes charges of a prediction self-consistent: the arguments of `self_consistent` beside the operators."""

    kernel: ChargeKernel
    potential: np.ndarray
    analysis: Analysis

    def __call__(self, operators: Operators, finish: Callable[[Operators], Operators]) -> Operators:
        """Return the operators with self-consistent charges, which they hold, and attributes that say what was done."""
        found, done = self_consistent(operators, self.kernel, self.potential, self.analysis, finish)
        return replace(found, attributes=found.attributes | done.attributes(), mulliken_charges=done.charges)


class Anderson:
    """Anderson's mixing: from the inputs x and residuals r = F(x) - x of some steps, the next input of a fixed point of F.

    Of all sums of the last inputs with weights that add up to one, it takes the one whose residual P r would be the smallest if
    F were linear, and goes on by SHARE of that residual. P: how residuals are made smaller (`screened`); by default they are
    taken as they are.
    """

    def __init__(self, P: Callable[[np.ndarray], np.ndarray] = lambda r: r) -> None:
        self.P = P
        self.inputs: list[np.ndarray] = []
        self.residuals: list[np.ndarray] = []

    def __call__(self, x: np.ndarray, r: np.ndarray) -> np.ndarray:
        r = self.P(r)
        self.inputs, self.residuals = [*self.inputs, x][-REMEMBERED:], [*self.residuals, r][-REMEMBERED:]
        dx, dr = (
            np.array([step - steps[-1] for step in steps[:-1]]).reshape(-1, len(x)).T for steps in (self.inputs, self.residuals)
        )
        weights = np.linalg.lstsq(dr, -r, rcond=1e-8)[0]
        return x + dx @ weights + SHARE * (r + dr @ weights)
