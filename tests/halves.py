"""A method that the project does not have, as a user writes one: nothing else knows of it."""

from typing import Any, ClassVar

from lesam_dist.optim import SAM
from lesam_dist.optim.engine.arguments import NonNegative, Positive
from lesam_dist.optim.engine.reference import Radius
from lesam_dist.optim.engine.vectors import Vector


class Halved(SAM, name="halved", along="g and a part of the last one", keeps="the last g"):
    memory_names: ClassVar = ("last_grad",)

    def __init__(self, params: Any, base: Any, *, rho: NonNegative = 0.1, part: Positive = 0.5, **kwargs: Any) -> None:
        super().__init__(params, base, rho=rho, part=part, **kwargs)

    def radius(self, group: dict[str, Any]) -> Radius:
        return Radius.fixed(group["rho"] * group["part"])

    def climb(self, g: Vector) -> Vector:
        return g + self.per_group("part") * self.kept("last_grad")

    def remember_first(self, g: Vector) -> None:
        self.keep("last_grad", g)
