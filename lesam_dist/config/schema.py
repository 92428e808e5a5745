"""A run as nested dataclasses: every field with its unit and meaning.

Plain data: `lesam_dist.config.checks.checked` is called where a config is read and where a run begins. `--help` and
`--print_config` are made from these classes; recipes are YAML files of the same shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lesam_dist.optim.engine.options import Between
from lesam_dist.parallel.scope import Scope

DataBackend = Literal["auto", "dali", "torchvision"]


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
class DataConfig:
    """The images, as ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE, packed by `lesam-dist pack`, or CIFAR."""

    root: str | None = None
    """folder that holds train/ and val/, or packed shards, or the address of these (s3://BUCKET/FOLDER); for cifar10
    and cifar100 the folder that torchvision keeps them in"""
    builtin: Literal["digits", "digits_noisy", "cifar10", "cifar100"] | None = None
    """write this data set to root first if it is not there: scikit-learn's scanned digits; 300 of them with 20 % wrong
    labels and the same validation images; or CIFAR, which is downloaded, and kept on the device"""
    backend: DataBackend = "auto"
    """who reads, decodes and augments class folders; CIFAR needs neither. auto takes DALI where it is installed"""
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
    val_crop: int | None = None
    """side of that crop, in pixels; null takes image_size (class folders)"""
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
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = "none"
    """change colours and shape of each training image, after crop and flip, by randaugment_ops operations of one
    magnitude (RandAugment), or by one of a random magnitude (TrivialAugment) (class folders)"""
    randaugment_ops: int = 2
    """operations on each image (randaugment)"""
    randaugment_magnitude: int = 9
    """how strong each is, 0 to 30 (randaugment)"""
    random_erasing: float = 0.0
    """share of the training images of which a rectangle is set to the mean colour, 0 to 1 (class folders)"""
    mixup: float = 0.0
    """mix each training image, and its target, with another one: alpha of the Beta distribution of its share; 0 for
    never. Of mixup and cutmix, where both are on, each step takes one"""
    cutmix: float = 0.0
    """paste a rectangle of another training image, and mix the targets likewise: alpha of the Beta distribution of the
    share that stays; 0 for never"""
    mix_probability: float = 1.0
    """share of the steps in which mixup or cutmix is applied, above 0 and up to 1"""
    repeats: int = 1
    """times that each image of a batch is in it, each time augmented in another way. An epoch has as many steps as with
    1, so it reads one in so many of the images"""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """per channel, on the scale 0 to 1"""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """per channel, on the scale 0 to 1"""
    order: Literal["random", "sequential"] = "random"
    """random: each epoch in an order of its own; sequential: packed shards from front to back, which suits an object
    store or a slow disk, but shuffles less: shards come in an order of their own each epoch, and then shuffle_window
    images at a time are shuffled, so that images of one shard stay near each other"""
    shuffle_window: int = 16384
    """images that are shuffled together (sequential)"""
    workers: int = 4
    """decoding threads (DALI) or processes (torchvision) per process"""
    dali_decoder: Literal["gpu", "cpu"] = "gpu"
    """where DALI decodes JPEGs on a machine with a GPU: there, which takes some of its time, or in the workers"""
    dali_hardware_load: float = 0.65
    """share of the images that the GPU's hardware decoder takes, 0 to 1 (A100 and later, DALI)"""
    dali_preallocate: tuple[int, int] | None = None
    """width and height in pixels of the largest image, for which the hardware decoder makes room at the start; null
    lets it grow, which stops the GPU each time (DALI)"""
    dali_device_padding: int = 16
    """MiB of GPU memory that each decoding thread has from the start (DALI)"""
    dali_host_padding: int = 8
    """MiB of pinned memory that each decoding thread has from the start (DALI)"""
    dali_prefetch: int = 2
    """batches that DALI works on ahead"""
    dali_affinity: bool = False
    """bind each of DALI's threads to a core, which the environment variable DALI_AFFINITY_MASK may choose"""
    replay: bool = False
    """train on the first batch in every step, to measure how fast a run is that need not read images"""
    skip_list: str | None = None
    """file that `lesam-dist scan` wrote: the images in it are left out of both splits (class folders)"""
    max_bad_files: int = 10
    """training images that cannot be decoded and are replaced by others, over all processes and the whole run, before
    it stops; each is named and counted (class folders)"""


FOLDERS_ONLY = (
    "val_crop",
    "random_area",
    "random_aspect_ratio",
    "auto_augment",
    "randaugment_ops",
    "randaugment_magnitude",
    "random_erasing",
)
CIFAR_ONLY = ("crop_padding", "cutout", "cutout_probability")
"""Fields of `DataConfig` that say how class folders alone, or CIFAR alone, are cropped and augmented."""
DALI_ONLY = (
    "dali_decoder",
    "dali_hardware_load",
    "dali_preallocate",
    "dali_device_padding",
    "dali_host_padding",
    "dali_prefetch",
    "dali_affinity",
)
"""Fields that say how DALI works."""


@dataclass
class OptimizerConfig:
    """How the weights move; what the chosen method does not have is refused."""

    name: str = "lesam"
    """one of the methods at the end, your own by package.module:Class, or plain sgd, adamw, lars or lamb, at one
    pass a step"""
    args: dict[str, Any] = field(default_factory=dict)
    """the method's arguments, listed at the end: --optimizer.args.NAME VALUE, or --optimizer.NAME VALUE for short; what
    is not given, or null, has its default"""
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
    """linear warm-up of the learning rate, then cosine to zero"""
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
    """share of the average that a step keeps, in [0, 1), e.g. 0.9999; null keeps no average. BatchNorm statistics are
    the model's own"""


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
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """what ddp reduces the gradients of the update in; bf16 halves that traffic, and rounds. The gradient that makes
    the perturbation is reduced in float32 all the same"""
    device: Literal["cpu", "cuda"] | None = None
    """null takes the GPUs where there are some"""
    sync_batchnorm: bool = False
    """BatchNorm takes its mean and variance over the samples of all processes, in each forward of training (GPUs)"""
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
    cudnn_benchmark: bool = False
    """let cuDNN try its algorithms at the first convolution of each shape and keep the fastest. Two runs may then take
    different ones, which round differently"""
    deterministic: bool = False
    """use operations alone that give the same bits again on the same device; an error where torch has none"""
    channels_last: bool = False
    """images and, but for fsdp and hsdp, weights lie channels last in memory; convolutions then run so"""


@dataclass
class CheckpointConfig:
    """Checkpoints in RUN_DIR/checkpoints."""

    every_epochs: int = 1
    """save after every so many epochs, and after the last"""
    every_steps: int | None = None
    """and after every so many steps of the run; null for none"""
    every_minutes: float | None = None
    """and when so many minutes have passed since the last one; null for none"""
    keep: int = 2
    """how many of the newest stay on disk"""
    keep_every_epochs: int | None = None
    """those at the end of every so many epochs stay for good; null for none"""
    keep_best: bool = True
    """the one with the highest top-1 accuracy stays (of the averaged weights, where ema.decay is set)"""
    asynchronous: Literal["auto", "always", "never"] = "auto"
    """write while training goes on, at the cost of a copy of the state in the host's memory; auto does so where waiting
    would take more than 1 % of the time"""
    grace_seconds: float = 25.0
    """seconds after SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 in which the run makes its last checkpoint and ends (status
    75), or else is ended; torchrun kills after 30"""


@dataclass
class GuardConfig:
    """What a run does when its loss jumps."""

    max_loss_increase: float | None = None
    """go back to the last checkpoint and leave the batch out whose loss, the mean over all processes, is higher than
    the average of the last steps by more than this; null for never. Looked at in every step, one step late"""
    max_rollbacks: int = 10
    """how often, before the run stops"""


@dataclass
class ChecksConfig:
    """What a run checks about itself."""

    every_steps: int | None = None
    """compare the weights, optimizer state and averages of all replicas after every so many steps, to find memory or a
    device that flips bits; null for never"""


@dataclass
class LoggingConfig:
    """What is written where, by rank 0."""

    every_steps: int = 50
    """steps between two lines of metrics.jsonl"""
    tensorboard: bool = True
    """write TensorBoard events beside metrics.jsonl"""
    peak_tflops: float | None = None
    """dense TFLOP/s of a device in the run's number format, which mfu is a share of; null takes those of A100, H100,
    H200 and B200, and leaves mfu out for others"""


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
    guard: GuardConfig = field(default_factory=GuardConfig)
    checks: ChecksConfig = field(default_factory=ChecksConfig)
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
    profile: int | None = None
    """steps of this start to trace, after the first 3: RUN_DIR/profile gets a trace from each process, and the terminal
    a summary; null for none"""
    dry_run: bool = False
    """build everything, run two steps and an evaluation on random images, write nothing"""
