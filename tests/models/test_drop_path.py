"""Stochastic depth: which samples skip a branch, how often, and what becomes of the others."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vision_transformer import EncoderBlock
from torchvision.ops import StochasticDepth

from lesam_dist import BatchPasses
from lesam_dist.errors import UserError
from lesam_dist.models import build_model
from lesam_dist.models.drop_path import set_drop_path
from lesam_dist.models.pyramidnet import PyramidBlock
from lesam_dist.models.wide_resnet import WideBlock
from lesam_dist.parallel.blocks import find_blocks

SAMPLES, RATE = 4000, 0.3

# Each block, what its residual branches end with, and what follows the sum.
BLOCKS = [
    (partial(BasicBlock, 4, 4), ["bn2"], torch.relu),
    (partial(Bottleneck, 4, 1), ["bn3"], torch.relu),
    (partial(WideBlock, 4, 4, 1), ["conv2"], torch.clone),
    (partial(PyramidBlock, 4, 4, 1), ["bn3"], torch.clone),
    (partial(EncoderBlock, 2, 4, 8, 0.0, 0.0), ["dropout", "mlp"], torch.clone),
]


@pytest.mark.parametrize(("make", "ends", "after"), BLOCKS, ids=lambda value: getattr(value, "func", value).__class__)
def test_samples_skip_a_branch_or_have_more_of_it(
    seed: int, make: partial[nn.Module], ends: list[str], after: type[torch.relu]
) -> None:
    """Of two blocks the first skips nothing, and the second has the whole rate."""
    model = nn.Sequential(make(), make()).double()
    for p in model.parameters():
        nn.init.normal_(p)
        if p.ndim == 1:  # of a norm, whose ReLU shall not often leave zeros alone, which are skipped and kept alike
            p.data.abs_()
    inputs: list[Tensor] = []
    branches: list[list[Tensor]] = [[], []]
    for block, outputs in zip(model, branches, strict=True):
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
        for end in ends:  # before they are dropped
            block.get_submodule(end).register_forward_hook(lambda _, __, out, to=outputs: to.append(out.clone()))
    names = list(model.state_dict())
    assert set_drop_path(model, RATE)
    assert list(model.state_dict()) == names

    shape = (SAMPLES, 3, 4) if make.func is EncoderBlock else (SAMPLES, 4, 2, 2)
    result = model.train()(torch.randn(shape, dtype=torch.float64))
    torch.testing.assert_close(inputs[1], after(inputs[0] + sum(branches[0])))
    keeps = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(ends)))).double()
    outs = torch.stack(branches[1])
    expected = [after(inputs[1] + torch.tensordot(keep / (1 - RATE), outs, 1)) for keep in keeps]
    found = torch.stack([torch.isclose(result, e).flatten(1).all(dim=1) for e in expected])
    assert found.any(dim=0).all(), "each sample is one of them"
    told = found[:, found.sum(dim=0) == 1].double()  # ReLU may leave zeros of either, of one sample in thousands
    assert told.shape[1] > 0.9 * SAMPLES
    # Of n trials the share is off by sqrt(p (1 - p) / n); six of these are once in 10^9.
    off = (told.T @ keeps).mean(dim=0) - (1 - RATE)
    assert off.abs().max() < 6 * (RATE * (1 - RATE) / told.shape[1]) ** 0.5

    model.eval()
    inputs.clear()
    branches[1].clear()
    torch.testing.assert_close(model(torch.randn(shape).double()), after(inputs[1] + sum(branches[1])))


def test_rates_grow_linearly_to_that_of_the_last_block() -> None:
    with torch.device("meta"):
        blocks = find_blocks(build_model("resnet50", 7, drop_path=0.05))
    hooks = [hook for block in blocks for hook in block.bn3._forward_hooks.values()]  # type: ignore[operator, union-attr]
    assert [hook.keywords["p"] for hook in hooks] == pytest.approx([0.05 * k / 15 for k in range(16)])


def rates(name: str, drop_path: float | None) -> list[float]:
    with torch.device("meta"):
        model = build_model(name, 7, drop_path=drop_path)
    return [module.p for module in model.modules() if isinstance(module, StochasticDepth)]


@pytest.mark.parametrize(("name", "own"), [("convnext_tiny", 0.1), ("swin_t", 0.2)])
def test_models_that_have_it_keep_its_shape(name: str, own: float) -> None:
    before = rates(name, None)
    assert before[-1] == own
    assert rates(name, 0.3) == pytest.approx([p / own * 0.3 for p in before])
    assert set(rates(name, 0.0)) == {0.0}


def test_a_model_without_residual_blocks_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.drop_path is 0.1 but 'squeezenet1_1' has no residual blocks"):
        build_model("squeezenet1_1", 7, drop_path=0.1)
    build_model("squeezenet1_1", 7, drop_path=0.0)


def test_both_passes_skip_the_same(seed: int) -> None:
    torch.manual_seed(seed)
    model = build_model("cifar_resnet8", 7, drop_path=0.9)
    x, y = torch.randn(16, 3, 8, 8), torch.randint(7, (16,))
    passes = BatchPasses(model, nn.CrossEntropyLoss(), x, y)
    loss = passes()
    assert passes() == loss
    assert BatchPasses(model, nn.CrossEntropyLoss(), x, y)() != loss
