"""Which class the task of a config is: one of this package, or a user's own by its import path."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from lesam_dist.config.schema import Config
from lesam_dist.config.tasks import BUILT_IN, import_path
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.task import Task


def task_class(name: str) -> type[Task]:
    """The class of a task's name or import path.

    Raises:
        UserError: it cannot be imported, or is no task.
    """
    module, class_name = import_path(name)
    try:
        cls: Any = getattr(import_module(module), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"task '{name}' cannot be imported: {error}. Give package.module.Class of a class that Python finds "
            "(PYTHONPATH, or pip install -e)."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        raise UserError(f"task '{name}' is no task: derive it from lesam_dist.tasks.Task.")
    if missing := sorted(cls.__abstractmethods__):
        raise UserError(f"task '{name}' has no {', no '.join(missing)}: write what lesam_dist.tasks.Task lists.")
    return cls


def build_task(config: Config, world: Distributed) -> Task:
    """The task of a run, with the config's ``task_args``; nothing has been read yet.

    Raises:
        UserError: as `task_class`; it does not take these arguments, or refuses the config.
    """
    cls = task_class(config.task)
    signature = inspect.signature(cls)
    try:
        signature.bind(config, world, **config.task_args)
    except TypeError as error:
        own = [name for name, one in signature.parameters.items() if one.kind == one.KEYWORD_ONLY]
        raise UserError(
            f"task_args is {config.task_args}, but the task {cls.__name__} takes {', '.join(own) or 'none'}: {error}. "
            "Its arguments are the keywords of its __init__ behind a *."
        ) from error
    task = cls(config, world, **config.task_args)
    task.check()
    return task


def is_built_in(task: Task) -> bool:
    """Whether it is one of this package, whose losses are known to be right."""
    return type(task).__module__ in {import_path(name)[0] for name in BUILT_IN}
