"""What a config must not say of domains."""

from __future__ import annotations

from lesam_dist.config.changes import changes
from lesam_dist.config.schema import Config
from lesam_dist.errors import UserError

BUILTIN = "digit_domains"
"""The built-in data set that has domains."""
BUILTIN_DOMAINS = ("mnist", "print", "scans")
"""Their names: they may not be on disk yet."""
WHERE_FROM = (
    "PACS and VLCS are written so by DomainBed (python -m domainbed.scripts.download --data_dir DIR, then DIR/PACS or "
    "DIR/VLCS); docs/domains.md says more."
)


def check_domains(config: Config) -> None:
    """Refuse what the run would not look at, or cannot do.

    Raises:
        UserError: for the first such value, with the remedy.
    """
    if config.task != "domains":
        _refuse_elsewhere(config)
        return
    domains, data = config.domains, config.data
    if not domains.source:
        raise UserError("domains.source is empty: name a domain to train on, e.g. --domains.source '[photo]'.")
    if not 0 <= domains.holdout < 1:
        raise UserError(f"domains.holdout is {domains.holdout}: it must be in [0, 1).")
    if data.builtin not in (None, BUILTIN):
        raise UserError(
            f"data.builtin is {data.builtin} but task is domains: that data set has none. Choose {BUILTIN}, or null "
            "with a data.root that holds DOMAIN/CLASS/IMAGE."
        )
    if data.batch_size % len(domains.source):
        raise UserError(
            f"data.batch_size is {data.batch_size} and domains.source names {len(domains.source)} domains, but a batch "
            "has as many images of each: choose a multiple."
        )
    if data.label_noise.kind is not None:
        raise UserError(
            f"data.label_noise.kind is {data.label_noise.kind} but task is domains, which leaves labels as they "
            "are: leave it null."
        )
    for name, value in (("repeats", 1), ("order", "random")):
        if getattr(data, name) != value:
            raise UserError(
                f"data.{name} is {getattr(data, name)} but task is domains, which has an order of its own: leave it at "
                f"{value}."
            )


def _refuse_elsewhere(config: Config) -> None:
    for name, value, _ in changes(config.domains):
        raise UserError(f"domains.{name} is {value} but task is {config.task}: choose --task domains, or leave it out.")
    if config.data.builtin == BUILTIN:
        raise UserError(f"data.builtin is {BUILTIN} but task is {config.task}: choose --task domains.")
