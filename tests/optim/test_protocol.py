"""The optimizer's contract: exact weights whatever happens, one shared state, nothing silently wrong."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lesam_dist import LESAM, SAM, CosineBudget
from lesam_dist.optim import ESAM, FriendlySAM, LookSAM
from tests.optim.nets import DEVICE, make_closure, make_net, same, snapshot

BACKENDS = ["reference", "triton"]
SGD = torch.optim.SGD
UNFUSED = functools.partial(SGD, fused=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_restore_gives_back_every_bit(seed: int, backend: str, dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.randn(n, device=DEVICE).to(dtype)) for n in (1, 1000, 4097)]
    before = [p.detach().clone() for p in params]
    optimizer = LESAM(params, SGD, sigma=0.5, rho_max=None, backend=backend, lr=0.1)  # type: ignore[arg-type]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.first_step()
    assert not torch.equal(params[-1], before[-1])
    optimizer.restore()
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    optimizer.restore()  # harmless


@pytest.mark.parametrize("base", [SGD, UNFUSED, torch.optim.AdamW, torch.optim.RMSprop], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad_pass", [0, 1])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_non_finite_gradient_skips_the_update(
    seed: int, base: Callable[..., torch.optim.Optimizer], backend: str, bad_pass: int, value: float
) -> None:
    net = make_net()
    optimizer = LESAM(net.parameters(), base, backend=backend, lr=0.1)  # type: ignore[arg-type]
    optimizer.step(make_closure(net))  # so that the base optimizer has state that a wrong step would change
    before, state = snapshot(net), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.step(make_closure(net, lambda call: value if call == bad_pass else 1.0))
    assert same(net, before)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    assert optimizer.telemetry["skipped"].item() == 1
    optimizer.step(make_closure(net))
    assert not same(net, before), "a good step after a skipped one must move"
    assert optimizer.telemetry["skipped"].item() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_bad_element_is_enough(seed: int, backend: str) -> None:
    params = [nn.Parameter(torch.randn(3000, device=DEVICE)) for _ in range(3)]
    optimizer = SAM(params, SGD, backend=backend, lr=0.1)  # type: ignore[arg-type]
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.first_step()
    params[-1].grad[-1] = float("inf")  # type: ignore[index]
    optimizer.second_step()
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_gradient_perturbs_nothing_and_still_steps(seed: int, backend: str) -> None:
    net = make_net()
    optimizer = LESAM(net.parameters(), SGD, backend=backend, lr=0.1, weight_decay=0.5)  # type: ignore[arg-type]
    before = snapshot(net)
    optimizer.step(make_closure(net, lambda call: 0.0))
    for p, w in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), w * (1 - 0.1 * 0.5))
    assert optimizer.telemetry["rho"].item() == 0
    assert optimizer.telemetry["skipped"].item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("missing_in", [1, 2])
def test_gradient_missing_in_one_pass(seed: int, backend: str, missing_in: int) -> None:
    a, b = (nn.Parameter(torch.randn(6, device=DEVICE)) for _ in range(2))
    optimizer = LESAM([a, b], SGD, alpha=0.5, backend=backend, lr=0.1)  # type: ignore[arg-type]
    before = b.detach().clone()
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b) if missing_in == 2 else None
    optimizer.first_step(zero_grad=True)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b) if missing_in == 1 else None
    optimizer.second_step()
    # (1 + alpha) * g_hat - alpha * g, with g = 0 where it is missing; without g_hat there is no update.
    expected = before if missing_in == 2 else before - 0.1 * 1.5
    torch.testing.assert_close(b.detach(), expected)


def test_unperturbed_group_is_left_out_of_norm_and_perturbation(seed: int) -> None:
    a, b = (nn.Parameter(torch.randn(6)) for _ in range(2))
    optimizer = LESAM([{"params": [a]}, {"params": [b], "perturb": False}], SGD, sigma=0.3, rho_max=None, lr=0.1)
    a.grad, b.grad = torch.randn(6), torch.randn(6) * 100
    before = a.detach().clone(), b.detach().clone()
    optimizer.first_step()
    assert torch.equal(b, before[1])
    torch.testing.assert_close(a.detach(), before[0] + 0.3 * a.grad / a.grad.norm() ** 2)
    assert optimizer.telemetry["grad_norm"].item() == pytest.approx(a.grad.norm().item())
    optimizer.second_step()
    torch.testing.assert_close(b.detach(), before[1] - 0.1 * b.grad)


def test_groups_may_have_their_own_budget(seed: int) -> None:
    a, b = (nn.Parameter(torch.randn(6)) for _ in range(2))
    optimizer = LESAM([{"params": [a]}, {"params": [b], "sigma": 0.1}], SGD, sigma=0.3, rho_max=None, lr=0.1)
    a.grad, b.grad = torch.randn(6), torch.randn(6)
    before = a.detach().clone(), b.detach().clone()
    square = a.grad.norm() ** 2 + b.grad.norm() ** 2
    optimizer.first_step()
    torch.testing.assert_close(a.detach(), before[0] + 0.3 * a.grad / square)
    torch.testing.assert_close(b.detach(), before[1] + 0.1 * b.grad / square)
    optimizer.restore()
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


def test_exception_in_the_second_pass_restores(seed: int) -> None:
    net = make_net()
    optimizer = LESAM(net.parameters(), SGD, lr=0.1)
    before, good, calls = snapshot(net), make_closure(net), []

    def closure() -> Tensor:
        calls.append(None)
        if len(calls) == 2:
            assert not same(net, before)
            raise KeyboardInterrupt
        return good()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert same(net, before)
    optimizer.step(good)  # and the optimizer goes on


def test_bad_second_gradient_restores(seed: int) -> None:
    embedding = nn.Embedding(4, 2)
    optimizer = LESAM(embedding.parameters(), UNFUSED, lr=0.1)
    before = snapshot(embedding)

    def closure() -> Tensor:
        embedding.sparse = optimizer.is_perturbed  # a sparse gradient in the second pass
        loss = embedding(torch.tensor([1])).sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="need dense gradients"):
        optimizer.step(closure)
    assert not optimizer.is_perturbed
    assert same(embedding, before)


@pytest.mark.parametrize("made", ["none", "pair", "mapping", "losses"])
@pytest.mark.parametrize("bad_pass", [0, 1])
@pytest.mark.parametrize("method", [LESAM, FriendlySAM, LookSAM])
def test_what_is_no_loss_is_refused_before_anything_moves(seed: int, method: Any, bad_pass: int, made: str) -> None:
    net = make_net()
    optimizer = method(net.parameters(), SGD, lr=0.1, momentum=0.9)
    good = make_closure(net)
    optimizer.step(good)
    if method is LookSAM:
        optimizer.step(good)
        optimizer.param_groups[0]["ascent_step"] = 5  # a step of two passes
    before, state = snapshot(net), copy.deepcopy(optimizer.state_dict())
    losses = {"none": None, "pair": (torch.ones(()), 3), "mapping": {"loss": torch.ones(())}, "losses": torch.ones(3)}
    calls = 0

    def closure() -> Any:
        nonlocal calls
        calls += 1
        loss = good()
        return losses[made] if calls > bad_pass else loss

    with pytest.raises(TypeError, match=r"closure returned .*: it must return the loss"):
        optimizer.step(closure)
    assert calls == bad_pass + 1
    assert same(net, before)
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
    assert optimizer.state_dict()["param_groups"] == state["param_groups"]
    optimizer.step(lambda: good().item())  # a number will do


def test_a_mean_is_not_the_loss_of_each_sample(seed: int) -> None:
    net = make_net()
    good, before = make_closure(net), snapshot(net)
    optimizer = ESAM(net.parameters(), SGD, gamma=0.5, lr=0.1)
    with pytest.raises(TypeError, match=r"returned a tensor of shape \(\): it must return the loss of each sample"):
        optimizer.step(lambda **arguments: good())
    assert same(net, before)


def test_a_base_optimizer_that_calls_the_closure_itself_is_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"LBFGS.step\(\) needs a closure"):
        LESAM([p], torch.optim.LBFGS, lr=0.1)
    with pytest.raises(ValueError, match="got no closure"):
        LESAM([p], SGD, lr=0.1).step([])


def test_order_of_calls_is_enforced(seed: int) -> None:
    net = make_net()
    optimizer = LESAM(net.parameters(), SGD, lr=0.1)
    with pytest.raises(RuntimeError, match="needs a first_step"):
        optimizer.second_step()
    make_closure(net)()
    optimizer.first_step()
    calls: dict[str, Callable[[], object]] = {"first_step": optimizer.first_step, "state_dict": optimizer.state_dict}
    calls["load_state_dict"] = lambda: optimizer.load_state_dict(optimizer.base_optimizer.state_dict())
    calls["step"] = lambda: optimizer.step(make_closure(net))
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=rf"LESAM\.{name}: the weights are perturbed"):
            call()


def test_step_without_closure_is_an_error_once_there_are_gradients(seed: int) -> None:
    net = make_net()
    optimizer = LESAM(net.parameters(), SGD, lr=0.1, momentum=0.9)
    before = snapshot(net)
    optimizer.step(None)
    make_closure(net)()
    with pytest.raises(RuntimeError, match="without a closure"):
        optimizer.step()
    assert same(net, before)


def test_no_gradient_at_all_changes_nothing(seed: int) -> None:
    net = make_net()
    before = snapshot(net)
    optimizer = LESAM(net.parameters(), SGD, lr=0.1, weight_decay=0.1)
    optimizer.step(lambda: torch.zeros(()))
    assert same(net, before)


def test_channels_last_weights(seed: int) -> None:
    w = nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
    w.grad = torch.randn_like(w)
    before = w.detach().clone()
    optimizer = LESAM([w], SGD, sigma=0.3, rho_max=None, lr=0.1)
    optimizer.first_step()
    torch.testing.assert_close(w.detach(), before + 0.3 * w.grad / w.grad.norm() ** 2)
    optimizer.restore()
    assert torch.equal(w, before)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sigma": -0.1}, "sigma is -0.1"),
        ({"sigma": float("nan")}, "sigma is nan"),
        ({"rho_max": -1.0}, "rho_max is -1.0"),
        ({"eps": -1e-12}, "eps"),
        ({"alpha": -1.0}, "alpha"),
        ({"plus_form": "official"}, "plus_form is 'official'"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
    ids=str,
)
def test_bad_hyper_parameters(kwargs: dict[str, object], message: str) -> None:
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match=message):
        LESAM([p], SGD, lr=0.1, **kwargs).first_step()  # type: ignore[arg-type]


def test_bad_parameters() -> None:
    with pytest.raises(TypeError, match=r"parameter 'head' is torch\.complex64"):
        LESAM([("head", nn.Parameter(torch.ones(2, dtype=torch.complex64)))], SGD, lr=0.1)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="both have a hyper-parameter 'rho'"):
        SAM([nn.Parameter(torch.ones(2))], torch.optim.Adadelta)
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = LESAM(embedding.parameters(), UNFUSED, lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="need dense gradients"):
        optimizer.first_step()
    with pytest.raises(ValueError, match="SAM has none"):
        CosineBudget(SAM([nn.Parameter(torch.ones(2))], SGD, lr=0.1), 10, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_into_a_flat_buffer_is_perturbed_in_place(seed: int, backend: str) -> None:
    """Flat-parameter schemes read the buffer: the CPU path must not give the view another storage."""
    flat = torch.randn(10, device=DEVICE)
    w = nn.Parameter(flat[2:8])
    before = flat.clone()
    optimizer = LESAM([w], SGD, sigma=0.3, rho_max=None, backend=backend, lr=0.1)  # type: ignore[arg-type]
    w.grad = torch.randn_like(w)
    optimizer.first_step()
    torch.testing.assert_close(flat[2:8], before[2:8] + 0.3 * w.grad / w.grad.norm() ** 2)
    assert torch.equal(flat[:2], before[:2])
    optimizer.second_step()
    torch.testing.assert_close(flat[2:8], before[2:8] - 0.1 * w.grad)


def test_references_to_the_weights_see_every_update(seed: int) -> None:
    """A state_dict taken once stays the live weights, as with any torch optimizer."""
    net = make_net()
    optimizer = LESAM(net.parameters(), SGD, lr=0.1)
    alias = net.state_dict()
    for _ in range(3):
        optimizer.step(make_closure(net))
    assert same(net, list(alias.values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_memory_is_one_copy_of_the_parameters(seed: int, alpha: float, backend: str) -> None:
    """LE-SAM keeps one copy, LE-SAM+ one of the first gradient too; allocated once, and no gradient is held back."""
    net = make_net()
    optimizer = LESAM(net.parameters(), SGD, alpha=alpha, backend=backend, lr=0.1)  # type: ignore[arg-type]
    closure, numel = make_closure(net), sum(p.numel() for p in net.parameters())
    kept: list[set[int]] = []
    for _ in range(2):
        closure()
        first = [weakref.ref(p.grad) for p in net.parameters()]
        optimizer.first_step(zero_grad=True)
        assert not any(ref() is not None for ref in first), "the second pass must not pay for the first one's gradients"
        closure()
        optimizer.second_step(zero_grad=True)
        buffers = [t for rows in optimizer.weights.rows for t in (*rows.copies, *rows.kept) if t is not None]
        assert sum(t.numel() for t in buffers) == numel * (2 if alpha else 1)
        kept.append({t.data_ptr() for t in buffers})
    assert kept[0] == kept[1]


def test_model_converted_between_steps(seed: int) -> None:
    """The copies follow the parameters' dtype, or restoring would round."""
    net = make_net()
    optimizer = LESAM(net.parameters(), UNFUSED, lr=0.1)
    optimizer.step(make_closure(net))
    net.bfloat16()
    before = snapshot(net)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.first_step()
    assert not same(net, before)
    optimizer.restore()
    assert same(net, before)
    assert all(p.dtype == torch.bfloat16 for p in net.parameters())


