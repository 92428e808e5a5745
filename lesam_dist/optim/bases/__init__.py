"""Base optimizers that torch does not have, for large batches: ordinary torch optimizers, alone or inside a method."""
