"""How far EigenSAM's products with the Hessian, which are differences of gradients, are from exact ones.

    python benchmarks/hessian_probe.py [--model cifar_resnet18] [--epochs 0,1,3] [--probes 0.1 0.01 0.001] [--batch 128]

Trains a network on scikit-learn's digits with SGD. At the end of each of the epochs it compares, on one batch and as in
training (BatchNorm normalises by the batch), ``(grad L(w + r v) - grad L(w - r v)) / 2r`` with ``H v`` by double
backward, ||difference|| / ||H v||, for v the Hessian's first eigenvector, the gradient and noise; and what both make of
EigenSAM's power iteration: five steps from the gradient, as cosine to the eigenvector.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from lib.arguments import Parser
from lib.report import Report, Result, table
from torch import Tensor, nn
from torch.nn import functional as F

from lesam_dist.data import Transform, build_loader, scan_split
from lesam_dist.data.digits import prepare_digits
from lesam_dist.models import build_model
from lesam_dist.train.batchnorm import frozen_batchnorm

Product = Callable[[Tensor], Tensor]
_STEPS = 5  # of EigenSAM's power iteration


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device = torch.device("cpu")
    torch.manual_seed(0)
    model = build_model(args.model, 10).train()
    title = f"Products with the Hessian of {args.model} by differences: {args.batch} digits of {args.image_size} pixels"
    report = Report(args, "hessian_probe.py", device, title)
    with TemporaryDirectory() as folder:
        epochs = digits(Path(folder), args)
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)
        images, labels = next(epochs(10**6))
        for epoch in range(max(args.epochs) + 1):
            if epoch in args.epochs:
                found = compare(model, images, labels, args.probes)
                report.add(section(epoch, found), [{"epoch": epoch, **each} for each in found])
            for x, y in epochs(epoch):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", default="cifar_resnet18", help="a name that model.name takes")
    parser.add_integers("--epochs", [0, 1, 3], "after which to compare; default: 0,1,3")
    parser.add_argument("--probes", type=float, nargs="+", default=[0.1, 0.03, 0.01, 0.003, 0.001], help="r")
    parser.add_argument("--batch", type=int, default=128, help="images; default: 128")
    parser.add_argument("--image_size", type=int, default=32, help="their side in pixels; default: 32")
    parser.add_files()
    return parser.parse(argv)


def digits(folder: Path, args: argparse.Namespace) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    root = prepare_digits(folder / "digits")
    transform = Transform(image_size=args.image_size, random_area=(0.8, 1.0), horizontal_flip=False)
    loader = build_loader(
        scan_split(root, "train"),
        backend="torchvision",
        train=True,
        transform=transform,
        batch_size=args.batch,
        seed=0,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        workers=0,
    )
    return loader.epoch


def compare(model: nn.Module, images: Tensor, labels: Tensor, probes: Sequence[float]) -> list[Result]:
    """For each probe: relative errors along three vectors, and cosines of two power iterations."""
    parameters = [*model.parameters()]

    def gradient(**kwargs: bool) -> tuple[Tensor, ...]:
        with frozen_batchnorm(model):
            return torch.autograd.grad(F.cross_entropy(model(images), labels), parameters, **kwargs)

    def exact(v: Tensor) -> Tensor:
        parts = v.split([p.numel() for p in parameters])
        along = sum((g.flatten() * part).sum() for g, part in zip(gradient(create_graph=True), parts, strict=True))
        return flat(torch.autograd.grad(along, parameters))

    def difference(v: Tensor, r: float) -> Tensor:
        weights = flat([p.detach() for p in parameters])
        ends = []
        for sign in (1, -1):
            write(parameters, weights + sign * r * v)
            ends.append(flat(gradient()))
        write(parameters, weights)
        return (ends[0] - ends[1]) / (2 * r)

    g = unit(flat(gradient()))
    first = eigenvector(exact, g)
    vectors = {"eigenvector": first, "gradient": g, "noise": unit(torch.randn_like(g))}
    products = {name: exact(v) for name, v in vectors.items()}
    power = power_iteration(exact, g)
    curvature = float(first @ products["eigenvector"])
    results = []
    for r in probes:
        errors = {
            name: float((difference(v, r) - products[name]).norm() / products[name].norm())
            for name, v in vectors.items()
        }
        by_differences = power_iteration(lambda v, r=r: difference(v, r), g)
        cosines = {"cosine": abs(float(by_differences @ first)), "exact_cosine": abs(float(power @ first))}
        seen = float(by_differences @ exact(by_differences)) / curvature
        results.append({"probe": r, "eigenvalue": curvature, **errors, **cosines, "curvature_share": seen})
    return results


def eigenvector(product: Product, start: Tensor) -> Tensor:
    from scipy.sparse.linalg import LinearOperator, eigsh

    n = start.numel()
    operator = LinearOperator((n, n), matvec=lambda v: product(torch.from_numpy(v)).numpy(), dtype=np.float32)
    _, vectors = eigsh(operator, 1, which="LM", v0=start.numpy(), tol=1e-3, ncv=12)
    return torch.from_numpy(vectors[:, 0].copy())


def power_iteration(product: Product, v: Tensor) -> Tensor:
    for _ in range(_STEPS):
        v = unit(product(v))
    return v


def unit(v: Tensor) -> Tensor:
    return v / v.norm()


def flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


@torch.no_grad()
def write(parameters: Sequence[Tensor], weights: Tensor) -> None:
    for p, part in zip(parameters, weights.split([p.numel() for p in parameters]), strict=True):
        p.copy_(part.view(p.shape))


def section(epoch: int, results: Sequence[Result]) -> str:
    errors = "error along the eigenvector", "the gradient", "noise"
    header = ("r", *errors, "power iteration: cosine", "exact", "its curvature")
    rows = [
        (
            f"{x['probe']:g}",
            *(f"{100 * x[name]:.2g} %" for name in ("eigenvector", "gradient", "noise")),
            f"{x['cosine']:.4f}",
            f"{x['exact_cosine']:.4f}",
            f"{100 * x['curvature_share']:.1f} %",
        )
        for x in results
    ]
    text = f"first eigenvalue {results[0]['eigenvalue']:.4g}; curvature along the result as a share of it"
    return f"\n### After {epoch} epochs: {text}\n\n{table(header, rows)}"


if __name__ == "__main__":
    main()
