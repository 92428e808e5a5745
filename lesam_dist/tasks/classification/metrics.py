"""What the evaluation of a classifier reports, from sums that add up over batches and processes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lesam_dist.tasks.classification.calibration import calibration_of, calibration_sums

_TOP = 5
_SHARES = ("acc1", "acc5", "robust_acc1")  # counts of the samples


class ClassifierMetrics:
    """Top-1 and top-5 accuracy, cross entropy and calibration, of a model that gives logits."""

    def measure(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor | float]:
        """The sums over a batch.

        Args:
            model: in eval mode.
            batch: images (B, C, H, W) and labels (B,) int64.
        """
        images, labels = batch
        return self.of_logits(model(images), labels)

    def of_logits(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor | float]:
        """The same, of (B, K) logits."""
        loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        sums: dict[str, Tensor | float] = {"acc1": (logits.argmax(dim=1) == labels).sum()}
        if logits.shape[1] > _TOP:
            sums["acc5"] = (logits.topk(_TOP, dim=1).indices == labels[:, None]).any(dim=1).sum()
        return sums | {"loss": loss, "bins": calibration_sums(logits, labels), "samples": len(labels)}

    def report(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """``acc1`` and, for more than 5 classes, ``acc5``, and ``robust_acc1`` where it was counted, in per cent;
        ``loss`` per sample (which is the negative log-likelihood), and ``ece``, the expected calibration error from 0
        to 1 (`lesam_dist.tasks.classification`)."""
        samples = float(sums["samples"])
        result = {name: 100 * float(sums[name]) / samples for name in _SHARES if name in sums}
        return result | {"loss": float(sums["loss"]) / samples, "ece": calibration_of(sums["bins"]).ece}
