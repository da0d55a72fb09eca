"""Compute the potentials that charges of atoms cause: what a local model cannot know, since charges act at any distance.

With the charge q_i of every atom in elementary charges (Mulliken's, of the states of H), an electron at an atom i has the
potential energy

    u_i = c_z q_i + a V_i[q],    V_i = sum over atoms and images of the potentials of Gaussian charges (polarization.py),

where c_z is the hardness of element z and a is near -1 Ha/e, the charge of the electron. H_ij of the structure then has the
term 1/2 (u_i + u_j) S_ij, and H less this term is nearly local: it is what the reference is fitted to and the networks learn.
c_z and a are fitted to DFT (crystal_field_fit.py). Where q follows from H and H from q, both are found by iteration
(predict/self_consistent.py), as in self-consistent-charge tight binding.
Reference: M. Elstner et al., Phys. Rev. B 58, 7260 (1998).
"""

from dataclasses import dataclass

import numpy as np
from ase import Atoms
from scipy.sparse.linalg import LinearOperator, cg

from .polarization import AtomicCharges

POLARIZABILITY = 1.0  # charge that an atom gives up per Hartree, as `screened` has it: more than it is, so that mixing is safe


@dataclass(frozen=True)
class ChargeKernel:
    """The matrix K of u = K q.

    hardness: z -> c_z; coefficient: a. Both in Hartree per elementary charge, a times an atomic unit of potential.
    """

    hardness: dict[int, float]
    coefficient: float

    def of(self, atoms: Atoms) -> "PotentialsOfCharges":
        """Return the function that computes u (A,) in Hartree from the charges q (A,) of the atoms of a structure."""
        return PotentialsOfCharges(self, atoms)


class PotentialsOfCharges:
    """u = K q of the atoms of a structure, again and again.

    potentials = kernel.of(atoms)
    potentials(charges)  # (A,), Hartree
    """

    def __init__(self, kernel: ChargeKernel, atoms: Atoms) -> None:
        self.own = np.array([kernel.hardness[z] for z in atoms.numbers.tolist()])
        self.coefficient, self.felt = kernel.coefficient, AtomicCharges(atoms)

    def __call__(self, charges: np.ndarray) -> np.ndarray:
        return self.own * charges + self.coefficient * self.felt(charges)

    def screened(self, charges: np.ndarray) -> np.ndarray:
        """Compute what is left of charges that all atoms screen: y of (1 + x V) y = charges, x = POLARIZABILITY, (A,).

        Waves of charge lose the more the longer they are, since their potential is the larger; G. P. Kerker, Phys. Rev. B 23,
        3082 (1981), mixes densities so.
        """
        n = len(charges)
        return cg(LinearOperator((n, n), lambda q: q + POLARIZABILITY * self.felt(q)), charges, rtol=1e-3)[0]
