"""What travels between ranks in 16 bits: what a message keeps, what ghosts and their gradients are, H, and what is sent."""

import numpy as np
import pytest
import torch

from hamscale.config import Network
from hamscale.graph.codec import BlockCodec
from hamscale.graph.reference import fit_reference, write_reference
from hamscale.inputs.model_folder import save_model
from hamscale.inputs.ranks import rank_example
from hamscale.inputs.tensors import build_network, differences_mev
from hamscale.operators import read_operators
from hamscale.parallel.env import World
from hamscale.parallel.exchange import EXCHANGES, lengthen, shorten
from hamscale.partition.halo import Halo
from hamscale.predict import predict
from hamscale.train.loop import sum_gradients
from helpers import hafnia, model_hamiltonian, rattled
from ranks import on_ranks

HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
DIGITS = {"float16": 11, "bfloat16": 8}


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-28, 1e-9, 1.0, 60000.0, 3e38])
def test_a_message_of_any_size_keeps_its_digits(name, dtype, size):
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(1000, generator=generator, dtype=dtype) * 10 ** (
        -8 * torch.rand(1000, generator=generator, dtype=dtype)
    )
    values = torch.cat([values * torch.sign(torch.randn(1000, generator=generator)), torch.tensor([0.0, 1.0])]).to(dtype) * size
    short = shorten(values, HALF[name])
    assert (short.dtype, len(short)) == (HALF[name], 1003)
    known = lengthen(short, dtype)
    assert known.dtype == dtype
    large = values.abs() > values.abs().max() * 2.0**-28
    np.testing.assert_allclose(known[large].numpy(), values[large].numpy(), rtol=2.0 ** -DIGITS[name], atol=0)
    np.testing.assert_allclose(known.numpy(), values.numpy(), rtol=2.0 ** -DIGITS[name], atol=2.0**-38 * size)


@pytest.mark.parametrize("name", HALF)
def test_what_is_zero_or_not_finite_stays_so(name):
    assert torch.equal(lengthen(shorten(torch.zeros(3), HALF[name]), torch.float32), torch.zeros(3))
    for bad in (float("inf"), float("nan")):
        assert not lengthen(shorten(torch.tensor([1.0, bad]), HALF[name]), torch.float32).isfinite().all()


# Three ranks in a ring: rank r owns two atoms, sends both to the next and the first to the one before.
OWNED, SMALL = 2, 1e-20


def ring_halo(rank: int) -> Halo:
    after, before = (rank + 1) % 3, (rank + 2) % 3
    counts = {before: 2, after: 1}
    receive, first = {}, 0
    for n in sorted(counts):
        receive[n] = slice(first, first + counts[n])
        first += counts[n]
    atoms = np.array([a for n in sorted(counts) for a in range(OWNED * n, OWNED * n + counts[n])])
    send = {after: np.array([0, 1]), before: np.array([0])}
    return Halo(rank, np.arange(OWNED * rank, OWNED * rank + OWNED), atoms, send, receive)


def ring(world: World, name: str):
    """Features with their ghosts, and the gradient of the features of this rank's atoms."""
    torch.manual_seed(world.rank)
    exchange = EXCHANGES[name](ring_halo(world.rank), world)
    x = torch.randn(OWNED, 3, 4, requires_grad=True)
    known = exchange(x)
    weights = SMALL * torch.randn(known.shape)
    (known * weights).sum().backward()
    return x.detach().numpy(), known.detach().numpy(), weights.numpy(), x.grad.numpy(), exchange.statistics


def round_slowly(rows: np.ndarray, name: str) -> np.ndarray:
    """Round to so many binary digits, each number by itself."""
    mantissa, exponent = np.frexp(rows.astype(np.float64))
    return np.ldexp(np.round(np.ldexp(mantissa, DIGITS[name])), exponent - DIGITS[name])


