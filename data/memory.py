"""How much memory training takes, without taking it.

One training step runs on fake tensors, which have a shape, a dtype and no memory, and every operation's results are
counted while they are alive. So the figure follows the model's own code, whatever that keeps for the backward pass. It
knows nothing of what an allocator wastes between tensors.
"""

import os
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.optimizers import optimizer_bytes
from t5 import T5, T5Config

# The shapes of FlanT5, as in their config.json: (layers of each stack, d_model, d_ff, heads).
SHAPES = {
    "small": (8, 512, 1024, 6),
    "base": (12, 768, 2048, 12),
    "large": (24, 1024, 2816, 16),
    "xl": (24, 2048, 5120, 32),
    "xxl": (24, 4096, 10240, 64),
}


def flan_config(size):
    """The configuration of a FlanT5 by its size."""
    layers, d_model, d_ff, heads = SHAPES[size]
    return T5Config(
        d_model=d_model, d_ff=d_ff, num_layers=layers, num_heads=heads, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )  # fmt: skip


class LiveBytes(TorchDispatchMode):
    """Within it: now, the bytes of all tensors made in it that are still alive, and peak, the most there were."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return result

    def freed(self, address, size):
        """What is called when a tensor's memory is given back."""
        self.known.remove(address)
        self.now -= size


def training_bytes(config, shapes, loss, optimizer="adamw", dtype=torch.float32, checkpointing=False, fused=False):
    """The bytes that training takes: (parameters, weights, gradients, optimizer, [activations of each shape]).

    config: the model's. shapes: [(B, S, T, k)] of micro-batches, k entries of a teacher row or 0 for likelihood.
    loss: a function of model and batch. dtype: of weights and gradients; the optimizer's state is fp32. fused: attention
    runs in a kernel that keeps no (B, H, n, m) probabilities, as on CUDA. Activations are all that is alive at the peak
    of forward and backward pass beside weights and gradients.
    """
    before = torch.get_default_dtype()
    with FakeTensorMode(), LiveBytes() as live:
        try:
            torch.set_default_dtype(dtype)
            model = T5(config).train()
        finally:
            torch.set_default_dtype(before)
        model.encoder.gradient_checkpointing = model.decoder.gradient_checkpointing = checkpointing
        parameters = list(model.parameters())
        if fused:
            model.embed = lambda ids: model.shared(ids)  # in the weights' dtype, whatever this CPU has instructions for
            # On the CPU torch takes such a kernel only where there is neither dropout nor a gradient of the bias.
            for stack in (model.encoder, model.decoder):
                stack.relative_bias.weight.requires_grad_(False)
                for block in stack.blocks:
                    block.self_attention.eval()
                    if stack.is_decoder:
                        block.cross_attention.eval()
        activations = []
        for p in parameters:
            p.grad = torch.empty_like(p)  # of the micro-batches before
        standing = live.now
        for B, S, T, k in shapes:
            live.peak = live.now
            loss(model, fake_batch(B, S, T, k)).backward()
            # where attention is fused, the biases' gradients are added up beside what is counted: two and their sum
            activations.append(live.peak - standing + 3 * fused * B * config.num_heads * S**2 * dtype.itemsize)
    count = sum(p.numel() for p in parameters)
    weights = count * dtype.itemsize
    return count, weights, weights, optimizer_bytes(parameters, optimizer), activations


def fake_batch(B, S, T, k):
    """A micro-batch of that shape, as collate() makes them."""
    labels = torch.ones(B, T, dtype=torch.long)
    batch = {"input_ids": torch.ones(B, S, dtype=torch.long), "labels": labels, "decoder_input_ids": labels.clone()}
    batch["mask"] = labels != 0
    if k:
        batch |= {"ids": torch.ones(B, T, k, dtype=torch.long), "probs": torch.ones(B, T, k)}
    return batch


def device_bytes(device):
    """The memory of a device: its own, or the machine's for the CPU. 0 where there is no such device."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    if device == "mps":
        return torch.mps.recommended_max_memory() if torch.backends.mps.is_available() else 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def training_memory(config, shapes, loss, args, dtype):
    """The table of training_bytes as text. shapes: {format: (B, S, T, k)}; args: the main command's."""
    count, *standing, activations = training_bytes(
        config, shapes.values(), loss, args.optimizer, dtype, args.gradient_checkpointing, args.device == "cuda"
    )
    gigabytes = "{:10,.3f} GB".format if sum(standing) < 1e9 else "{:10,.1f} GB".format
    lines = [f"{args.model}: {count:,} parameters"]
    parts = zip(("weights", "gradients", "optimizer"), standing, (dtype, dtype, args.optimizer))
    lines += [f"  {name:12}{gigabytes(size / 1e9)}  {what}".replace("torch.", "") for name, size, what in parts]
    kept = "gradient checkpointing" if args.gradient_checkpointing else "no gradient checkpointing"
    lines.append(f"  {'activations':12}{gigabytes(max(activations) / 1e9)}  {args.precision}, {kept}")
    for (name, (B, S, T, _)), size in zip(shapes.items(), activations):
        lines.append(f"    {gigabytes(size / 1e9)} {name}: {B} rows of at most {S:,} + {T:,} tokens")
    there = device_bytes(args.device)
    has = f"{args.device} has {there / 1e9:,.1f} GB" if there else f"there is no {args.device} here"
    lines.append(f"  {'together':12}{gigabytes((sum(standing) + max(activations)) / 1e9)}  {has}")
    lines.append(f"A checkpoint takes{gigabytes((standing[0] + standing[2]) / 1e9)} on the disk, and three can stand there.")
    return "\n".join(lines)
