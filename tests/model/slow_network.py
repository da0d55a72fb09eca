"""The network once more, slow and obvious, to compare the fast one with.

It uses whole-edge tensors (E, 2, K, C) of both parities in l-major order, Wigner matrices by matrix exponentials, complex
numbers for +m and -m, loops over l, m and atoms, and automatic differentiation. It takes its weights from the modules of the
fast network and shares none of its lines.
"""

import numpy as np
import torch
from scipy.linalg import expm
from torch.nn.functional import layer_norm, leaky_relu, silu

from hamscale.angular import rotation_matrix


def generator(l, axis):
    """d/dt of D^l(turn by t about axis) at t = 0."""
    about_z = np.zeros((2 * l + 1,) * 2)
    for m in range(1, l + 1):
        about_z[l + m, l - m], about_z[l - m, l + m] = -m, m
    if axis == "z":
        return about_z
    z_to_y = rotation_matrix(l, np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]]))
    return z_to_y @ about_z @ z_to_y.T


def wigner(vectors, lmax):
    """(E, K, K), l-major: turns every edge to +z; the angle about z is zero on +z and pi on -z."""
    D = np.zeros((len(vectors), (lmax + 1) ** 2, (lmax + 1) ** 2))
    for e, (x, y, z) in enumerate(vectors):
        pole = np.hypot(x, y) < 1e-12 * np.abs(z)
        phi = (0.0 if z > 0 else np.pi) if pole else np.arctan2(y, x)
        theta = np.arctan2(0.0 if pole else np.hypot(x, y), z)
        for l in range(lmax + 1):
            own = slice(l * l, (l + 1) ** 2)
            D[e, own, own] = expm(-theta * generator(l, "y")) @ expm(-phi * generator(l, "z"))
    return torch.from_numpy(D)


