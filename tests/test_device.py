"""The same lines on a device that is not the CPU, without one: tensors that lie in the CPU's memory and compute there,
but say that their device is "meta". An operation that mixes them with tensors of the CPU is an error, as it is on CUDA
and MPS. (Kernels, autocast and random numbers of a real device are beyond this.)"""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import specialize as sp
from conftest import TOY
from data.calculator import calculator
from data.records import read_teacher
from data.rows import make_rows
from eval import evaluate, load
from t5 import T5, Tokenizer, pad


class Elsewhere(torch.Tensor):
    """A tensor of the CPU, `here`, that says it is on another device."""

    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device="meta"
        )

    def __init__(self, here):
        self.here = here

    def tolist(self):
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


class Device(TorchDispatchMode):
    """Within it tensors can be made on the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


def computed(function, args, kwargs):
    """Call function on the CPU's memory; what it makes is on the device that was asked for, or that its input is on."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    elsewhere = any(isinstance(t, Elsewhere) for t in tensors)
    name = function.__name__.split(".")[0]
    if elsewhere and name not in ("_to_copy", "copy_"):
        mixed = [tuple(t.shape) for t in tensors if t.dim() and not isinstance(t, Elsewhere)]
        assert not mixed, f"{function} mixes devices: {mixed} on the CPU"
    if kwargs.get("device") is not None:
        elsewhere = torch.device(kwargs["device"]).type == "meta"
        kwargs = kwargs | {"device": "cpu"}
    result = function(*tree_map(here, args), **tree_map(here, kwargs))
    if name.endswith("_"):  # in place
        return None if result is None else args[0]
    return tree_map(lambda t: Elsewhere(t) if isinstance(t, torch.Tensor) else t, result) if elsewhere else result


def here(value):
    """Of a tensor elsewhere its memory here."""
    return value.here if isinstance(value, Elsewhere) else value


@pytest.fixture
def there(monkeypatch):
    """A device, the toy's student on it, and the same student on the CPU."""
    autocast = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device != "meta" and autocast(device))
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # in which tensors of a class of one's own cannot be made
    student, same = (T5.from_pretrained(TOY / "student", dropout_rate=0.0) for _ in range(2))
    for module in student.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(Elsewhere(parameter.detach())))
    student.lm_head.weight = student.shared.weight
    with Device():
        yield student, same, Tokenizer(TOY / "student")


def test_mixing_devices_is_noticed(there):
    with pytest.raises(AssertionError, match="add.Tensor mixes devices"):
        torch.ones(3).to("meta") + torch.ones(3)


def test_generation_and_evaluation_run_on_another_device(there):
    student, same, tokenizer = there
    prompts = ["Q: Which words are first and last: saw porch bee hen A: Let's think step by step.", "Q: What? A:"]
    ids = pad([tokenizer.encode(prompt) for prompt in prompts])
    found = student.generate(ids.to("meta"), max_new_tokens=30)
    assert found.device.type == "meta" and found.tolist() == same.generate(ids, max_new_tokens=30).tolist()
    options = dict(max_new_tokens=5, temperature=1.0, top_k=3, num_samples=2, logits_processor=calculator(tokenizer))
    assert student.generate(ids.to("meta"), **options).device.type == "meta"
    problems = load("gsm8k", "test", TOY)[:6]
    there, here = (evaluate(model, tokenizer, problems, batch_size=4, max_new_tokens=20) for model in (student, same))
    assert there == here


@pytest.mark.parametrize("loss", ["kl", "nll"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_runs_on_another_device(there, loss, checkpointing):
    *students, tokenizer = there
    rows, _ = make_rows(itertools.islice(read_teacher(TOY / "teacher.jsonl.gz"), 60), tokenizer, ["in_context_cot"], loss)
    examples, losses = [(row, load("gsm8k", "train", TOY)[:4]) for row in rows[:3]], []
    for student, device in zip(students, ("meta", "cpu")):
        student.train().encoder.gradient_checkpointing = student.decoder.gradient_checkpointing = checkpointing
        optimizer = torch.optim.Adafactor(student.parameters())  # AdamW's fused kernel is the real devices'
        for _ in range(2):
            value = sp.batch_loss(student, sp.collate(examples, tokenizer.encode, device))
            value.backward()
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            sp.check_finite(torch.stack([value.detach()]), norm, [examples], 1, None)
            sp.optimizer_step(optimizer)
            optimizer.zero_grad()
        losses.append(value)
    assert losses[0].device.type == "meta" and losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
