"""How a run works: its processes and number formats, and what it saves, watches and writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


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

    @property
    def is_sharded(self) -> bool:
        """Whether each process stores a part of the weights."""
        return self.strategy in ("fsdp", "hsdp")


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
    """the one with the highest top-1 accuracy stays (of the averaged weights, where an average is kept)"""
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
class AnalysisConfig:
    """How flat the loss is, measured while a run goes on."""

    every_epochs: int | None = None
    """after every so many epochs, and after the last, log the low-pass filtered training loss (lpf) and the loss of the
    same images (lpf_loss): two forwards over them; null for never"""
    samples: int = 1024
    """training images that are looked at, without augmentation; they are kept in the host's memory"""
    lpf_sigma: float = 0.01
    """standard deviation of the noise on each weight"""


@dataclass
class LoggingConfig:
    """What is written where, by rank 0."""

    every_steps: int = 50
    """steps between two lines of metrics.jsonl"""
    tensorboard: bool = True
    """write TensorBoard events beside metrics.jsonl"""
    wandb: bool = False
    """show the run at Weights & Biases too (pip install 'lesam-dist[wandb]'); WANDB_PROJECT, WANDB_MODE and its other
    variables say how"""
    mlflow: bool = False
    """and at MLflow (pip install 'lesam-dist[mlflow]'); MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say where"""
    peak_tflops: float | None = None
    """dense TFLOP/s of a device in the run's number format, which mfu is a share of; null takes those of A100, H100,
    H200 and B200, and leaves mfu out for others"""