@pytest.mark.parametrize("name", HALF)
def test_ghosts_are_rounded_and_gradients_are_added_in_full_precision(name):
    results = on_ranks(3, ring, f"torch-{name}")
    halos = [ring_halo(rank) for rank in range(3)]
    gradients = [weights[:OWNED].astype(np.float64) for _, _, weights, _, _ in results]
    for halo, (x, known, weights, _, statistics) in zip(halos, results):
        assert np.array_equal(known[:OWNED], x)
        for n, span in halo.receive.items():
            rows = halos[n].send[halo.rank]
            np.testing.assert_allclose(known[OWNED:][span], round_slowly(results[n][0][rows], name), rtol=1e-6)
            np.add.at(gradients[n], rows, round_slowly(weights[OWNED:][span], name))
        assert statistics.bytes_sent == {"nodes": 2 * (2 + 3 * 12), "nodes backward": 2 * (2 + 3 * 12)}
        assert known.dtype == np.float32
    for expected, (_, _, _, gradient, _) in zip(gradients, results):
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6 * SMALL)


@pytest.fixture(scope="module")
def crystal(tmp_path_factory, szv):
    """(folder of a model, reference, graph) of HfO2."""
    folder = tmp_path_factory.mktemp("crystal")
    reference = fit_reference([model_hamiltonian(hafnia(s), szv) for s in range(2)], 5.0)
    write_reference(folder / "fitted.h5", reference)
    settings = Network(lmax=3, layers=2, channels=4, hidden=4, values=4, feed_forward=8, radial=8)
    torch.manual_seed(1)
    network = build_network(settings, reference)
    save_model(folder / "model", [network.state_dict()], settings.model_dump(), folder / "fitted.h5", {})
    return folder / "model", reference, BlockCodec(reference).encode(model_hamiltonian(rattled(hafnia().repeat(2), 3), szv))


def step(world: World, crystal, out, name: str):
    """Write H, and return gradients of the loss and the bytes sent."""
    folder, reference, graph = crystal
    predict(folder, graph.atoms, dtype=torch.float64, world=world, exchange=name).write(out / f"{name}.h5", world)
    torch.manual_seed(2)
    network = build_network(Network(lmax=3, layers=2, channels=4, hidden=4, values=4, feed_forward=8, radial=8), reference)
    part = rank_example(graph, reference, 3, torch.float32, 200, world, world.size, exchange=name)
    sum(d.abs().sum() for d in differences_mev(network(part.inputs, part.exchange), part)).mul(1e-9).backward()
    sum_gradients(network, world)
    return torch.cat([p.grad.flatten() for p in network.parameters()]).numpy(), part.exchange.statistics


def steps(world: World, crystal, out):
    return {name: step(world, crystal, out, name) for name in ("torch", *(f"torch-{h}" for h in HALF))}


def test_h_stays_hermitian_and_gradients_stay_near_in_half_the_bytes(crystal, tmp_path):
    result = on_ranks(3, steps, crystal, tmp_path)[1]
    exact, (gradient, full) = read_operators(tmp_path / "torch.h5"), result["torch"]
    scale = np.abs(exact.hamiltonian).max()
    for name, digits in DIGITS.items():
        found = read_operators(tmp_path / f"torch-{name}.h5")
        error = np.abs(found.hamiltonian - exact.hamiltonian).max()
        assert 0 < error < 2.0 ** (1 - digits) * scale
        assert max(found.hermiticity_error().values()) < 1e-14
        own, statistics = result[f"torch-{name}"]
        distance = np.linalg.norm(own - gradient) / np.linalg.norm(gradient)
        assert 0 < distance < 2.0 ** (3 - digits)
        assert statistics.exchanges == full.exchanges
        for kind, sent in full.bytes_sent.items():
            headers = 2 * full.messages * full.exchanges[kind] // sum(full.exchanges.values())
            assert statistics.bytes_sent[kind] == sent // 2 + headers
