"""A run as nested dataclasses: every field with its unit and meaning, checked before anything is built.

`--help` and `--print_config` are made from these classes; recipes are YAML files of the same shape.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from lesam_dist.errors import UserError


@dataclass
class ModelConfig:
    """The network."""

    name: str = "resnet50"
    """a torchvision classification model, or one of lesam_dist.models (cifar_resnet20, ...)"""
    num_classes: int | None = None
    """size of the last layer; null takes the number of classes in the data"""
    zero_init_residual: bool = False
    """start each residual branch at zero (ResNets only)"""
    pretrained: bool = False
    """start from torchvision's ImageNet weights (its DEFAULT), with a fresh last layer; they are downloaded to torch
    hub's cache (TORCH_HOME) if they are not there. A dry run does without"""
    compile: bool = False
    """torch.compile: the whole model (none, ddp), or block by block (fsdp, hsdp). The first steps take a minute or
    more, and dropout draws other masks than without"""
    activation_checkpointing: bool = False
    """keep only each block's input for backward and compute the rest again: less memory, a third more work. Blocks are
    those of parallel.wrap_classes and must not hold BatchNorm"""


@dataclass
class DataConfig:
    """The images, as ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE, or CIFAR."""

    root: str | None = None
    """folder that holds train/ and val/; for cifar10 and cifar100 the folder that torchvision keeps them in"""
    builtin: Literal["digits", "digits_noisy", "cifar10", "cifar100"] | None = None
    """write this data set to root first if it is not there: scikit-learn's scanned digits; 300 of them with 20 % wrong
    labels and the same validation images; or CIFAR, which is downloaded, and kept on the device"""
    backend: Literal["dali", "torchvision"] = "dali"
    """who reads, decodes and augments class folders; CIFAR needs neither"""
    batch_size: int = 256
    """images per optimizer step, over all processes"""
    micro_batches: int = 1
    """parts that each process takes its share of a batch in, to save memory; their gradients are added up"""
    accumulation_mode: Literal["batch", "micro"] = "batch"
    """batch: one perturbation, from the gradient of all micro-batches; micro: one for each micro-batch (m-sharpness),
    which reduces gradients over the processes in every pass of each"""
    eval_batch_size: int = 256
    """images per forward in evaluation, per process"""
    image_size: int = 224
    """side of the square that the network sees, in pixels; CIFAR's 32 x 32 images are resized to it in the end"""
    val_resize: int = 256
    """short side that evaluation resizes to before the centre crop, in pixels (class folders)"""
    random_area: tuple[float, float] = (0.08, 1.0)
    """range of the random crop's share of the image area (class folders)"""
    random_aspect_ratio: tuple[float, float] = (0.75, 4 / 3)
    """range of the random crop's width over height (class folders)"""
    crop_padding: int = 4
    """black pixels on each side of the image that the random crop may show (CIFAR)"""
    cutout: int = 0
    """side in pixels of a square at a random place that is set to the mean colour; 0 for none (CIFAR)"""
    cutout_probability: float = 1.0
    """share of the training images that get one (CIFAR)"""
    horizontal_flip: bool = True
    """flip half of the training images"""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """per channel, on the scale 0 to 1"""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """per channel, on the scale 0 to 1"""
    workers: int = 4
    """decoding threads (DALI) or processes (torchvision) per process"""


