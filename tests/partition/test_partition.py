"""Every partitioner on every kind of structure, against lists made edge by edge."""

import numpy as np
import pytest
from ase import Atoms
from ase.spacegroup import crystal

from hamscale.graph.neighbours import Neighbourhood, edges_within
from hamscale.partition import METHODS, TiledEdges, partition
from hamscale.partition.halo import Halo, halo_of, read_owner, write_partition
from hamscale.partition.min_nn import Cost
from hamscale.partition.space import space
from helpers import WATER, forged, hafnia

CUTOFF = 5.0


def scattered(n: int, cell, seed: int = 0, pbc=True) -> Atoms:
    fractions = np.random.default_rng(seed).random((4 * n, 3))
    atoms = Atoms("O" * len(fractions), scaled_positions=fractions, cell=cell, pbc=pbc)
    kept = []
    for a in range(len(atoms)):
        if len(kept) < n and (not kept or atoms.get_distances(a, kept, mic=True).min() > 1.2):
            kept.append(a)
    return atoms[kept]


def step() -> Atoms:
    """Four times as dense in one half."""
    dense, thin = scattered(160, [8, 16, 16], 1), scattered(40, [8, 16, 16], 2)
    thin.positions += [8, 0, 0]
    dense.set_cell([16, 16, 16])
    return dense + thin


def slab() -> Atoms:
    """10 A thick, across the boundary of the cell, with 20 A of vacuum."""
    atoms = scattered(150, [18, 18, 10])
    atoms.set_cell([18, 18, 30])
    atoms.positions[:, 2] += 26
    atoms.wrap()
    return atoms


STRUCTURES = {
    "crystal": lambda: hafnia().repeat((5, 4, 3)),
    "perfect crystal": lambda: crystal("Si", [(0, 0, 0)], spacegroup=227, cellpar=[5.43] * 3 + [90] * 3).repeat((3, 3, 3)),
    "triclinic": lambda: scattered(150, [[12, 0, 0], [7, 11, 0], [4, 5, 12]]),
    "slab": slab,
    "open": lambda: scattered(100, [14, 14, 14], pbc=False),
    "molecule": lambda: WATER.copy(),
    "step": step,
}


def structure(name: str):
    atoms = STRUCTURES[name]()
    edges = edges_within(atoms, CUTOFF)
    return atoms, [(edges[:, 0], edges[:, 1])]


def halos_of(atoms: Atoms, owner: np.ndarray, parts: int) -> list[Halo]:
    """The halo of every part, from the edges into its own atoms alone."""
    own = [np.flatnonzero(owner == rank) for rank in range(parts)]
    return [halo_of(edges_within(atoms, CUTOFF, owned), owner, rank) for rank, owned in enumerate(own)]


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_lists_are_those_of_every_edge(name, method, parts):
    atoms, edges = structure(name)
    p = partition(atoms, edges, CUTOFF, parts, method)
    assert p.owner.shape == (len(atoms),)
    assert set(p.owner.tolist()) <= set(range(parts))
    needed = {rank: set() for rank in range(parts)}
    for i, j in zip(*(e.tolist() for e in edges[0])):
        if p.owner[i] != p.owner[j]:
            needed[p.owner[i]].add(j)
    halos = halos_of(atoms, p.owner, parts)
    for h in halos:
        assert h.owned.tolist() == np.flatnonzero(p.owner == h.rank).tolist()
        assert h.ghosts.tolist() == sorted(needed[h.rank], key=lambda a: (p.owner[a], a))
        for neighbour, rows in h.receive.items():
            sender = halos[neighbour]
            assert sender.owned[sender.send[h.rank]].tolist() == h.ghosts[rows].tolist()
        assert set(h.send) == set(h.receive)  # edges go both ways
    statistics = p.per_rank()
    assert statistics["received"].tolist() == [len(h.ghosts) for h in halos]
    assert statistics["sent"].tolist() == [sum(map(len, h.send.values())) for h in halos]
    assert statistics["neighbours"].tolist() == [len(h.receive) for h in halos]
    assert statistics["edges"].tolist() == [(p.owner[edges[0][0]] == rank).sum() for rank in range(parts)]


