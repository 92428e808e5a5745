"""One HTML file about training runs, which opens without a network, on a phone and on paper.

    from lesam_dist.report import write_report

    write_report(["runs/sgd", "runs/lesam"], "report.html")

`reading` has what a run left behind, `grouping` which runs differ in the seed alone, `statistics` what the seeds show;
`summary`, `curves`, `dynamics`, `analyses`, `cost` and `setup` make the sections out of it. A section is text,
tables and charts (`blocks`); a chart is drawn twice, by matplotlib (`pictures`) and in the browser (`interactive`), and
`page` puts all into the template. The name is imported when it is used: a help needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lesam_dist.report.page import write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from lesam_dist.report import page

        return getattr(page, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
