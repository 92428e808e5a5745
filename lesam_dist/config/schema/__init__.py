"""A run as nested dataclasses: every field with its unit and meaning. All of them are imported from here.

Plain data: `lesam_dist.config.checks.checked` is called where a config is read and where a run begins. `--help` and
`--print_config` are made from these classes; recipes are YAML files of the same shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lesam_dist.config.schema.adversarial import AdversarialConfig
from lesam_dist.config.schema.data import CIFAR_ONLY, DALI_ONLY, FOLDERS_ONLY, DataBackend, DataConfig
from lesam_dist.config.schema.domains import DomainsConfig
from lesam_dist.config.schema.label_noise import HUMAN_LABELS, LabelNoiseConfig
from lesam_dist.config.schema.learning import EmaConfig, LossConfig, ModelConfig, OptimizerConfig, ScheduleConfig
from lesam_dist.config.schema.long_tail import OF_LONG_TAIL_METHOD, LongTailConfig, LongTailMethod
from lesam_dist.config.schema.running import (
    AnalysisConfig,
    CheckpointConfig,
    ChecksConfig,
    GuardConfig,
    LoggingConfig,
    ParallelConfig,
    PrecisionConfig,
)

__all__ = [
    "CIFAR_ONLY",
    "DALI_ONLY",
    "FOLDERS_ONLY",
    "HUMAN_LABELS",
    "OF_LONG_TAIL_METHOD",
    "AdversarialConfig",
    "AnalysisConfig",
    "CheckpointConfig",
    "ChecksConfig",
    "Config",
    "DataBackend",
    "DataConfig",
    "DomainsConfig",
    "EmaConfig",
    "GuardConfig",
    "LabelNoiseConfig",
    "LoggingConfig",
    "LongTailConfig",
    "LongTailMethod",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "ScheduleConfig",
]


@dataclass
class Config:
    """Train an image classifier, or a task of your own."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    domains: DomainsConfig = field(default_factory=DomainsConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    long_tail: LongTailConfig = field(default_factory=LongTailConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checks: ChecksConfig = field(default_factory=ChecksConfig)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    task: str = "classification"
    """what is learned: classification, long_tail, domains, or a class of your own by package.module.Class
    (docs/tasks.md)"""
    task_args: dict[str, Any] = field(default_factory=dict)
    """arguments of a task of your own: --task_args.NAME VALUE"""
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
    init_from: str | None = None
    """start from the weights of a run's folder (its latest checkpoint), of a checkpoint or of an exported file, with a
    fresh optimizer and schedule; a last layer for other classes is fresh too. A run that resumes does not read it"""
    init_from_ema: bool = False
    """of init_from, the averaged weights"""
    profile: int | None = None
    """steps of this start to trace, after the first 3: RUN_DIR/profile gets a trace from each process, and the terminal
    a summary; null for none"""
    dry_run: bool = False
    """build everything, run two steps and an evaluation on random images, write nothing"""

    @property
    def on_device(self) -> bool:
        """Whether all images are decoded once and stay on the device: CIFAR's, and the small ones with a long tail."""
        data = self.data
        return data.builtin in ("cifar10", "cifar100") or (self.task == "long_tail" and data.builtin is not None)
