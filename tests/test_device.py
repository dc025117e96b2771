"""The same lines on a device that is not the CPU, on a machine that has none.

Its tensors live and compute in the CPU's memory, but say that their device is "meta". An operation
that mixes them with tensors of the CPU fails, as it does on CUDA and MPS. A real device's kernels,
autocast and random numbers are beyond this test.
"""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import specialize as sp
from conftest import TOY
from eval import evaluate, load
from t5 import T5, Tokenizer, pad_sequences

class Elsewhere(torch.Tensor):
    """A tensor of the CPU, `here`, that says it is on another device."""

    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(),
            dtype=here.dtype, device="meta")

    def __init__(self, here):
        self.here = here

    def tolist(self):
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})

class Device(TorchDispatchMode):
    """Context manager: let tensors be created on the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})

def call(function, args, kwargs):
    """Call a function on the CPU; its result is on the requested device, or on its inputs'."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    elsewhere = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    name = function.__name__.split(".")[0]
    if elsewhere and name not in ("_to_copy", "copy_"):
        mixed = [x.shape for x in tensors if x.dim() and not isinstance(x, Elsewhere)]
        assert not mixed, f"{function} mixes devices: {mixed} on the CPU"
    if kwargs.get("device") is not None:
        elsewhere = torch.device(kwargs["device"]).type == "meta"
        kwargs = kwargs | {"device": "cpu"}
    result = function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if name.endswith("_"):  # in place
        return None if result is None else args[0]
    return tree_map(wrap, result) if elsewhere else result

def wrap(value):
    """Move a tensor to the device; leave other values alone."""
    return Elsewhere(value) if isinstance(value, torch.Tensor) else value

def unwrap(value):
    """Undo wrap."""
    return value.here if isinstance(value, Elsewhere) else value

@pytest.fixture
def students(monkeypatch):
    """The toy's student on the device and on the CPU."""
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda name: name != "meta" and enabled(name))
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # it allows no wrapped tensors
    there, here = (T5.from_pretrained(TOY / "tuned-1M", dropout_rate=0.0) for _ in range(2))
    for module in there.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(wrap(parameter.detach())))
    there.lm_head.weight = there.shared.weight
    with Device():
        yield {"meta": there, "cpu": here}

def test_mixing_devices_is_noticed(students):
    with pytest.raises(AssertionError, match="add.Tensor mixes devices"):
        torch.ones(3).to("meta") + torch.ones(3)

def test_generation_and_evaluation_run_on_another_device(students):
    there, here = students.values()
    tokenizer = Tokenizer(TOY / "tuned-1M")
    prompts = ["Q: Which words are first and last: saw porch bee hen A: Let's think step by step.",
               "Q: What? A:"]
    ids = pad_sequences([tokenizer.encode(prompt) for prompt in prompts])
    output = there.generate(ids.to("meta"), max_new_tokens=30)
    assert output.device.type == "meta"
    assert output.tolist() == here.generate(ids, max_new_tokens=30).tolist()
    options = dict(max_new_tokens=5, temperature=1.0, top_k=3, num_samples=2)
    output = there.generate(ids.to("meta"), **options)
    assert output.device.type == "meta"
    problems = load("gsm8k", "test", TOY)[:6]
    one, other = (evaluate(model, tokenizer, problems, batch_size=4, max_new_tokens=20)
                  for model in (there, here))
    assert one == other

@pytest.mark.parametrize("loss", ["kl", "nll"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_runs_on_another_device(students, loss, checkpointing):
    tokenizer, shots = Tokenizer(TOY / "tuned-1M"), load("gsm8k", "train", TOY)[:4]
    records = itertools.islice(sp.read_teacher(TOY / "teacher.jsonl.gz"), 60)
    examples, _ = sp.build_examples(records, tokenizer, ["in_context_cot"], loss)
    (micro_batch, *_), losses = sp.make_batches(examples, shots, tokenizer, (3,) * 4, 0, 0), {}
    for device, student in students.items():
        student.train().encoder.gradient_checkpointing = checkpointing
        student.decoder.gradient_checkpointing = checkpointing
        optimizer = sp.make_optimizer(student.parameters(), "adafactor", 0.01)  # no fused kernel
        for _ in range(2):
            batch = sp.collate(micro_batch, device)
            losses[device] = sp.batch_loss(student, batch, loss)
            losses[device].backward()
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            sp.check_finite(torch.stack([losses[device].detach()]), norm, [micro_batch], 1, None)
            sp.optimizer_step(optimizer)
            optimizer.zero_grad()
    assert losses["meta"].device.type == "meta"
    assert losses["meta"].item() == pytest.approx(losses["cpu"].item(), rel=1e-5)
