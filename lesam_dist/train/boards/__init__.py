"""Where a run's scalars are shown beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow; one file for each."""