@pytest.mark.parametrize("parts", [2, 3, 5, 8])
@pytest.mark.parametrize("method", ["low-nn", "min-nn"])
@pytest.mark.parametrize("name", [n for n in STRUCTURES if n != "molecule"])
def test_cuts_balance_edges_to_an_atom_per_cut(name, method, parts):
    atoms, edges = structure(name)
    degrees = np.bincount(edges[0][0], minlength=len(atoms))
    shares = partition(atoms, edges, CUTOFF, parts, method).edges
    assert np.abs(shares - shares.mean()).max() <= 1.5 * degrees.max()


def test_the_same_structure_is_cut_the_same():
    atoms, edges = structure("triclinic")
    for method in METHODS:
        first, second = (partition(atoms, edges, CUTOFF, 6, method).owner for _ in range(2))
        assert np.array_equal(first, second)


def test_heights_bound_distances_in_a_triclinic_cell():
    atoms, edges = structure("triclinic")
    s = space(atoms, CUTOFF)
    difference = np.abs(s.heights[edges[0][0]] - s.heights[edges[0][1]])
    assert (np.minimum(difference, s.lengths - difference) < CUTOFF).all()


def test_vacuum_opens_a_direction_and_what_crosses_the_boundary_is_one_slab():
    atoms, _ = structure("slab")
    s = space(atoms, CUTOFF)
    assert s.periodic.tolist() == [True, True, False]
    assert s.lengths[2] < 11
    assert s.heights.min() >= 0
    assert (s.heights.max(0) <= s.lengths).all()


@pytest.mark.parametrize("cell", [[60, 8, 8], [8, 60, 8], [8, 8, 60]])
def test_a_long_cell_is_cut_into_a_ring_of_slabs(cell):
    atoms = scattered(240, cell)
    edges = edges_within(atoms, CUTOFF)
    for method in ("low-nn", "min-nn"):
        statistics = partition(atoms, [(edges[:, 0], edges[:, 1])], CUTOFF, 4, method).per_rank()
        if method == "min-nn" or cell[2] == 60:  # appendix A cuts each periodic direction once before it looks at lengths
            assert statistics["neighbours"].tolist() == [2] * 4


