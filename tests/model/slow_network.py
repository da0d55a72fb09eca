"""The network once more, slow and obvious, to compare the fast one with.

It uses whole-edge tensors in l-major order, Wigner matrices by matrix exponentials, loops over l, m and atoms, and automatic
differentiation. It takes its weights from the modules of the fast network and shares none of its lines.
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

    def degrees(self):
        return [(l, slice(l * l, (l + 1) ** 2)) for l in range(self.lmax + 1)]

    def norm(self, module, x):
        power = sum(x[:, own].square().mean((1, 2)) for l, own in self.degrees() if l) / self.lmax
        out = [layer_norm(x[:, :1], x.shape[2:], module.scalar.weight, module.scalar.bias, module.scalar.eps)]
        for l, own in self.degrees():
            if l:
                out.append(x[:, own] * module.weight[l - 1] / torch.sqrt(power + 1e-6)[:, None, None])
        return torch.cat(out, 1)

    def linear(self, module, x):
        out = [x[:, own] @ module.weight[l] + (module.bias if l == 0 else 0) for l, own in self.degrees()]
        return torch.cat(out, 1)

    def gate(self, x, gates):
        C = x.shape[2]
        out = [silu(x[:, :1])]
        for l, own in self.degrees():
            if l:
                out.append(x[:, own] * torch.sigmoid(gates[:, (l - 1) * C : l * C])[:, None])
        return torch.cat(out, 1)

    def feed_forward(self, module, x):
        y = self.norm(module.norm, x)
        gates = y[:, 0] @ module.gates.weight.T + module.gates.bias
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
        """parts (E, K, C_in) each; extra: further inputs of m = 0. Gives (E, K, C_out) and the scalars."""
        E, L = len([*parts, *extra][0]), self.lmax
        out = parts[0].new_zeros(E, (L + 1) ** 2, c_out) if parts else extra[0].new_zeros(E, (L + 1) ** 2, c_out)
        zero = torch.cat([x[:, l * l + l] for x in parts for l in range(L + 1)] + list(extra), 1)
        y = zero @ module.zero.weight.T + module.zero.bias
        scalars = y[:, c_out : y.shape[1] - L * c_out]
        rest = y[:, y.shape[1] - L * c_out :].split(c_out, 1)
        rows = {0: y[:, :c_out]} | {l * l + l: rest[l - 1] for l in range(1, L + 1)}
        for m, (r, i) in enumerate(zip(module.real, module.imaginary), start=1):
            plus = torch.cat([x[:, l * l + l + m] for x in parts for l in range(m, L + 1)], 1)
            minus = torch.cat([x[:, l * l + l - m] for x in parts for l in range(m, L + 1)], 1)
            real, imaginary = plus @ r - minus @ i, plus @ i + minus @ r
            for l, p, q in zip(range(m, L + 1), real.split(c_out, 1), imaginary.split(c_out, 1)):
                rows[l * l + l + m], rows[l * l + l - m] = p, q
        for row, value in rows.items():
            out[:, row] = value
        return out, scalars

    def crystal_field(self, module, inputs):
        rows = []
        for atom in range(inputs.atoms):
            s = int(inputs.species[atom])
            block = inputs.atoms_of[s].crystal_field[int((inputs.atoms_of[s].atoms == atom).nonzero())]
            row, start = [], 0
            for l, n in self.fast.slots[s, s].items():
                if l <= module.lmax:
                    part = block[start : start + (2 * l + 1) * n].view(2 * l + 1, n)
                    row.append(torch.einsum("mn,nc->mc", part, module.weights[f"{s}-{l}"]))
                start += (2 * l + 1) * n
            row.append(block.new_zeros((module.lmax + 1) ** 2 - sum(len(r) for r in row), module.channels))
            rows.append(torch.cat(row))
        return torch.stack(rows)

    def scale(self, x, weights):
        """x (E, K, C) times weights (E, lmax+1, C) of its degree."""
        return torch.cat([x[:, own] * weights[:, l : l + 1] for l, own in self.degrees()], 1)

    def __call__(self, inputs, vectors):
        fast, L = self.fast, self.lmax
        A, E = len(inputs.degrees), len(inputs.source)
        i, j = inputs.destination, inputs.source
        C = fast.atom_embedding.shape[1]
        D = wigner(vectors, L).to(inputs.distances)
        pair = inputs.species[i] * fast.species + inputs.species[j]
        u = inputs.distances / fast.cutoff
        envelope = 1 - 10 * u**3 + 15 * u**4 - 6 * u**5
        x = torch.cat([fast.atom_embedding[inputs.species][:, None], D.new_zeros(A, (L + 1) ** 2 - 1, C)], 1)
        e = torch.cat(
            [self.radial(fast.edge_embedding, inputs.distances, pair)[:, None], D.new_zeros(E, (L + 1) ** 2 - 1, C)], 1
        )
        for k, (node, edge, norm) in enumerate(zip(fast.node_updates, fast.edge_updates, fast.edge_update_norms)):
            first, module = k == 0, node.messages
            normed, e_normed = (x, e) if first else (self.norm(node.norm, x), self.norm(module.edge_norm, e))
            weights, H = self.radial(module, inputs.distances, pair), module.hidden
            if first:
                parts = [normed[j][:, 0], normed[i][:, 0], e[:, 0]]
                extra = [p * w for p, w in zip(parts, weights.split(C, 1))]
                y, scalars = self.so2(module.convolution, [], H, extra)
            else:
                parts = zip([D @ normed[j], D @ normed[i], e_normed], weights.split((L + 1) * C, 1))
                y, scalars = self.so2(module.convolution, [self.scale(p, w.view(E, L + 1, C)) for p, w in parts], H)
            heads, alpha = module.attention.shape
            z = self.gate(y, scalars[:, : L * H])
            s = scalars[:, L * H :].view(E, heads, alpha)
            s = layer_norm(s, [alpha], module.attention_norm.weight, module.attention_norm.bias, 1e-5)
            logits = (leaky_relu(s, 0.2) * module.attention).sum(-1)
            sums = []
            for atom in range(A):
                into = torch.nonzero(i == atom).flatten()
                attention = torch.softmax(logits[into], 0) * envelope[into, None]
                parts = []
                for h, values in enumerate(module.values):
                    v, _ = self.so2(values, [z[into]], module.value_channels)
                    parts.append((D[into].transpose(1, 2) @ (v * attention[:, h, None, None])).sum(0))
                sums.append(torch.cat(parts, 1))
            x = x + self.linear(node.out, torch.stack(sums))
            x = self.feed_forward(node.feed_forward, x + self.crystal_field(node.crystal_field, inputs) if first else x)
            normed = self.norm(norm, x)
            weights = self.radial(edge, inputs.distances, pair)
            parts = [D @ normed[j], D @ normed[i]] + ([] if first else [self.norm(edge.edge_norm, e)])
            scaled = [self.scale(p, w.view(E, L + 1, C)) for p, w in zip(parts, weights.split((L + 1) * C, 1))]
            extra = [e[:, 0] * weights[:, -C:]] if first else []
            y, scalars = self.so2(edge.convolution, scaled, edge.hidden, extra)
            e = self.feed_forward(edge.feed_forward, e + self.linear(edge.out, self.gate(y, scalars)))
        e = self.norm(fast.edge_updates[-1].readout.norm, e)
        raw = {}
        for (a, b), p in inputs.pairs.items():
            parts = [
                (e[p.edges][:, l * l : (l + 1) ** 2] @ fast.edge_updates[-1].readout.matrices[f"{a}-{b}-{l}"]).flatten(1)
                if l <= L
                else e.new_zeros(len(p.edges), (2 * l + 1) * n)
                for l, n in fast.slots[a, b].items()
            ]
            raw[a, b] = torch.cat(parts, 1) * p.scale
        offsite = {(a, b): (raw[a, b] + raw[b, a][p.flipped][:, p.adjoint] * p.sign) / 2 for (a, b), p in inputs.pairs.items()}
        x, onsite = self.norm(fast.read_norm, x), {}
        for s, atoms in inputs.atoms_of.items():
            parts = [
                (x[atoms.atoms][:, l * l : (l + 1) ** 2] @ fast.onsite_readout[f"{s}-{l}"]).flatten(1)
                if l <= L
                else x.new_zeros(len(atoms.atoms), (2 * l + 1) * n)
                for l, n in fast.slots[s, s].items()
            ]
            read = torch.cat(parts, 1)
            onsite[s] = (read + read[:, atoms.adjoint] * atoms.sign) / 2 * atoms.scale
        return offsite, onsite
