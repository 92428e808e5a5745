"""The names of tasks, and where their classes are; nothing is imported here."""

from __future__ import annotations

from lesam_dist.config.schema import Config
from lesam_dist.errors import UserError, unknown_name

BUILT_IN = {
    "classification": "lesam_dist.tasks.classification.task.Classification",
    "domains": "lesam_dist.tasks.domains.task.DomainGeneralisation",
    "long_tail": "lesam_dist.tasks.long_tail.task.LongTail",
}


def import_path(name: str) -> tuple[str, str]:
    """Module and class of a task: of a built-in name, or of ``package.module.Class`` or ``package.module:Class``.

    Raises:
        UserError: for a name that no task has.
    """
    path = BUILT_IN.get(name, name).replace(":", ".")
    module, _, class_name = path.rpartition(".")
    if not module:
        raise unknown_name("task", name, BUILT_IN)
    if not all(part.isidentifier() for part in path.split(".")):
        raise UserError(f"task is '{name}': give {', '.join(BUILT_IN)}, or package.module.Class of your own.")
    return module, class_name


def check_task(config: Config) -> None:
    """Refuse a name that no task has, and arguments that nothing takes."""
    import_path(config.task)
    if config.task in BUILT_IN and config.task_args:
        raise UserError(
            f"task_args is {config.task_args} but task is {config.task}, which takes none: they are for a task of your "
            "own. Leave them out."
        )
