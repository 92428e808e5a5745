"""What other settings of the same run would change, and what to know before one takes them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lesam_dist.config.checks import checked
from lesam_dist.config.methods import PLAIN
from lesam_dist.config.schema import Config
from lesam_dist.errors import UserError
from lesam_dist.planning.method import observe_run
from lesam_dist.planning.predict import Case

_OWN = "perturbs by its own gradient, which is noisier: LE-SAM's radius gets smaller, and sigma must be tuned anew"
_CAUTIONS = {
    "optimizer.scope local": f"each GPU {_OWN}",
    "optimizer.scope replica": f"each replica {_OWN}",
    "optimizer.ascent_fraction": "the first gradient is of half of the batch, and noisier, as with scope local",
    "optimizer.ascent_interval": "four of five steps are the base optimizer's",
    "optimizer.name looksam": "four of five steps reuse a part of the last perturbation; its radius is to be tuned",
    "parallel.strategy": "the same numbers; memory and communication alone change",
    "data.batch_size": "another run: fewer steps, optimizer.lr to be scaled and warmed up; accuracy is not predicted",
}


@dataclass(frozen=True)
class Alternative:
    """Fields as a user would give them, e.g. "optimizer.scope local"; or a batch so many times as large."""

    name: str
    fields: dict[str, object]
    times: int = 1

    @property
    def caution(self) -> str:
        return next(text for start, text in _CAUTIONS.items() if self.name.startswith(start))


def alternatives(config: Config) -> list[Alternative]:
    """What could be tried instead; not all of it goes with every method."""
    parallel, optimizer = config.parallel, config.optimizer
    fields: list[dict[str, object]] = []
    if optimizer.scope == "global":
        fields += [{"optimizer.scope": "local"}] if parallel.strategy == "ddp" else []
        fields += [{"optimizer.scope": "replica"}] if parallel.strategy == "hsdp" else []
        fields += [{"parallel.strategy": s} for s in ("ddp", "hsdp", "fsdp") if s != parallel.strategy]
    fields += [{"optimizer.ascent_fraction": 0.5}] if optimizer.ascent_fraction == 1 else []
    if optimizer.ascent_interval == 1:
        fields += [{"optimizer.ascent_interval": 5}]
        fields += [{"optimizer.name": "looksam"}] if optimizer.name not in (*PLAIN, "looksam") else []
    larger = [Alternative(f"data.batch_size x {times}", {}, times) for times in (4, 16, 64)]
    return [*(Alternative(f"{path} {value}", {path: value}) for own in fields for path, value in own.items()), *larger]


def cases(case: Case) -> Iterator[tuple[Alternative, Case]]:
    """The alternatives that this run can be made with."""
    for alternative in alternatives(case.config):
        try:
            config = _changed(case.config, alternative)
            same = (config.optimizer, config.parallel) == (case.config.optimizer, case.config.parallel)
            method = case.method if same else observe_run(config)
        except UserError:
            continue
        yield alternative, replace(case, config=config, method=method)


def _changed(config: Config, alternative: Alternative) -> Config:
    changed = copy.deepcopy(config)
    changed.data.batch_size *= alternative.times
    for path, value in alternative.fields.items():
        section, _, field = path.rpartition(".")
        setattr(getattr(changed, section), field, value)
        if path == "optimizer.name":
            changed.optimizer.args, changed.schedule.anneal_start_epoch = {}, None  # of another method
    if changed.parallel.strategy == "ddp":
        changed.parallel.reshard_after_forward = True
        changed.precision.gather_dtype = "fp32"
    return checked(changed)
