"""The losses for long tails, against slow implementations in float64 and closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lesam_dist import LESAM
from lesam_dist.config.schema import LongTailConfig
from lesam_dist.models.heads import CosineClassifier, TwoViews, View, replace_last_layer
from lesam_dist.parallel.batch import Batch, parts
from lesam_dist.tasks.long_tail.glmc import Glmc, draw_mix, label_weights
from lesam_dist.tasks.long_tail.groups import group_accuracies
from lesam_dist.tasks.long_tail.ldam_drw import LdamDrw, effective_weights, margins
from lesam_dist.tasks.long_tail.logit_adjustment import LogitAdjustment
from lesam_dist.tasks.task import At
from lesam_dist.train.passes import Passes

COUNTS = torch.tensor([120, 50, 17, 6])
Array = NDArray[np.float64]


def log_softmax(z: Array) -> Array:
    return z - z.max() - math.log(sum(math.exp(v - z.max()) for v in z))


def cross_entropy(z: Array, t: Array) -> float:
    return -sum(float(t[c]) * float(log_softmax(z)[c]) for c in range(len(z)))


def cosine(a: Array, b: Array) -> float:
    return float(sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(a**2)) / math.sqrt(sum(b**2)))


def slow_glmc(views: list[list[Array]], batch: Batch, contrast: float, held: list[Array]) -> list[float]:
    """GLMC's loss of each sample from its formula; ``held`` is z of both views, which passes no gradient."""
    a, losses = batch["plain_share"], []
    for i, (t, t_w) in enumerate(zip(batch["targets"].numpy(), batch["weighted_targets"].numpy(), strict=True)):
        plain = sum(cross_entropy(logits[i], t) for logits, _, _, _ in views)
        weighted = sum(cross_entropy(balanced[i], t_w) for _, balanced, _, _ in views)
        distance = -cosine(views[0][3][i], held[1][i]) - cosine(views[1][3][i], held[0][i])
        losses.append(a * plain + (1 - a) * weighted + contrast * distance)
    return losses


def arrays(views: tuple[View, View]) -> list[list[Array]]:
    return [[t.detach().numpy() for t in view] for view in views]


