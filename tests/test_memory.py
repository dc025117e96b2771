"""data/memory.py: what training is said to take, against what it takes."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import torch

import specialize as sp
from conftest import ROOT
from data.memory import SHAPES, flan_config, training_bytes
from t5 import T5

MEASURE = """
import re, sys
import torch
import specialize as sp
from data.memory import fake_batch, training_bytes
from t5 import T5, T5Config

shape, batch, precision, checkpointing, optimizer = eval(sys.argv[1])
args = sp.parse_arguments(["--device", "cpu", "--precision", precision, "--optimizer", optimizer])
config, dtype = T5Config(**shape, feed_forward_proj="gated-gelu", tie_word_embeddings=False), sp.weights_dtype(args)
torch.set_num_threads(1)

def train(config, batch, steps):
    model = T5(config).to(dtype).train()
    model.encoder.gradient_checkpointing = model.decoder.gradient_checkpointing = checkpointing
    optimizer = sp.make_optimizer(model.parameters(), args.optimizer, 0.01)
    for step in range(steps):
        for _ in range(step + 1):
            loss(model, fake_batch(*batch)).backward()
        sp.optimizer_step(optimizer)
        optimizer.zero_grad()

def loss(model, batch):
    with sp.mixed_precision(args):
        return sp.batch_loss(model, batch)

_, *standing, (activations,) = training_bytes(config, [batch], loss, optimizer, dtype, checkpointing)
train(T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2), (2, 5, 5, batch[3]), 1)  # warm up
told = lambda name: int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = told("VmRSS")
train(config, batch, 2)
print(sum(standing) + activations, told("VmHWM") - before)
"""
WIDE = dict(d_model=256, d_kv=64, d_ff=512, num_layers=4, num_heads=4, vocab_size=8000), (4, 300, 100, 5)
LARGE_VOCABULARY = dict(d_model=128, d_kv=32, d_ff=1024, num_layers=6, num_heads=8, vocab_size=32128), (3, 150, 60, 0)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="measured where Linux tells it")
@pytest.mark.parametrize(
    "case",
    [(*WIDE, "fp32", False, "adamw"), (*LARGE_VOCABULARY, "bf16", False, "adamw"), (*LARGE_VOCABULARY, "fp32", True, "adafactor")],
    ids=["wide", "bf16", "gradient checkpointing and Adafactor"],
)
def test_the_estimate_is_within_15_percent_of_the_measured_peak_of_a_process(case):
    returning = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, repr(case)], cwd=ROOT, env=os.environ | returning, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    estimated, measured = map(int, done.stdout.split())
    assert estimated == pytest.approx(measured, rel=0.15)


def test_what_is_told_of_a_gpu_does_not_depend_on_this_cpu(monkeypatch):
    config, told = dataclasses.replace(flan_config("small"), num_layers=2, num_decoder_layers=2), []
    for has_bf16 in (False, True):
        monkeypatch.setattr("t5.computes_in_bf16", lambda: has_bf16)
        told.append(training_bytes(config, [(8, 600, 10, 0)], sp.batch_loss, "adafactor", torch.bfloat16, True, fused=True))
    assert told[0] == told[1]


def test_the_named_shapes_have_the_parameters_of_the_reference(transformers):
    for size in SHAPES:
        ours = dataclasses.replace(flan_config(size), tie_word_embeddings=True)
        with torch.device("meta"):
            count = sum(p.numel() for p in T5(ours).parameters())
            theirs = transformers.T5ForConditionalGeneration(
                transformers.T5Config(
                    vocab_size=32128, d_model=ours.d_model, d_kv=64, d_ff=ours.d_ff, num_layers=ours.num_layers,
                    num_heads=ours.num_heads, feed_forward_proj="gated-gelu", tie_word_embeddings=True,
                )
            )  # fmt: skip
        assert count == sum(p.numel() for p in theirs.parameters())


def told(*arguments):
    """The plan's parts in GB, for the format that takes the most."""
    text = sp.plan(sp.parse_arguments(["--plan", "--device", "cuda", "--formats", "in_context_answer_only", *arguments]))
    return text, {name: float(size.replace(",", "")) for name, size in re.findall(r"^  (\w+) +([\d,.]+) GB", text, re.M)}


def test_xl_trains_on_80_gb_by_this_arithmetic():
    text, parts = told("--size", "xl")
    assert parts["weights"] == parts["gradients"] == parts["optimizer"] / 2 == pytest.approx(2.85 * 4, abs=0.1)
    assert parts["together"] < 80 and "2,849,757,184 parameters" in text
    assert "250 steps of 30 micro-batches, 10 epochs of 25 steps" in text


def test_xxl_trains_on_80_gb_with_adafactor_bfloat16_weights_and_gradient_checkpointing_its_defaults():
    text, parts = told("--size", "xxl")
    assert "adafactor" in text and "bf16-weights, gradient checkpointing" in text
    assert parts["weights"] == parts["gradients"] == pytest.approx(22.3, abs=0.1) and parts["together"] < 80
    assert parts["optimizer"] < 0.1


def test_gradient_checkpointing_and_a_fused_attention_take_less():
    config = sp.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4, vocab_size=100)
    shapes = [(4, 200, 40, 5)]
    plain, kept, fused = (
        training_bytes(config, shapes, sp.batch_loss, **options)[4][0]
        for options in ({}, {"checkpointing": True}, {"fused": True})
    )
    assert kept < plain / 2 and fused < plain / 2


def test_the_plan_of_a_folder_and_a_teacher_counts_their_own_batches_without_weights(tmp_path, monkeypatch):
    from conftest import TOY

    for name in ("config.json", "spiece.model"):
        (tmp_path / name).write_bytes((TOY / "student" / name).read_bytes())
    line = '{"question": "Tom has 2 and 3.", "answer": "5", "solution": "2 + 3 = 5"}\n'
    (tmp_path / "teacher.jsonl").write_text(line * 10)
    arguments = ["--plan", "--model", str(tmp_path), "--teacher", str(tmp_path / "teacher.jsonl"), "--formats", "zero_shot_cot"]
    text = sp.plan(sp.parse_arguments([*arguments, "--epochs", "3", "--micro-batch", "4", "4", "4", "4"]))
    assert "10 of 10 solutions are right" in text and "9 steps of 1 micro-batches, 3 epochs of 3 steps" in text
    assert "zero_shot_cot: 4 rows of at most" in text
