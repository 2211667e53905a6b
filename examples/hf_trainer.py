"""Hugging Face's Trainer, and every trainer made of it, such as TRL's: the factory that builds from the model."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import ds_mofa

if __name__ == "__main__":
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    ids = torch.arange(16) % 7
    trainer = Trainer(
        model=AutoModelForCausalLM.from_config(shape),
        args=TrainingArguments("out/hf_trainer", max_steps=20, logging_steps=5, save_strategy="no", report_to="none"),
        train_dataset=[{"input_ids": ids, "labels": ids}] * 64,
        optimizer_cls_and_kwargs=(ds_mofa.ForTrainer, {"lr": 2e-3, "rank": 8}),
    )
    print("loss", trainer.train().training_loss)
    trainer.save_model()
