"""LE-SAM in Hugging Face's Trainer (pip install lesam-dist transformers accelerate), on one process or several:

    python examples/huggingface_trainer.py
    torchrun --nproc-per-node 2 examples/huggingface_trainer.py

A small Llama from a random initialisation learns to go on with arithmetic progressions modulo a prime. With a
pretrained model and a data set of yours, what is about LE-SAM stays as it is.
"""

from __future__ import annotations

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from lesam_dist import LESAM, CosineBudget
from lesam_dist.transformers import SharpnessAwareTrainer

EPOCHS, LENGTH, PRIME, SEED = 6, 12, 11, 0


class Progressions(Dataset[dict[str, torch.Tensor]]):
    """start + i * stride modulo a prime, from any start by any stride."""

    def __init__(self, rows: int, seed: int) -> None:
        start, stride = torch.randint(PRIME, (2, rows, 1), generator=torch.Generator().manual_seed(seed))
        self.tokens = (start + stride * torch.arange(LENGTH)) % PRIME

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def main() -> None:
    set_seed(SEED)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=PRIME, max_position_embeddings=LENGTH, **small))
    arguments = TrainingArguments(
        "huggingface_trainer",
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=2,  # one perturbation, by the gradient of both micro-batches
        learning_rate=3e-3,  # AdamW's, as are weight_decay, the betas and the schedule
        weight_decay=0.01,
        max_grad_norm=1.0,  # of the update alone
        logging_strategy="epoch",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SharpnessAwareTrainer(
        model,
        arguments,
        train_dataset=Progressions(1024, SEED),
        eval_dataset=Progressions(256, SEED + 1),
        sharpness=(LESAM, {"sigma": 0.02, "rho_max": 0.1}),
        budget=lambda optimizer, steps: CosineBudget(optimizer, steps, anneal_steps=steps // 4),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    for log in trainer.state.log_history:
        if "rho" in log and trainer.is_world_process_zero():
            print(f"epoch {log['epoch']:.0f}  loss {log['loss']:.4f}  rho {log['rho']:.4f}  sigma {log['sigma']:.4f}")
    if trainer.is_world_process_zero():
        print(f"eval loss {before:.3f} before, {after:.3f} after")


if __name__ == "__main__":
    main()