class Given(nn.Module):
    """Gives what it was given, whatever the images."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, *images: Tensor) -> Any:
        return self.value


def soft_batch(size: int, images: tuple[int, ...] = (1,)) -> dict[str, Any]:
    targets = torch.rand(size, 4, dtype=torch.float64)
    weighted = torch.rand(size, 4, dtype=torch.float64)
    views = torch.randn(2, size, *images, dtype=torch.float64)
    share = float(torch.rand(()))
    return {
        "mix": views[0],
        "cut": views[1],
        "targets": targets,
        "weighted_targets": weighted,
        "plain_share": share,
    }


def test_glmc_is_its_formula(seed: int) -> None:
    batch = soft_batch(5)
    shapes = (4, 4, 6, 6)
    views = tuple(View(*(torch.randn(5, n, dtype=torch.float64) for n in shapes)) for _ in range(2))
    method = Glmc(LongTailConfig(method="glmc", contrast=6.0), COUNTS, seed)
    ours = method.losses(Given(views), batch)
    both = arrays(views)
    expected = slow_glmc(both, batch, 6.0, [view[2] for view in both])
    assert ours.tolist() == pytest.approx(expected, rel=1e-12)


def make_net() -> TwoViews:
    """Smooth, without BatchNorm, in float64."""
    return TwoViews(nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.Tanh()), 7, 4).double()


def test_a_step_descends_along_the_gradient_beside_the_weights_with_z_of_there(seed: int) -> None:
    """w - w_new of plain SGD with lr 1 is that gradient: against central differences of the slow loss with z held."""
    net, batch = make_net(), soft_batch(6, (3, 2, 2))
    method = Glmc(LongTailConfig(method="glmc", contrast=4.0), COUNTS, seed)
    before = [p.detach().clone() for p in net.parameters()]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return method.losses(model, batch).mean()

    gradients = torch.autograd.grad(loss(net, batch), list(net.parameters()))
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
    sigma = 0.3
    optimizer = LESAM(net.parameters(), torch.optim.SGD, sigma=sigma, rho_max=None, lr=1.0, eps=0.0)
    optimizer.step(Passes(net, loss, batch))
    descended = [w - p.detach() for w, p in zip(before, net.parameters(), strict=True)]
    beside = [w + sigma / norm * g / norm for w, g in zip(before, gradients, strict=True)]

    def slow(w: list[Tensor], held: list[Array] | None = None) -> tuple[float, list[Array]]:
        with torch.no_grad():
            for p, value in zip(net.parameters(), w, strict=True):
                p.copy_(value)
            both = arrays(net(batch["mix"], batch["cut"]))
        own = [view[2] for view in both]
        return float(np.mean(slow_glmc(both, batch, 4.0, held or own))), own

    _, held = slow(beside)
    step, moved = 1e-5, 0.0
    for _ in range(3):
        direction = [torch.randn_like(w) for w in before]
        up, down = ([w + s * step * d for w, d in zip(beside, direction, strict=True)] for s in (1, -1))
        slope = (slow(up, held)[0] - slow(down, held)[0]) / (2 * step)
        ours = float(sum((g * d).sum() for g, d in zip(descended, direction, strict=True)))
        assert ours == pytest.approx(slope, rel=1e-5, abs=1e-7)
        moved += abs((slow(up)[0] - slow(down)[0]) / (2 * step) - slope)
    assert moved > 1e-3, "z held or not would make no difference"


def pair(size: int, side: int = 8) -> dict[str, Tensor]:
    images = torch.randn(4, size, 3, side, side)
    names = ("images", "second_view", "other_images", "other_second_view")
    labels = {name: torch.randint(0, 4, (size,)) for name in ("labels", "other_labels")}
    return {**dict(zip(names, images, strict=True)), **labels}


def test_glmc_mixes_as_the_released_code(seed: int) -> None:
    """Pixel by pixel; the box is that of NumPy's ceil and clip, its centre and l what was drawn."""
    batch = pair(3)
    kept = {name: t.clone() for name, t in batch.items()}
    method = Glmc(LongTailConfig(method="glmc", label_weight=1.2), COUNTS, seed)
    weights = COUNTS.double().numpy() ** -1.2
    weights = weights / weights.sum() * 4
    for step in range(20):
        drawn = method.draw(batch, At(step, 5, 8))
        mix = draw_mix(1.0, 8, 8, seed=seed, step=step)
        lam = mix.share
        inside = np.zeros((8, 8), bool)
        inside[mix.top : mix.bottom, mix.left : mix.right] = True
        torch.testing.assert_close(drawn["mix"], lam * batch["images"] + (1 - lam) * batch["other_images"])
        expected = torch.where(torch.from_numpy(inside), batch["other_second_view"], batch["second_view"])
        assert torch.equal(drawn["cut"], expected)
        for i in range(3):
            y, other = int(batch["labels"][i]), int(batch["other_labels"][i])
            t, t_w = np.zeros(4), np.zeros(4)
            t[y] += lam
            t[other] += 1 - lam
            t_w[y] += lam * weights[y]
            t_w[other] += (1 - lam) * weights[other]
            assert drawn["targets"][i].tolist() == pytest.approx(t, abs=1e-6)
            assert drawn["weighted_targets"][i].tolist() == pytest.approx(t_w, abs=1e-6)
        assert drawn["plain_share"] == pytest.approx(1 - (step // 5 / 8) ** 2)
    assert all(torch.equal(batch[name], t) for name, t in kept.items()), "the loader's batch is not changed"
    assert draw_mix(1.0, 8, 8, seed=seed, step=3) == draw_mix(1.0, 8, 8, seed=seed, step=3)


def test_boxes_and_shares_are_drawn_as_they_should(seed: int) -> None:
    """l uniform (Beta(1, 1)); the uncut box has 2 * (ceil(32 sqrt(1 - l)) // 2) rows; centres uniform."""
    n, shares, rows = 4000, [], np.zeros(32)
    for step in range(n):
        mix = draw_mix(1.0, 32, 32, seed=seed, step=step)
        half = int(np.ceil(32 * np.sqrt(1 - mix.share))) // 2
        centres = [c for c in range(32) if (max(c - half, 0), min(c + half, 32)) == (mix.top, mix.bottom)]
        assert centres, "no centre gives these rows"
        assert any((max(c - half, 0), min(c + half, 32)) == (mix.left, mix.right) for c in range(32))
        rows[centres] += 1 / len(centres)
        shares.append(mix.share)
    quantiles = np.quantile(shares, [0.1, 0.25, 0.5, 0.75, 0.9])
    assert np.abs(quantiles - [0.1, 0.25, 0.5, 0.75, 0.9]).max() < 6 * 0.5 / n**0.5
    assert abs(rows[:16].sum() / n - 0.5) < 6 * 0.5 / n**0.5
    skewed = [draw_mix(0.2, 32, 32, seed=seed, step=step).share for step in range(n)]
    assert np.var(skewed) == pytest.approx(0.25 / 1.4, rel=0.15)  # of Beta(a, a): 1 / (4 (2 a + 1))


def test_two_views_take_batchnorms_statistics_one_after_the_other(seed: int) -> None:
    """As two forwards of the features would; the prediction is the second classifier's alone."""
    layer = nn.BatchNorm1d(5)
    net = TwoViews(nn.Sequential(layer), 5, 4)
    mix, cut = torch.randn(2, 9, 5)
    first, second = net(mix, cut)
    expected = torch.zeros(5)
    for x in (mix, cut):
        expected = 0.9 * expected + 0.1 * x.mean(dim=0)
    torch.testing.assert_close(layer.running_mean, expected)
    for view, x in ((first, mix), (second, cut)):
        features = (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + layer.eps).sqrt()
        torch.testing.assert_close(view.logits, net.fc(features), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(view.predicted, net.predictor(net.projector(features)), rtol=1e-4, atol=1e-5)
    net.eval()
    torch.testing.assert_close(net(mix), net.fc_cb(net.features(mix)))


# ---- LDAM and logit adjustment ---------------------------------------------------------------------------------------


def test_margins_and_weights_in_closed_form() -> None:
    counts = torch.tensor([625, 81, 16])  # fourth roots 5, 3, 2
    assert margins(counts, 0.5).tolist() == pytest.approx([0.2, 1 / 3, 0.5])
    assert effective_weights(counts, 0.0).tolist() == [1, 1, 1]
    # beta = 1/2: 1 - 2^-n, so 2 / (2 - 2^(1 - n)) / 2
    few = effective_weights(torch.tensor([1, 2, 3]), 0.5)
    raw = [1.0, 2 / 3, 4 / 7]
    assert few.tolist() == pytest.approx([3 * w / sum(raw) for w in raw])
    assert label_weights(torch.tensor([4, 2, 1]), 1.0).tolist() == pytest.approx([3 / 7, 6 / 7, 12 / 7])


def test_ldam_is_its_formula(seed: int) -> None:
    """Slowly, per sample; before the reweighting all weights are 1, after it the mean is weighted as torch's is."""
    config = LongTailConfig(method="ldam_drw", scale=20.0, max_margin=0.4, reweight_epoch=2, reweight_beta=0.99)
    method = LdamDrw(config, COUNTS, seed)
    cosines, labels = 2 * torch.rand(7, 4) - 1, torch.randint(0, 4, (7,))
    net = Given(20.0 * cosines)
    m = 0.4 * (6 / COUNTS.double().numpy()) ** 0.25
    losses = []
    for row, y in zip(cosines.double().numpy(), labels.tolist(), strict=True):
        z = row.copy()
        z[y] -= m[y]
        losses.append(-log_softmax(20 * z)[y])
    w = (1 - 0.99) / (1 - 0.99 ** COUNTS.double().numpy())
    w = w / w.sum() * 4
    own = w[labels.numpy()]
    for step, expected, count in ((19, np.mean(losses), 7.0), (20, np.dot(own, losses) / own.sum(), own.sum())):
        batch = method.draw((torch.zeros(7, 3), labels), At(step, 10, 5))
        assert float(method.losses(net, batch).mean()) == pytest.approx(expected, rel=1e-5)
        assert float(method.count(batch)) == pytest.approx(count, rel=1e-5)


def test_a_weighted_batch_in_parts_is_the_batch(seed: int) -> None:
    """Micro-batches, and processes likewise, are weighed by `count`."""
    config = LongTailConfig(method="ldam_drw", reweight_epoch=0)
    method = LdamDrw(config, COUNTS, seed)
    net = replace_last_layer(
        nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4)), "x", lambda n: CosineClassifier(n, 4, 30.0)
    )
    batch = method.draw((torch.randn(12, 3), torch.randint(0, 4, (12,))), At(0, 1, 1))
    whole = method.losses(net, batch).mean()
    pieces = [(method.losses(net, part).mean(), method.count(part)) for part in parts(batch, 3)]
    weighted = sum(loss * count for loss, count in pieces) / sum(count for _, count in pieces)
    torch.testing.assert_close(weighted, whole)
    given = F.cross_entropy(
        net(batch[0]) - 30 * F.one_hot(batch[1], 4) * margins(COUNTS, 0.5),
        batch[1],
        weight=effective_weights(COUNTS, 0.9999),
    )
    torch.testing.assert_close(whole, given)


def test_cosine_classifier(seed: int) -> None:
    layer = CosineClassifier(5, 3, 30.0)
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(3))
    x = torch.randn(4, 5)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([[0.1], [1.0], [7.0]]))  # lengths do not matter
    expected = [[30 * cosine(a, b) for b in layer.weight.double().detach().numpy()] for a in x.double().numpy()]
    torch.testing.assert_close(layer(100 * x), torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-4)


