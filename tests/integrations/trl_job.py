"""A fine-tuning by TRL, with `report_to="traceml"` and without: its losses must be the same."""

from __future__ import annotations

import json
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

TEXT = "the sky is blue and the grass is green"


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few words: no model hub is asked."""
    words = ["<pad>", "<eos>", "<unk>", *dict.fromkeys(TEXT.split())]
    base = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def train(report_to: str) -> list[dict[str, Any]]:
    """Train 20 steps; return the log."""
    torch.manual_seed(0)
    words = tokenizer()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(words), n_positions=32, n_embd=32, n_layer=2, n_head=2))
    arguments = SFTConfig(
        "out", report_to=report_to, run_name="tuned", max_steps=20, per_device_train_batch_size=8, use_cpu=True,
        logging_steps=5, save_strategy="no", disable_tqdm=True, bf16=False,
    )  # fmt: skip
    data = Dataset.from_dict({"text": [TEXT] * 160})
    trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=words)
    trainer.train()
    return [dict(line) for line in trainer.state.log_history]


def losses(history: list[dict[str, Any]]) -> list[float]:
    """Return what does not depend on the clock."""
    return [line["loss"] for line in history if "loss" in line]


if __name__ == "__main__":
    torch.set_num_threads(1)
    plain, traced = train("none"), train("traceml")
    print(json.dumps({"same": losses(plain) == losses(traced), "history": traced}), flush=True)
