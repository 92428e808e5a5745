"""A run as nested dataclasses: every field with its unit and meaning, checked before anything is built.

`--help` and `--print_config` are made from these classes; recipes are YAML files of the same shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from lesam_dist.errors import UserError, unknown_name

OPTIMIZERS = ("lesam", "sam", "sgd", "adamw")


@dataclass
class ModelConfig:
    """The network."""

    name: str = "resnet50"
    """a torchvision classification model, or one of lesam_dist.models (cifar_resnet20, ...)"""
    num_classes: int | None = None
    """size of the last layer; null takes the number of classes in the data"""
    zero_init_residual: bool = False
    """start each residual branch at zero (ResNets only)"""


@dataclass
class DataConfig:
    """The images, as ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE."""

    root: str | None = None
    """folder that holds train/ and val/"""
    builtin: Literal["digits"] | None = None
    """write this data set to root first if it is not there: scikit-learn's scanned digits"""
    backend: Literal["dali", "torchvision"] = "dali"
    """who reads, decodes and augments"""
    batch_size: int = 256
    """images per optimizer step, over all processes"""
    micro_batches: int = 1
    """parts that each process takes its share of a batch in, to save memory; their gradients are added up"""
    eval_batch_size: int = 256
    """images per forward in evaluation, per process"""
    image_size: int = 224
    """side of the square that the network sees, in pixels"""
    val_resize: int = 256
    """short side that evaluation resizes to before the centre crop, in pixels"""
    random_area: tuple[float, float] = (0.08, 1.0)
    """range of the random crop's share of the image area"""
    random_aspect_ratio: tuple[float, float] = (0.75, 4 / 3)
    """range of the random crop's width over height"""
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
    """How the weights move. sgd and adamw are the plain optimizers, one pass a step."""

    name: str = "lesam"
    """lesam, sam, sgd or adamw"""
    base: Literal["sgd", "adamw"] = "sgd"
    """what makes the update inside lesam and sam"""
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
    alpha: float = 0.0
    """above 0: LE-SAM+ with this weight of the surrogate gap"""
    plus_form: Literal["paper", "released"] = "paper"
    """LE-SAM+ by the paper's Eq. 16 or as in the authors' code"""
    rho: float = 0.05
    """SAM's radius"""
    scope: Literal["global", "local"] = "global"
    """what perturbs: the gradient averaged over all processes, or (ddp) each process's own, which saves a reduction"""
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
    """names of the module classes that are gathered as one unit (fsdp, hsdp); empty takes the model's known blocks"""
    device: Literal["cpu", "cuda"] | None = None
    """null takes the GPUs where there are some"""


@dataclass
class PrecisionConfig:
    """Number formats."""

    compute: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 run the forward under autocast, fp16 with a loss scale; weights, gradients and optimizer stay
    float32"""
    tf32: bool = True
    """let CUDA use TF32 inside float32 convolutions and matrix products"""
    channels_last: bool = False
    """store weights and images channels last"""


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
    loss: LossConfig = field(default_factory=LossConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    epochs: int = 90
    """passes over the training images"""
    seed: int = 0
    """of weights, order and augmentation"""
    run_dir: str = "runs/default"
    """folder for everything that the run writes"""
    resume: str | None = None
    """"auto": go on from RUN_DIR's latest checkpoint, or start where there is none"""
    dry_run: bool = False
    """build everything, run two steps and an evaluation on random images, write nothing"""

    def __post_init__(self) -> None:
        """Check what one field says about itself; what needs the data or the model is checked when they are there."""
        if self.optimizer.name not in OPTIMIZERS:
            raise unknown_name("optimizer", self.optimizer.name, OPTIMIZERS)
        if self.resume not in (None, "auto"):
            raise UserError(f"resume is '{self.resume}': it is 'auto' or null.")
        for path, low in _AT_LEAST.items():
            value = get(self, path)
            if value is not None and not value >= low:
                raise UserError(f"{path} is {value}: it must be at least {low}.")
        if not 0 <= self.loss.label_smoothing < 1:
            raise UserError(f"loss.label_smoothing is {self.loss.label_smoothing}: it must be in [0, 1).")
        if self.optimizer.scope == "local" and self.parallel.strategy in ("fsdp", "hsdp"):
            raise UserError(
                f"optimizer.scope is local but parallel.strategy is {self.parallel.strategy}: the shards of all "
                "processes are one copy of the weights, which cannot be perturbed in several ways at once. Choose ddp, "
                "or global."
            )
        self._check_schedule()

    def _check_schedule(self) -> None:
        schedule, epochs = self.schedule, self.epochs
        start = epochs if schedule.anneal_start_epoch is None else schedule.anneal_start_epoch
        if schedule.anneal_start_epoch is not None and start >= epochs:
            raise UserError(
                f"schedule.anneal_start_epoch is {start} but the run has {epochs} epochs: the annealing would never "
                "start. Choose an earlier epoch, or null for a constant sigma."
            )
        if schedule.sigma_warmup_epochs > start:
            raise UserError(
                f"schedule.sigma_warmup_epochs is {schedule.sigma_warmup_epochs}, past the start of the annealing at "
                f"epoch {start}: shorten it."
            )
        if schedule.lr_warmup_epochs > epochs:
            raise UserError(
                f"schedule.lr_warmup_epochs is {schedule.lr_warmup_epochs}, longer than the run of {epochs} epochs."
            )


_AT_LEAST = {
    "epochs": 1,
    "model.num_classes": 1,
    "data.batch_size": 1,
    "data.eval_batch_size": 1,
    "data.micro_batches": 1,
    "data.image_size": 1,
    "data.val_resize": 1,
    "data.workers": 1,
    "optimizer.lr": 0,
    "optimizer.momentum": 0,
    "optimizer.weight_decay": 0,
    "optimizer.sigma": 0,
    "optimizer.rho_max": 0,
    "optimizer.eps": 0,
    "optimizer.alpha": 0,
    "optimizer.rho": 0,
    "schedule.lr_warmup_epochs": 0,
    "schedule.sigma_warmup_epochs": 0,
    "schedule.anneal_start_epoch": 0,
    "parallel.shard_size": 1,
    "parallel.replicate_size": 1,
    "checkpoint.every_epochs": 1,
    "checkpoint.keep": 1,
    "logging.every_steps": 1,
}

# A resumed run may differ in these: they change where things go and how fast, not what is computed.
_FREE_ON_RESUME = (
    "run_dir",
    "resume",
    "dry_run",
    "checkpoint",
    "logging",
    "data.root",
    "data.workers",
    "data.eval_batch_size",
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


def check_same_run(now: Config, saved: dict[str, Any]) -> None:
    """Refuse to resume where the config would change what the run computes.

    Args:
        now: the config of this start.
        saved: `flatten` of the config that the checkpoint was made with.

    Raises:
        UserError: naming every field that differs, with both values.
    """
    differing = [
        f"{path}: {saved.get(path)!r} then, {value!r} now"
        for path, value in flatten(now).items()
        if saved.get(path) != value and not path.startswith(_FREE_ON_RESUME)
    ]
    if differing:
        raise UserError(
            "cannot resume: the config differs from the checkpoint's in what the run computes:\n  "
            + "\n  ".join(differing)
            + "\nUse the saved values (RUN_DIR/config.yaml), or start anew in another --run_dir."
        )