@pytest.mark.parametrize("base", [SGD, UNFUSED, torch.optim.AdamW], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_disabled_is_the_plain_optimizer_and_copies_nothing(
    seed: int, backend: str, base: Callable[..., torch.optim.Optimizer]
) -> None:
    """A method that starts late or stops early costs nothing meanwhile; in between it works."""
    net = make_net()
    twin = copy.deepcopy(net)
    optimizer = SAM(net.parameters(), base, rho=0.3, lr=0.1, backend=backend)  # type: ignore[arg-type]
    plain = base(twin.parameters(), lr=0.1)
    optimizer.enabled = False
    for number in range(3):
        rng = torch.get_rng_state()
        optimizer.step(make_closure(net, lambda call, bad=number == 1: float("inf") if bad else 1.0))  # type: ignore[misc]
        torch.set_rng_state(rng)
        if number != 1:
            plain.zero_grad()
            make_closure(twin)()
            norm = torch.stack([p.grad.norm() for p in twin.parameters()]).norm()
            assert optimizer.telemetry["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-5)
            plain.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)
    assert optimizer.telemetry["skipped"].item() == 1
    assert optimizer.telemetry["rho"].item() == 0
    assert all(copy is None for rows in optimizer.weights.rows for copy in rows.copies)
    optimizer.enabled = True
    optimizer.step(make_closure(net))
    assert optimizer.telemetry["rho"].item() == pytest.approx(0.3)
    before = snapshot(net)
    optimizer.enabled = False
    optimizer.step(make_closure(net, lambda call: float("nan")))
    assert same(net, before), "copies of an earlier step must not come back"