@dataclass
class OptimizerConfig:
    """How the weights move. sgd and adamw are the plain optimizers, one pass a step. What the chosen method does not
    have is refused."""

    name: str = "lesam"
    """lesam, sam, asam, esam, fsam, eigensam, fishersam, gsam, ssam, msam, s2sam, looksam, wsam, samon; or plain sgd,
    adamw"""
    base: Literal["sgd", "adamw"] = "sgd"
    """what makes the update inside a sharpness-aware method"""
    start_epoch: float = 0.0
    """the method works from this epoch on; before, its base optimizer alone, at one pass a step"""
    stop_epoch: float | None = None
    """and up to this epoch; null goes on to the end"""
    lr: float = 0.1
    """peak learning rate"""
    momentum: float = 0.9
    """of SGD"""
    nesterov: bool = False
    """of SGD"""
    betas: tuple[float, float] = (0.9, 0.999)
    """of AdamW"""
    weight_decay: float = 1e-4
    """L2 in SGD, decoupled in AdamW"""
    decay_norm_and_bias: bool = True
    """false leaves biases and normalisation weights out of weight decay"""
    sigma: float = 0.3
    """LE-SAM's loss budget, in units of the loss"""
    rho_max: float | None = 0.2
    """LE-SAM's cap on the radius; null means none"""
    eps: float = 1e-12
    """LE-SAM's constant beside the gradient norm"""
    alpha: float | None = None
    """lesam: above 0 LE-SAM+ with this weight of the surrogate gap; gsam, eigensam, looksam: weight of their second
    direction. This and what follows: null takes the method's own default"""
    plus_form: Literal["paper", "released"] = "paper"
    """LE-SAM+ by the paper's Eq. 16 or as in the authors' code"""
    rho: float | None = None
    """radius of every method but lesam"""
    adaptive: bool = False
    """lesam: measure the perturbation in units of the weights' own size, as asam does"""
    eta: float | None = None
    """asam, adaptive lesam: added to the weights' size; fishersam: weight of the Fisher information"""
    beta: float | None = None
    """esam: share of the tensors that is perturbed"""
    gamma: float | None = None
    """esam: share of the samples in the second pass; wsam: weight of the sharpness"""
    lam: float | None = None
    """fsam: share of the gradients' average that a step keeps"""
    interval: int | None = None
    """eigensam: steps between power iterations; looksam: steps between ascents"""
    power_steps: int | None = None
    """eigensam: products with the Hessian in a power iteration"""
    rho_min: float | None = None
    """gsam: radius at a learning rate of zero; null keeps it constant"""
    scope: Literal["global", "local", "replica"] = "global"
    """what perturbs: the gradient averaged over all processes; or each process's own (local, ddp), or each replica's
    (replica, hsdp), which save a reduction. sigma must be tuned for each"""
    max_grad_norm: float | None = None
    """clip the gradient of the update to this global norm; never the first one, which makes the radius"""
    ascent_fraction: float = 1.0
    """share of each process's samples that the first pass takes; a step costs 1 + ascent_fraction passes"""
    ascent_interval: int = 1
    """make both passes only every k-th step; a step then costs (k + 1) / k passes"""
    ascent_between: Literal["skip", "reuse"] = "skip"
    """the single pass of the steps between: plain, or perturbed by the last first gradient (one more copy of it)"""
    backend: Literal["auto", "reference", "triton"] = "auto"
    """who does the optimizer's maths"""


@dataclass
class ScheduleConfig:
    """Learning rate and loss budget over the run, changed every step."""

    lr_warmup_epochs: float = 0.0
    """linear warm-up of the learning rate, then cosine to zero"""
    sigma_warmup_epochs: float = 0.0
    """linear warm-up of sigma (none in the paper, 10 in the authors' code)"""
    anneal_start_epoch: float | None = None
    """epoch at which sigma starts its cosine to zero at the end of the run; null keeps it constant. The paper's tables
    call it "Budget annealing (epoch)"."""


@dataclass
class EmaConfig:
    """An average of the weights over the steps, evaluated and saved beside them."""

    decay: float | None = None
    """share of the average that a step keeps, in [0, 1), e.g. 0.9999; null keeps no average. BatchNorm statistics are
    the model's own"""


@dataclass
class LossConfig:
    """Cross entropy."""

    label_smoothing: float = 0.0
    """share of the target spread over all classes, 0 to 1"""


@dataclass
class ParallelConfig:
    """How the processes that torchrun started work together."""

    strategy: Literal["none", "ddp", "fsdp", "hsdp"] = "ddp"
    """ddp: every process has the whole model; fsdp: parameters, gradients and optimizer state are split over all
    processes; hsdp: split within groups of shard_size processes, and replicated over the groups; none: one process"""
    shard_size: int | None = None
    """processes that share one copy of the model (hsdp); null takes the processes of one node"""
    replicate_size: int | None = None
    """number of copies of the model (hsdp); null takes what shard_size leaves"""
    reshard_after_forward: bool = True
    """free gathered parameters between forward and backward: less memory, one more all-gather (fsdp, hsdp)"""
    wrap_classes: list[str] = field(default_factory=list)
    """names of the module classes that are gathered (fsdp, hsdp), compiled and recomputed as one unit; empty takes the
    model's known blocks"""
    device: Literal["cpu", "cuda"] | None = None
    """null takes the GPUs where there are some"""
    timeout_s: float = 600.0
    """seconds that one process may keep the others waiting before the run ends; a silent one is named after a minute.
    Raise it where rank 0 downloads data or weights for longer, or a process compiles for longer than the others"""


