"""What a run learns: its data, its network, the loss of a batch, and what evaluation reports."""
