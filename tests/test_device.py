"""A training step on a device that is not the CPU, on any machine: "meta" has shapes but no
values, and most operations that mix its tensors with the CPU's fail, as they do on CUDA and MPS."""

import itertools

import pytest
import torch

import specialize as sp
from conftest import TOY
from t5 import T5, Tokenizer

@pytest.mark.parametrize("loss, moved", [("kl", ["loss_mask", "teacher_probs"]),
                                         ("nll", ["loss_mask", "labels"])])
def test_a_training_step_runs_on_another_device_and_mixes_none(loss, moved):
    config = T5.from_pretrained(TOY / "tuned-1M").config
    with torch.device("meta"):
        model = T5(config).train()
    records = itertools.islice(sp.read_teacher(TOY / "teacher.jsonl.gz"), 20)
    examples, _ = sp.build_examples(records, Tokenizer(TOY / "tuned-1M"), ["zero_shot_cot"])
    here, there = sp.collate(examples, "cpu"), sp.collate(examples, "meta")
    sp.batch_loss(model, there, loss).backward()
    assert all(p.grad.is_meta for p in model.parameters())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters()).step()
    for name in moved:
        with pytest.raises(RuntimeError, match="expected device"):
            sp.batch_loss(model, there | {name: here[name]}, loss)