@dataclass
class PrecisionConfig:
    """Number formats."""

    compute: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 run the forward under autocast, fp16 with a loss scale; weights, gradients and optimizer stay
    float32"""
    weights: Literal["fp32", "bf16"] = "fp32"
    """bf16 stores all weights but BatchNorm's, their gradients and momenta in bfloat16 (none, ddp). It rounds small
    perturbations away: realized_rho in the log is what is left of rho"""
    gather_dtype: Literal["fp32", "bf16"] = "fp32"
    """what fsdp and hsdp gather parameters in; bf16 needs compute bf16 and halves that traffic. BatchNorm, gradients
    and their reduction stay float32"""
    tf32: bool = True
    """let CUDA use TF32 inside float32 convolutions and matrix products"""
    channels_last: bool = False
    """images and, but for fsdp and hsdp, weights lie channels last in memory; convolutions then run so"""


@dataclass
class CheckpointConfig:
    """Checkpoints in RUN_DIR/checkpoints."""

    every_epochs: int = 1
    """save after every so many epochs, and after the last"""
    keep: int = 2
    """how many of the newest stay on disk"""


@dataclass
class LoggingConfig:
    """What is written where, by rank 0."""

    every_steps: int = 50
    """steps between two lines of metrics.jsonl"""
    tensorboard: bool = True
    """write TensorBoard events beside metrics.jsonl"""


@dataclass
class Config:
    """Train an image classifier."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    epochs: int = 90
    """passes over the training images"""
    seed: int = 0
    """of weights, order and augmentation"""
    max_nonfinite_steps: int = 50
    """the run stops after so many steps in a row in which the loss or a gradient was not finite; noticed when a line is
    logged and at the end of an epoch. float16's loss scale needs some of them to find its place"""
    run_dir: str = "runs/default"
    """folder for everything that the run writes"""
    resume: str | None = None
    """"auto": go on from RUN_DIR's latest checkpoint, or start where there is none"""
    dry_run: bool = False
    """build everything, run two steps and an evaluation on random images, write nothing"""

    def __post_init__(self) -> None:
        """Check what can be known of the fields alone; what needs the data or the model is checked when it is there."""
        from lesam_dist.config.checks import check, folder  # here: it looks at the fields that are defined above

        check(self)
        self.run_dir = folder("run_dir", self.run_dir)
        if self.data.root is not None:
            self.data.root = folder("data.root", self.data.root)


# A resumed run may differ in these: they change where things go and how fast, not what is computed.
_FREE_ON_RESUME = (
    "run_dir",
    "resume",
    "dry_run",
    "max_nonfinite_steps",
    "checkpoint",
    "logging",
    "data.root",
    "data.workers",
    "data.eval_batch_size",
    "parallel.timeout_s",
    "model.compile",
    "model.activation_checkpointing",
)


def get(config: Config, path: str) -> Any:
    """The value at a dotted path, e.g. ``"optimizer.sigma"``."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a config by its dotted path, with tuples as lists (as YAML gives them back)."""
    leaves: dict[str, Any] = {}
    for item in fields(config):
        value, path = getattr(config, item.name), prefix + item.name
        if is_dataclass(value):
            leaves |= flatten(value, path + ".")
        else:
            leaves[path] = list(value) if isinstance(value, tuple) else value
    return leaves


def default_values() -> dict[str, Any]:
    """`flatten` of a config in which nothing is set."""
    leaves: dict[str, Any] = {}
    for item in fields(Config):
        if item.default_factory is not MISSING:
            leaves |= flatten(item.default_factory(), item.name + ".")
        else:
            leaves[item.name] = item.default
    return leaves


def differences(now: Config, saved: dict[str, Any], when: str) -> list[str]:
    """Every field that changes what a run computes and that differs, with both values; ``when`` is the saved one's."""
    then = default_values() | saved  # a younger field had what is its default now
    return [
        f"{path}: {then[path]!r} {when}, {value!r} now"
        for path, value in flatten(now).items()
        if then[path] != value and not path.startswith(_FREE_ON_RESUME)
    ]


def check_same_run(now: Config, saved: dict[str, Any]) -> None:
    """Refuse to resume where the config would change what the run computes.

    Args:
        now: the config of this start.
        saved: `flatten` of the config that the checkpoint was made with.

    Raises:
        UserError: naming every field that differs, with both values.
    """
    differing = differences(now, saved, "then")
    if differing:
        raise UserError(
            "cannot resume: the config differs from the checkpoint's in what the run computes:\n  "
            + "\n  ".join(differing)
            + "\nUse the saved values (RUN_DIR/config.yaml), or start anew in another --run_dir."
        )
