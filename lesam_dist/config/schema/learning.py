"""What is learned and how: the network, its loss, and how its weights move."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lesam_dist.optim.engine.options import Between
from lesam_dist.parallel.scope import Scope


@dataclass
class ModelConfig:
    """The network."""

    name: str = "resnet50"
    """a torchvision classification model, one of lesam_dist.models (cifar_resnet20, vit_s_16, ...), or one of timm's as
    timm/NAME (pip install 'lesam-dist[timm]')"""
    num_classes: int | None = None
    """size of the last layer; null takes the number of classes in the data"""
    zero_init_residual: bool = False
    """start each residual branch at zero (ResNets only)"""
    pretrained: bool = False
    """start from torchvision's ImageNet weights (its DEFAULT), with a fresh last layer; they are downloaded to torch
    hub's cache (TORCH_HOME) if they are not there. A dry run does without"""
    drop_path: float | None = None
    """stochastic depth: probability that a training sample skips the last residual branch, from 0 at the first on; null
    takes the model's own, which is none for ResNets and ViTs"""
    compile: bool = False
    """torch.compile: the whole model (none, ddp), or block by block (fsdp, hsdp). The first steps take a minute or
    more, and dropout draws other masks than without"""
    activation_checkpointing: bool = False
    """keep only each block's input for backward and compute the rest again: less memory, a third more work. Blocks are
    those of parallel.wrap_classes and must not hold BatchNorm"""


@dataclass
class OptimizerConfig:
    """How the weights move; what the chosen method does not have is refused."""

    name: str = "lesam"
    """a method (--help.methods), your own by package.module:Class, or plain sgd, adamw, lars or lamb, at one pass
    a step"""
    args: dict[str, Any] = field(default_factory=dict)
    """the method's arguments (--help.methods): --optimizer.args.NAME VALUE, or --optimizer.NAME VALUE for short; what
    is not given, or null, has the method's own default, as sigma 0.3 of lesam"""
    base: Literal["sgd", "adamw", "lars", "lamb"] = "sgd"
    """what makes the update inside a sharpness-aware method; lars and lamb are SGD and Adam with a length of the step
    for each layer, for large batches"""
    start_epoch: float = 0.0
    """the method works from this epoch on; before, its base optimizer alone, at one pass a step"""
    stop_epoch: float | None = None
    """and up to this epoch; null goes on to the end"""
    lr: float = 0.1
    """peak learning rate, of a batch of lr_reference_batch where lr_scaling is on"""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """multiply lr by data.batch_size / lr_reference_batch (linear, usual for SGD and LARS), or by the square root of
    that (sqrt, usual for AdamW and LAMB); the log has the rate that is used"""
    lr_reference_batch: int = 256
    """images of the batch that lr is given for; used by lr_scaling"""
    momentum: float = 0.9
    """of SGD and LARS"""
    nesterov: bool = False
    """of SGD and LARS"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of AdamW and LAMB"""
    trust_coefficient: float = 0.001
    """of LARS: a layer's step, before momentum, is lr * trust_coefficient of its weights' norm"""
    weight_decay: float = 1e-4
    """L2 in SGD and LARS, decoupled in AdamW, part of the direction in LAMB"""
    decay_norm_and_bias: bool = True
    """false leaves biases and normalisation weights out of weight decay"""
    scope: Scope = "global"
    """what perturbs: the gradient averaged over all processes; or each process's own (local, ddp), or each replica's
    (replica, hsdp), which save a reduction. sigma must be tuned for each"""
    max_grad_norm: float | None = None
    """clip the gradient of the update to this global norm; never the first one, which makes the radius"""
    ascent_fraction: float = 1.0
    """share of each process's samples that the first pass takes; a step costs 1 + ascent_fraction passes"""
    ascent_interval: int = 1
    """make both passes only every k-th step; a step then costs (k + 1) / k passes"""
    ascent_between: Between = "skip"
    """the single pass of the steps between: plain, or perturbed by the last first gradient (one more copy of it)"""
    backend: Literal["auto", "reference", "triton"] = "auto"
    """who does the optimizer's maths"""


@dataclass
class ScheduleConfig:
    """Learning rate and loss budget over the run, changed every step."""

    lr_warmup_epochs: float = 0.0
    """linear warm-up of the learning rate"""
    lr_decay: Literal["cosine", "none"] = "cosine"
    """what follows: a cosine to zero at the end of the run, or the peak rate to the end"""
    sigma_warmup_epochs: float = 0.0
    """linear warm-up of the loss budget sigma (none in the paper, 10 in the authors' code)"""
    anneal_start_epoch: float | None = None
    """epoch at which sigma starts its cosine to zero at the end of the run; null keeps it constant. The paper's tables
    call it "Budget annealing (epoch)"."""
    image_size: list[tuple[int, int]] | None = None
    """[epoch, pixels] pairs: from each such epoch on the side of the training images; null takes data.image_size in
    all. Evaluation is not changed by it (class folders)"""


@dataclass
class EmaConfig:
    """An average of the weights over the steps, evaluated and saved beside them."""

    decay: float | None = None
    """share of the average that a step keeps, in [0, 1), e.g. 0.9999; null keeps no such average"""
    uniform_from: int | None = None
    """instead: the mean of the weights after each step from this one on, counted from 1, and before it the weights
    themselves, e.g. 600 (ERM++); null keeps no such average"""
    swad: bool = False
    """instead: the mean of the weights after each step of the valley that the validation loss is in, as its evaluations
    tell (SWAD). It is of use where validation images are no test images, as with task domains"""
    swad_converge: int = 3
    """evaluations of which the first must be the best, for the valley to begin there"""
    swad_tolerance: int = 6
    """evaluations in a row above the threshold, after which it has ended"""
    swad_tolerance_ratio: float = 0.3
    """how far above the mean loss of the first swad_converge evaluations the threshold is, as a share of it"""

    @property
    def is_on(self) -> bool:
        """Whether an average is kept."""
        return self.decay is not None or self.uniform_from is not None or self.swad


@dataclass
class LossConfig:
    """What training minimises; evaluation reports cross entropy."""

    name: Literal["cross_entropy", "binary"] = "cross_entropy"
    """binary: each class is told from all others, by binary cross entropy, of which the mean over the classes is taken
    too"""
    label_smoothing: float = 0.0
    """share of the target spread over all classes, 0 to 1"""
    binary_threshold: float | None = None
    """targets above it become 1 and all others 0, after smoothing and mixing; null leaves them (binary)"""