def test_logit_adjustment_in_closed_form(seed: int) -> None:
    """Without an opinion (z = 0) the loss is that of the prior to the power tau; with z free, its optimum has equal
    scores where the features say nothing."""
    labels = torch.tensor([0, 1, 2, 3])
    pi = COUNTS.double() / COUNTS.sum()
    for tau in (0.0, 1.0, 1.7):
        method = LogitAdjustment(LongTailConfig(method="logit_adjustment", tau=tau), COUNTS, seed)
        losses = method.losses(Given(torch.zeros(4, 4)), (torch.zeros(4, 1), labels))
        expected = -(pi**tau / (pi**tau).sum()).log()
        torch.testing.assert_close(losses, expected.float())
    method = LogitAdjustment(LongTailConfig(method="logit_adjustment"), COUNTS, seed)
    z = torch.zeros(4, requires_grad=True)
    everyone = torch.repeat_interleave(labels, COUNTS)
    method.losses(Given(z.expand(len(everyone), 4)), (everyone[:, None], everyone)).mean().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, torch.zeros(4), rtol=0, atol=1e-6)


def test_group_accuracies() -> None:
    counts = torch.tensor([101, 100, 500, 21, 20, 1])
    samples = torch.tensor([10, 10, 20, 10, 10, 0])
    right = torch.tensor([10, 5, 10, 1, 3, 0])
    groups = group_accuracies(right, samples, counts)
    assert groups == {"many": pytest.approx(75), "medium": pytest.approx(30), "few": pytest.approx(30)}
    assert group_accuracies(right[:1], samples[:1], counts[:1]) == {"many": 100}
    assert group_accuracies(right[5:], samples[5:], counts[5:]) == {}
