"""What a run learns: its data, its network, the loss of a batch, and what evaluation reports.

`Task` is the contract; a class of your own becomes a run's with ``--task package.module.Class`` (docs/tasks.md).
"""

from lesam_dist.data.table import Table, TableLoader
from lesam_dist.tasks.task import At, Metric, Task

__all__ = ["At", "Metric", "Table", "TableLoader", "Task"]