def test_low_nn_follows_the_appendix():
    """z, y and x are cut once each while periodic; then the longest extent. Worked by hand for a grid of 8 x 4 x 4."""
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(4), np.arange(4), indexing="ij"), -1).reshape(-1, 3)
    atoms = Atoms("O" * 128, grid + 0.5, cell=[8, 4, 4], pbc=True)
    edges = edges_within(atoms, 1.1)
    owner = partition(atoms, [(edges[:, 0], edges[:, 1])], 1.1, 16, "low-nn").owner
    # halves in z, y, x; extents then 4, 2, 2 and ceil(2.2 / L) 1, 2, 2: x again
    expected = (grid[:, 2] // 2) * 8 + (grid[:, 1] // 2) * 4 + grid[:, 0] // 2
    assert np.array_equal(owner, expected)


def test_min_nn_takes_what_costs_least():
    """Where latency is all that counts there are fewer neighbours than where bytes are."""
    atoms = scattered(700, [20, 20, 20])
    edges = edges_within(atoms, CUTOFF)
    edges = [(edges[:, 0], edges[:, 1])]
    few = partition(atoms, edges, CUTOFF, 16, cost=Cost(latency_s=1, seconds_per_edge=0)).quality()
    small = partition(atoms, edges, CUTOFF, 16, cost=Cost(latency_s=0, seconds_per_edge=0)).quality()
    assert few["neighbours_mean"] < small["neighbours_mean"]
    assert small["sent_mean"] < few["sent_mean"]


@pytest.mark.parametrize("method", METHODS)
def test_ranks_of_a_node_exchange_among_themselves(method):
    atoms, edges = structure("triclinic")
    plain, grouped = (partition(atoms, edges, CUTOFF, 8, method, ranks_per_node=n) for n in (1, 4))
    assert grouped.between_nodes(4) <= plain.between_nodes(4)
    receiver, sender, first, last = grouped.messages.T
    crossing = (last - first)[receiver // 4 != sender // 4].sum()
    assert grouped.between_nodes(4) == crossing < (last - first).sum()
    assert sorted(grouped.edges.tolist()) == sorted(plain.edges.tolist())
    halos = halos_of(atoms, grouped.owner, 8)
    for h in halos:
        assert h.ghosts.tolist() == grouped.ghosts[np.repeat(receiver, last - first) == h.rank].tolist()
        for neighbour, rows in h.receive.items():
            assert (grouped.owner[h.ghosts[rows]] == neighbour).all()
            other = halos[neighbour]
            assert other.owned[other.send[h.rank]].tolist() == h.ghosts[rows].tolist()


def test_edges_sought_some_atoms_at_a_time_are_cut_as_all_at_once():
    atoms = scattered(700, [20, 20, 20])
    whole = edges_within(atoms, CUTOFF)
    streamed = partition(atoms, Neighbourhood(atoms, CUTOFF), CUTOFF, 5)
    at_once = partition(atoms, [(whole[:, 0], whole[:, 1])], CUTOFF, 5)
    for name in ("owner", "ghosts", "messages", "edges"):
        assert np.array_equal(getattr(streamed, name), getattr(at_once, name))


def test_tiles_have_the_edges_of_the_tiled_structure():
    unit = hafnia()
    repeat = (3, 1, 2)
    whole = edges_within(unit.repeat(repeat), CUTOFF)[:, :2]
    pieces = TiledEdges(edges_within(unit, CUTOFF), len(unit), repeat)
    i, j = (np.concatenate(parts) for parts in zip(*pieces))
    order = np.lexsort((j, i))
    assert (np.diff(i) >= 0).all()
    assert np.array_equal(np.column_stack([i, j])[order], whole[np.lexsort((whole[:, 1], whole[:, 0]))])
    atoms = unit.repeat(repeat)
    streamed, at_once = partition(atoms, pieces, CUTOFF, 5), partition(atoms, [(whole[:, 0], whole[:, 1])], CUTOFF, 5)
    for name in ("owner", "ghosts", "messages", "edges"):
        assert np.array_equal(getattr(streamed, name), getattr(at_once, name))


def test_a_file_gives_back_what_was_written_and_refuses_another_structure(tmp_path):
    atoms, edges = structure("crystal")
    p = partition(atoms, edges, CUTOFF, 4, "low-nn")
    write_partition(tmp_path / "p.h5", p, atoms)
    assert np.array_equal(read_owner(tmp_path / "p.h5", atoms, 4, CUTOFF), p.owner)
    with pytest.raises(ValueError, match="parts is 4, expected 8. Make it anew with `hamscale partition`"):
        read_owner(tmp_path / "p.h5", atoms, 8, CUTOFF)
    with pytest.raises(ValueError, match="cutoff_angstrom is 5.0, expected 6.0"):
        read_owner(tmp_path / "p.h5", atoms, 4, 6.0)
    moved = atoms.copy()
    moved.positions[0] += 0.1
    with pytest.raises(ValueError, match="its structure is another one"):
        read_owner(tmp_path / "p.h5", moved, 4, CUTOFF)
    with forged(tmp_path / "p.h5") as file:
        file["owner"][0] = 4
    with pytest.raises(ValueError, match="its owners are not those of 180 atoms in 4 parts"):
        read_owner(tmp_path / "p.h5", atoms, 4, CUTOFF)
    with forged(tmp_path / "p.h5") as file:
        file.attrs["schema"] = "partition/1"
    with pytest.raises(ValueError, match="schema is 'partition/1', expected 'partition/3'"):
        read_owner(tmp_path / "p.h5", atoms, 4, CUTOFF)


def test_what_cannot_be_is_refused():
    atoms, edges = structure("molecule")
    with pytest.raises(ValueError, match="'scotch' is not known, expected one of low-nn, metis, min-nn"):
        partition(atoms, edges, CUTOFF, 2, "scotch")
    with pytest.raises(ValueError, match="0 parts: expected at least one"):
        partition(atoms, edges, CUTOFF, 0)