class SlowNetwork:
    def __init__(self, fast):
        self.fast, self.lmax = fast, fast.lmax

    def groups(self):
        """(number of the group, parity, l, its rows within the parity)"""
        L = self.lmax
        return [(p * (L + 1) + l, p, l, slice(l * l, (l + 1) ** 2)) for p in (0, 1) for l in range(L + 1)]

    def each(self, x, change):
        """change(group number, part (E, 2l+1, C)) of all groups."""
        parts = {(p, l): change(g, x[:, p, own]) for g, p, l, own in self.groups()}
        return torch.stack([torch.cat([parts[p, l] for l in range(self.lmax + 1)], 1) for p in (0, 1)], 1)

    def norm(self, module, x):
        others = [x[:, p, own].square().mean((1, 2)) for g, p, _, own in self.groups() if g]
        power = sum(others) / len(others)
        scalars = layer_norm(x[:, 0, :1], x.shape[3:], module.scalar.weight, module.scalar.bias, module.scalar.eps)
        scaled = lambda g, part: part * module.weight[g - 1] / torch.sqrt(power + 1e-6)[:, None, None]  # noqa: E731
        return self.each(x, lambda g, part: scaled(g, part) if g else scalars)

    def linear(self, module, x):
        return self.each(x, lambda g, part: part @ module.weight[g] + (0 if g else module.bias))

    def gate(self, x, gates):
        C = x.shape[3]
        return self.each(x, lambda g, part: part * torch.sigmoid(gates[:, (g - 1) * C : g * C])[:, None] if g else silu(part))

    def feed_forward(self, module, x):
        y = self.norm(module.norm, x)
        gates = y[:, 0, 0] @ module.gates.weight.T + module.gates.bias
        return x + self.linear(module.down, self.gate(self.linear(module.up, y), gates))

    def radial(self, module, distances, pair):
        n = module.radial.distance.weight.shape[1]
        centres = torch.linspace(0, module.cutoff, n, dtype=distances.dtype)
        spacing = module.cutoff / (n - 1)
        gaussians = torch.exp(-((distances[:, None] - centres) ** 2) / (2 * spacing**2))
        r = module.radial
        first = gaussians @ r.distance.weight.T + r.pair[pair]
        second = silu(first) @ r.hidden.weight.T + r.hidden.bias
        return silu(second) @ r.out.weight.T + r.out.bias

    def so2(self, module, parts, c_out, extra=()):
        """parts: (x (E, 2, K, C_in), the parities that it has) each; extra: further inputs of natural m = 0.

        Gives (E, 2, K, C_out) and the scalars.
        """
        like, L = [*(x for x, _ in parts), *extra][0], self.lmax
        out = like.new_zeros(len(like), 2, (L + 1) ** 2, c_out)

        def rows(p, m):
            given = [x for x, parities in parts if p in parities]
            columns = [x[:, p, l * l + l + m] for x in given for l in range(abs(m), L + 1)]
            return torch.cat([like.new_zeros(len(like), 0), *columns], 1)

        def put(p, m, values):
            for l, value in zip(range(abs(m), L + 1), values.split(c_out, 1)):
                out[:, p, l * l + l + m] = value

        natural = torch.cat(([rows(0, 0)] if parts else []) + list(extra), 1)
        y = natural @ module.natural.weight.T + module.natural.bias
        put(0, 0, torch.cat([y[:, :c_out], y[:, y.shape[1] - L * c_out :]], 1))
        scalars = y[:, c_out : y.shape[1] - L * c_out]
        if module.axial:
            return out, scalars
        if module.unnatural is not None:
            put(1, 0, rows(1, 0) @ module.unnatural.weight.T)
        for m, matrix in enumerate(module.turning, start=1):
            upper, lower = matrix.split([rows(p, m).shape[1] for p in (0, 1)])
            (A, C), (B, D) = upper.chunk(2, 1), lower.chunk(2, 1)
            # the turn about the edge by phi multiplies n_+ + i n_- and u_+ + i u_- by exp(i m phi); so does this map
            n, u = torch.complex(rows(0, m), rows(0, -m)), torch.complex(rows(1, m), rows(1, -m))
            natural = n @ (A + 0j) - 1j * (u @ (B + 0j))
            unnatural = u @ (D + 0j) + 1j * (n @ (C + 0j))
            put(0, m, natural.real), put(0, -m, natural.imag), put(1, m, unnatural.real), put(1, -m, unnatural.imag)
        return out, scalars

    def crystal_field(self, module, inputs):
        rows = []
        for atom in range(inputs.atoms):
            s = int(inputs.species[atom])
            block = inputs.atoms_of[s].crystal_field[int((inputs.atoms_of[s].atoms == atom).nonzero())]
            row, start = block.new_zeros(2, (module.lmax + 1) ** 2, module.channels), 0
            for l, parities in self.fast.onsite_slots[s].items():
                if l <= module.lmax:
                    part = block[start : start + (2 * l + 1) * len(parities)].view(2 * l + 1, len(parities))
                    seen = 0
                    for slot, p in enumerate(parities):
                        if p == 0:
                            weight = module.weights[f"{s}-{l}"][seen]
                            row[0, l * l : (l + 1) ** 2] += part[:, slot, None] * weight
                            seen += 1
                start += (2 * l + 1) * len(parities)
            rows.append(row)
        return torch.stack(rows)

    def read(self, matrices, name, degrees, x):
        """(E, n): of every degree the orders, and of every order the slots, each from the features of its parity."""
        columns = []
        for l, parities in degrees.items():
            for m in range(2 * l + 1):
                seen = [0, 0]
                for p in parities:
                    if f"{name}-{l}-{p}" in matrices:
                        columns.append(x[:, p, l * l + m] @ matrices[f"{name}-{l}-{p}"][:, seen[p]])
                    else:
                        columns.append(x.new_zeros(len(x)))
                    seen[p] += 1
        return torch.stack(columns, 1)

    def scale(self, x, weights):
        """x (E, 2, K, C) times weights (E, groups, C) of its group."""
        return self.each(x, lambda g, part: part * weights[:, g, None])

    def ends(self, x, weights):
        """Features of both ends of edges, times weights (E, 2 parities, lmax+1, 2 ends, C) in two lists of channels."""
        E, L = len(weights), self.lmax
        C = x[0].shape[3]
        by_group = weights.view(E, 2, L + 1, 2, C).unbind(3)
        return [self.scale(end, w.flatten(1, 2)) for end, w in zip(x, by_group)]

    def __call__(self, inputs, vectors):
        fast, L = self.fast, self.lmax
        A, E, K = len(inputs.degrees), len(inputs.source), (self.lmax + 1) ** 2
        i, j = inputs.destination, inputs.source
        C = fast.atom_embedding.shape[1]
        D = wigner(vectors, L).to(inputs.distances)[:, None]
        pair = inputs.species[i] * fast.species + inputs.species[j]
        u = inputs.distances / fast.cutoff
        envelope = 1 - 10 * u**3 + 15 * u**4 - 6 * u**5
        x, e = D.new_zeros(A, 2, K, C), D.new_zeros(E, 2, K, C)
        x[:, 0, 0] = fast.atom_embedding[inputs.species]
        e[:, 0, 0] = self.radial(fast.edge_embedding, inputs.distances, pair)
        for k, (node, edge, norm) in enumerate(zip(fast.node_updates, fast.edge_updates, fast.edge_update_norms)):
            first, module = k == 0, node.messages
            weights, H = self.radial(module, inputs.distances, pair), module.hidden
            if first:
                invariants = [x[j][:, 0, 0], x[i][:, 0, 0], e[:, 0, 0]]
                extra = [a * w for a, w in zip(invariants, weights.split(C, 1))]
                y, scalars = self.so2(module.convolution, [], H, extra)
            else:
                y, scalars = self.convolve(module, D, self.norm(node.norm, x), e, weights, i, j)
            heads, alpha = module.attention.shape
            n_gates = (L if first else 2 * L + 1) * H
            # the gates of a first layer are those of natural degrees alone; there is nothing else to multiply
            gates = scalars[:, :n_gates] if not first else torch.cat([scalars[:, :n_gates], y.new_zeros(E, (L + 1) * H)], 1)
            z = self.gate(y, gates)
            s = scalars[:, n_gates:].view(E, heads, alpha)
            s = layer_norm(s, [alpha], module.attention_norm.weight, module.attention_norm.bias, 1e-5)
            logits = (leaky_relu(s, 0.2) * module.attention).sum(-1)
            v, _ = self.so2(module.values, [(z, (0,) if first else (0, 1))], heads * module.value_channels)
            sums = []
            for atom in range(A):
                into = torch.nonzero(i == atom).flatten()
                attention = torch.softmax(logits[into], 0) * envelope[into, None]
                of_channels = attention.repeat_interleave(module.value_channels, 1)[:, None, None]
                sums.append((D[into].transpose(2, 3) @ (v[into] * of_channels)).sum(0))
            x = x + self.linear(node.out, torch.stack(sums))
            x = self.feed_forward(node.feed_forward, x + self.crystal_field(node.crystal_field, inputs) if first else x)
            weights = self.radial(edge, inputs.distances, pair)
            y, scalars = self.convolve(edge, D, self.norm(norm, x), e, weights, i, j)
            e = self.feed_forward(edge.feed_forward, e + self.linear(edge.out, self.gate(y, scalars)))
        readout = fast.edge_updates[-1].readout
        e, raw = self.norm(readout.norm, e), {}
        for (a, b), p in inputs.pairs.items():
            raw[a, b] = self.read(readout.matrices, f"{a}-{b}", fast.slots[a, b], e[p.edges]) * p.scale
        offsite = {(a, b): (raw[a, b] + raw[b, a][p.flipped][:, p.adjoint] * p.sign) / 2 for (a, b), p in inputs.pairs.items()}
        x, onsite = self.norm(fast.read_norm, x), {}
        for s, atoms in inputs.atoms_of.items():
            read = self.read(fast.onsite_readout, f"{s}", fast.onsite_slots[s], x[atoms.atoms])
            onsite[s] = (read + read[:, atoms.adjoint] * atoms.sign) / 2 * atoms.scale
        return offsite, onsite

    def convolve(self, module, D, x, e, weights, i, j):
        """The convolution of an update whose nodes have all groups; of the first edge update the edges are scalars."""
        C, n = x.shape[3], len(module.ends) * (self.lmax + 1) * 2 * x.shape[3]
        of_ends = weights[:, :n] if module.ends == "nu" else torch.cat([weights[:, :n], 0 * weights[:, :n]], 1)
        source, target = self.ends([D @ x[j], D @ x[i]], of_ends)
        parities = (0, 1) if module.ends == "nu" else (0,)
        assert module.ends == "nu" or x[:, 1].abs().max() == 0
        parts = [(torch.cat([source, target], 3), parities)]  # with columns (degree, end, channel)
        if module.edge_norm is None:
            extra = [e[:, 0, 0] * weights[:, n:]]
        else:
            e, extra = self.scale(self.norm(module.edge_norm, e), weights[:, n:].view(len(e), -1, C)), []
            parts.append((e, (0, 1)))
        return self.so2(module.convolution, parts, module.hidden, extra)
