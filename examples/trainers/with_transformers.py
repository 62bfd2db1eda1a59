"""Hugging Face's Trainer on several workers: the optimizer goes into the Trainer, the hook around `train()`.

Needs `pip install 'torch-model-average[torch,trainers]'`. Run it from the repository:

    ma-launch --workers 2 -- examples/trainers/with_transformers.py

docs/trainers.md says how to start it with torchrun, so that each worker is a group of several processes.
"""

from __future__ import annotations

import tempfile

import torch
from torch.utils.data import Dataset, Subset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from ma_client import ClusterSpec, ModelAverageCustomGetter, ModelAverageOptimizer

ROUNDS, INTERVAL_STEPS, BATCH_SIZE = 8, 20, 32
TOKENS, WORDS = 12, 8


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """Random sentences; the label says whether word 1 occurs."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.words = torch.randint(1, TOKENS, (count, WORDS), generator=generator)
        self.labels = (self.words == 1).any(dim=1).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.words[index], "labels": self.labels[index]}


def network() -> BertForSequenceClassification:
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=TOKENS, max_position_embeddings=WORDS, **size))


def main() -> None:
    cluster = ClusterSpec.from_env()  # from the launcher's environment
    set_seed(cluster.task_index)
    sentences = Sentences(4000, seed=0)
    share = Subset(sentences, range(cluster.task_index, len(sentences), cluster.num_workers))  # this worker's share

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,  # one for each worker
            max_steps=ROUNDS * INTERVAL_STEPS,
            per_device_train_batch_size=BATCH_SIZE,
            lr_scheduler_type="cosine",
            logging_steps=INTERVAL_STEPS,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=cluster.task_index,
        )
        getter = ModelAverageCustomGetter(worker_device=args.device)
        model = getter(network())
        optimizer = ModelAverageOptimizer(
            torch.optim.AdamW(model.parameters(), lr=5e-3),
            num_worker=cluster.num_workers,
            is_chief=cluster.is_chief,
            ma_custom_getter=getter,
            interval_steps=INTERVAL_STEPS,
            process_group=torch.distributed.group.WORLD,  # None, unless the Trainer has several processes: one worker
        )
        # None: the Trainer creates the scheduler that its arguments name, for this optimizer.
        trainer = Trainer(model, args, train_dataset=share, optimizers=(optimizer, None))
        with optimizer.make_session_run_hook():  # the chief initializes the center; everyone starts from it
            trainer.train()
        if cluster.is_chief:
            trainer.save_model(folder)  # the center, which every worker now has
        unseen = Sentences(1000, seed=1)
        predicted = trainer.predict(unseen).predictions.argmax(axis=-1)
    if trainer.is_world_process_zero():
        print(f"rounds: {optimizer.global_step}")
        print(f"accuracy of the center: {(predicted == unseen.labels.numpy()).mean():.3f}")


if __name__ == "__main__":
    main()
