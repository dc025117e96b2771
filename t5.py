"""T5 by hand: the model, generation, Hugging Face files and the tokenizer.

It covers T5 1.0 (Raffel et al., 2020, arXiv 1910.10683), T5 1.1 (Shazeer, 2020, arXiv 2002.05202)
and FlanT5 (Chung et al., 2022, arXiv 2210.11416). The tests compare it with `transformers`. A first
reader can stop at "files and downloads". Linear and Dropout are PyTorch's, only faster on a CPU.

Shapes: B batch, S source length, T target length, n queries, m keys, D d_model, H heads, K d_kv,
L decoder layers, V vocabulary.

    python t5.py google/flan-t5-small "Translate to German: The house is wonderful."
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

# Idle OpenMP threads should sleep: spinning slows a busy machine. Torch reads this when imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

PAD, EOS, UNK = 0, 1, 2  # the same ids in every T5; the decoder starts from PAD

class UserError(Exception):
    """An error that the user can fix: bad input or a failed download. The message says how."""

# --- configuration ---

ACTIVATIONS = {"relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_new": nn.GELU("tanh")}

@dataclass
class T5Config:
    """The shape of a model, in the names of config.json. The defaults are t5-small's.
    T5 1.0 ties the output head to the embedding, whose standard deviation is 1, and so scales the
    decoder's output by d_model**-0.5 before it. T5 1.1 and FlanT5 do neither."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int = None  # default: num_layers
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"  # or "gated-gelu"
    dense_act_fn: str = None  # default: the activation that feed_forward_proj names
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = None  # default: tie_word_embeddings

    def __post_init__(self):
        defaults = {"num_decoder_layers": self.num_layers,
                    "dense_act_fn": self.feed_forward_proj.replace("gated-gelu", "gelu_new"),
                    "scale_decoder_outputs": self.tie_word_embeddings}
        for name, kind in T5Config.__annotations__.items():
            value = defaults.get(name) if getattr(self, name) is None else getattr(self, name)
            if type(value) not in (kind, int) or kind != str and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value!r}")
            setattr(self, name, value)

# --- blocks ---

class FeedForward(nn.Module):
    """relu(x W_i) W_o in T5 1.0, and (gelu(x W_0) * (x W_1)) W_o in T5 1.1 and FlanT5."""

    def __init__(self, config):
        super().__init__()
        self.gated = config.feed_forward_proj == "gated-gelu"
        self.act = ACTIVATIONS[config.dense_act_fn]
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            self.add_module(name, Linear(config.d_model, config.d_ff))
        self.wo = Linear(config.d_ff, config.d_model)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x):
        x = self.act(self.wi_0(x)) * self.wi_1(x) if self.gated else self.act(self.wi(x))
        return self.wo(self.dropout(x))

class Attention(nn.Module):
    """Multi-head attention; its projections have no bias vectors. The logits are not divided by
    sqrt(d_kv), unlike in the standard Transformer; init_weights makes up for that."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        inner = config.num_heads * config.d_kv
        self.q, self.k, self.v = (Linear(config.d_model, inner) for _ in range(3))
        self.o = Linear(inner, config.d_model)
        self.dropout = Dropout(config.dropout_rate)

    def split_heads(self, x):
        """(B, n, H*K) -> (B, H, n, K)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def project_kv(self, x):
        """Project (B, m, D) to keys and values, each (B, H, m, K)."""
        return self.split_heads(self.k(x)), self.split_heads(self.v(x))

    def forward(self, x, bias, memory_kv=None, kv_cache=None):
        """Attend from x (B, n, D) to itself, or to the encoder's output; return (B, n, D).
        bias: (B or 1, H or 1, n or 1, m), added to the attention logits.
        memory_kv: in cross-attention, project_kv() of the encoder's output.
        kv_cache: in decoding (n is 1), the keys and values so far (2, B, H, T, K), and x's index t.
        """
        q = self.split_heads(self.q(x))
        k, v = self.project_kv(x) if memory_kv is None else memory_kv
        if kv_cache is not None:
            stored, t = kv_cache
            stored[:, :, :, t] = torch.stack([k[:, :, 0], v[:, :, 0]])  # (2, B, H, K)
            k, v = stored[:, :, :, : t + 1]
        if self.training and x.is_cpu:  # faster there than PyTorch's function
            weights = (q @ k.transpose(-1, -2)).add_(bias).softmax(-1)  # (B, H, n, m)
            x = self.dropout(weights) @ v
        else:
            p = self.dropout.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p, scale=1.0)
        return self.o(x.transpose(1, 2).flatten(2))  # (B, H, n, K) -> (B, n, D)

class Block(nn.Module):
    """Self-attention, cross-attention (decoder only), feed-forward: x + dropout(f(norm(x))).
    T5's layer norm is x / rms(x) * weight, without a mean and without a bias."""

    def __init__(self, config, is_decoder):
        super().__init__()
        width, epsilon = config.d_model, config.layer_norm_epsilon
        self.self_norm, self.self_attention = nn.RMSNorm(width, epsilon), Attention(config)
        if is_decoder:
            self.cross_norm, self.cross_attention = nn.RMSNorm(width, epsilon), Attention(config)
        self.ff_norm, self.ff = nn.RMSNorm(width, epsilon), FeedForward(config)
        self.is_decoder = is_decoder
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x, bias, memory=None, memory_bias=None, memory_kv=None, kv_cache=None):
        """(B, n, D) -> (B, n, D). In the decoder, pass memory_bias (B, 1, 1, S) and either memory,
        the encoder's output (B, S, D), or memory_kv, its precomputed keys and values."""
        x = x + self.dropout(self.self_attention(self.self_norm(x), bias, kv_cache=kv_cache))
        if self.is_decoder:
            if memory_kv is None:
                memory_kv = self.cross_attention.project_kv(memory)
            x = x + self.dropout(self.cross_attention(self.cross_norm(x), memory_bias, memory_kv))
        return x + self.dropout(self.ff(self.ff_norm(x)))

class Stack(nn.Module):
    """The encoder or the decoder: blocks that share one relative-position bias, and a last norm."""

    def __init__(self, config, is_decoder):
        super().__init__()
        self.is_decoder = is_decoder
        self.max_distance = config.relative_attention_max_distance
        self.relative_bias = embedding(config.relative_attention_num_buckets, config.num_heads)
        layers = config.num_decoder_layers if is_decoder else config.num_layers
        self.blocks = nn.ModuleList(Block(config, is_decoder) for _ in range(layers))
        self.final_norm = nn.RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = Dropout(config.dropout_rate)
        self.gradient_checkpointing = False

    def position_bias(self, query_position, key_position):
        """Return the bias (1, H, n, m) for positions (n,) and (m,): one learned scalar per head and
        bucket of distances. The decoder has 16 buckets for the distances 0 to 15 and 16 for ranges
        of growing width: 16 to 18, .., from 113 on. The encoder has 16 buckets to either side."""
        distance = key_position[None, :] - query_position[:, None]  # (n, m)
        buckets = self.relative_bias.num_embeddings // (1 if self.is_decoder else 2)
        first = 0 if self.is_decoder else (distance > 0).long() * buckets  # on the key's side
        distance = distance.abs()  # a decoder's mask hides the positions ahead
        exact = buckets // 2
        ratio = distance.clamp(min=1) / exact  # no log of 0
        growth = ratio.log() / math.log(self.max_distance / exact)  # 0 to 1 in the ranges
        far = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
        bucket = first + torch.where(distance < exact, distance, far)
        return self.relative_bias(bucket).permute(2, 0, 1).unsqueeze(0)

    def forward(self, x, mask, memory=None, memory_bias=None):
        """(B, n, D) -> (B, n, D). mask: (B or 1, 1, n or 1, n), True where attention may look."""
        position = torch.arange(x.shape[1], device=x.device)
        bias = make_attention_bias(mask, self.position_bias(position, position))
        x = self.dropout(x)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, bias, memory, memory_bias, use_reentrant=False)
            else:
                x = block(x, bias, memory, memory_bias)
        return self.dropout(self.final_norm(x))

def make_attention_bias(mask, bias):
    """Merge a boolean mask and a position bias into one bias, in the dtype attention will use.
    Masked positions get -3e4, which fp16 can hold: with -inf, a row of padding would become NaN."""
    return bias.to(attention_dtype(bias)).masked_fill(~mask, -3e4)

def attention_dtype(weight):
    """Return the dtype of keys and values: autocast's, or that of the weights."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype

def embedding(rows, width):
    """Return an nn.Embedding without values; they come from init_weights or from a file."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)

# --- the model ---

class T5(nn.Module):
    """The encoder-decoder with its embedding and its output head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.shared = embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, is_decoder=False)
        self.decoder = Stack(config, is_decoder=True)
        self.lm_head = Linear(config.d_model, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.shared.weight
        if not self.shared.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draw T5's random weights: embeddings with standard deviation 1, matrices fan_in**-0.5.
        W_q gets a further d_kv**-0.5, which replaces the usual scaling of the attention logits. An
        untied head is treated like any other matrix, so the first loss is near log V + 1/2."""
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                fan_in = self.config.d_model if "relative_bias" in name else weight.shape[1]
                scale = self.config.d_kv if ".q." in name else 1
                weight.normal_(std=(fan_in * scale) ** -0.5)
        self.shared.weight.normal_(std=1.0)

    def encode(self, input_ids, attention_mask):
        """Encode (B, S) ids; return (B, S, D) and the bias (B, 1, 1, S) of attention to it."""
        mask = attention_mask.bool()[:, None, None, :]
        memory = self.encoder(self.shared(input_ids), mask)
        return memory, make_attention_bias(mask, memory.new_zeros(1))  # no position bias here

    def logits(self, x):
        """Map the decoder's output (..., D) to logits (..., V)."""
        scaled = self.config.scale_decoder_outputs
        return self.lm_head(x * self.config.d_model**-0.5 if scaled else x)

    def forward(self, input_ids, attention_mask, decoder_input_ids):
        """(B, S), (B, S), (B, T) -> logits (B, T, V); those at t predict the token after t."""
        memory, memory_bias = self.encode(input_ids, attention_mask)
        T = decoder_input_ids.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=memory.device).tril()[None, None]
        x = self.decoder(self.shared(decoder_input_ids), causal, memory, memory_bias)
        return self.logits(x)

    # --- generation ---

    def generate(self, input_ids, attention_mask=None, max_new_tokens=256, temperature=0.0, top_k=0,
                 num_samples=1, generator=None, logits_processor=None):
        """Decode greedily (temperature 0) or sample, one token at a time, without dropout.

        input_ids, attention_mask: (B, S); by default everything but padding is visible.
        top_k: sample from the k most probable tokens only (0: from all), with generator, a
        torch.Generator on the model's device.
        logits_processor: a function (ids so far (B, t), logits (B, V)) -> logits (B, V), called
        with the unfinished rows in any order.
        Return (B * num_samples, <= max_new_tokens) ids without the start token, padded with 0 after
        </s>; samples of the same prompt are adjacent."""
        attention_mask = input_ids != PAD if attention_mask is None else attention_mask
        B = len(input_ids) * num_samples
        output = input_ids.new_full((B, max_new_tokens), PAD)
        rows = torch.arange(B, device=output.device)  # the output row of each batch element
        token = output.new_full((B,), PAD)
        # Inference mode is faster than no_grad, but autograd refuses what is created in it.
        with torch.inference_mode(), contextlib.ExitStack() as stack:
            stack.callback(self.train, self.training)  # restores the mode, also after an error
            self.eval()
            # Encode the source once: its keys and values for every decoder block.
            memory_kv, memory_bias = self.encode_source(input_ids, attention_mask)
            if num_samples > 1:
                memory_kv = memory_kv.repeat_interleave(num_samples, dim=2)  # (L, 2, B, H, S, K)
                memory_bias = memory_bias.repeat_interleave(num_samples, dim=0)  # (B, 1, 1, S)
            L, _, _, H, _, K = memory_kv.shape
            kv_cache = memory_kv.new_empty(L, 2, B, H, max_new_tokens, K)
            # The bias depends only on the distance between query and key, so the row of the last
            # position, cut from the left, serves every step.
            position = torch.arange(max_new_tokens, device=memory_kv.device)
            bias = self.decoder.position_bias(position[-1:], position).to(memory_kv.dtype)
            for t in range(max_new_tokens):
                x = self.shared(token[:, None])  # (B, 1, D)
                step_bias = bias[..., max_new_tokens - 1 - t :]  # (1, H, 1, t + 1)
                for block, source, past in zip(self.decoder.blocks, memory_kv, kv_cache):
                    x = block(x, step_bias, memory_bias=memory_bias, memory_kv=source,
                              kv_cache=(past, t))
                logits = self.logits(self.decoder.final_norm(x))[:, 0]  # (B, V)
                if logits_processor is not None:
                    logits = logits_processor(output[rows, :t], logits)
                token = sample_token(logits, temperature, top_k, generator)
                output[rows, t] = token
                finished = token == EOS
                if finished.all():
                    output = output[:, : t + 1]
                    break
                if finished.any():
                    rows, token, memory_bias, memory_kv, kv_cache = drop_finished(
                        finished, rows, token, memory_bias, memory_kv, kv_cache)
        return output

    def encode_source(self, input_ids, attention_mask):
        """Return the keys and values of a source for all decoder blocks (L, 2, B, H, S, K) and the
        bias (B, 1, 1, S). The encoder reads the rows in chunks, so that its attention bias
        (rows, H, S, S) stays small; a CPU is also faster with 2,048 tokens, which fit its cache."""
        B, S = input_ids.shape
        blocks = self.decoder.blocks
        mask = attention_mask.bool()[:, None, None, :]
        bias = make_attention_bias(mask, self.shared.weight.new_zeros(1))
        shape = len(blocks), 2, B, self.config.num_heads, S, self.config.d_kv
        memory_kv = torch.empty(shape, dtype=bias.dtype, device=bias.device)
        size = self.chunk_rows(S)
        for start in range(0, B, size):
            chunk = slice(start, start + size)
            memory, _ = self.encode(input_ids[chunk], attention_mask[chunk])
            for block, kv in zip(blocks, memory_kv):
                kv[0, chunk], kv[1, chunk] = block.cross_attention.project_kv(memory)
        return memory_kv, bias

    def chunk_rows(self, S):
        """Return the number of rows of length S that the encoder reads at a time in generate()."""
        return max(1, (2048 if self.shared.weight.is_cpu else 8192) // S)

    def generation_rows(self, S, T, free):
        """Return how many rows of S source and T output tokens generate() can take in `free` bytes.
        Two moments need most: in the encoder the attention bias and the activations of one chunk,
        beside the source's keys and values of all rows; in the last step all keys and values, and
        two copies of the logits."""
        c, weight, chunk = self.config, self.shared.weight, self.chunk_rows(S)
        own, size = weight.itemsize, attention_dtype(weight).itemsize
        if size != own:  # autocast keeps copies of the weights
            free -= size * sum(parameter.numel() for parameter in self.parameters())
        kv = 2 * c.num_decoder_layers * c.num_heads * c.d_kv * size  # of one token
        activations = 5 * c.d_model + max(3 * c.d_ff, 4 * c.num_heads * c.d_kv)  # of one token
        position_bias = c.num_heads * S * S * own
        bias = chunk * c.num_heads * S * S * size
        encoder = max(
            position_bias + 5 * 8 * S * S,  # and the buckets, in int64
            position_bias + bias + (bias // chunk if size != own else 0),
            bias * (1 if weight.is_cpu else 2) + chunk * S * activations * size)  # GPUs may pad it
        return int(min((free - encoder) / (kv * S),
                       free / (kv * (S + T) + 2 * c.vocab_size * size)))

    def hf_tensors(self, of=lambda parameter: parameter.data):
        """Return {name in Hugging Face files: tensor}; pass of=lambda p: p.grad for gradients."""
        return {hf_name(name): of(parameter) for name, parameter in self.named_parameters()}

    @classmethod
    def from_pretrained(cls, name_or_dir, device="cpu", dtype=torch.float32, dropout_rate=None):
        """Load a folder in Hugging Face format, or a name on the hub, in eval mode.
        dropout_rate replaces config.json's, also in what is saved. On the CPU, safetensors that
        need no conversion are memory-mapped: do not change the file. Raises UserError naming it."""
        config, stored = read_config(name_or_dir), read_weights(name_or_dir)
        config.dropout_rate = config.dropout_rate if dropout_rate is None else dropout_rate
        if config.tie_word_embeddings and "shared.weight" in stored:
            stored.setdefault("lm_head.weight", stored["shared.weight"])
        with names_file(name_or_dir, "a T5 whose weights fit config.json"):
            if config.num_layers + config.num_decoder_layers > len(stored):  # before it is built
                raise ValueError(f"{config.num_layers} layers, but only {len(stored)} tensors")
            with torch.device("meta"):  # no memory and no time for random weights
                model = cls(config)
            ours = {hf_name(name): name for name in model.state_dict()}
            state = {ours.get(name, name): tensor for name, tensor in stored.items()
                     if "EncDecAttention.relative_attention_bias" not in name}  # no T5 uses it
            model.load_state_dict(state, assign=True)
        # transformers 4 and 5 read tie_word_embeddings differently, so let the weights decide.
        config.tie_word_embeddings = torch.equal(model.lm_head.weight, model.shared.weight)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.shared.weight
        return model.to(device, dtype).eval()

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, each atomically; `transformers` loads them.
        For transformers 4, tie_word_embeddings means that the decoder's output is scaled, too. This
        is what is written here, and a head that is not scaled is stored even if it is tied."""
        folder, tensors, scaled = Path(folder), self.hf_tensors(), self.config.scale_decoder_outputs
        folder.mkdir(parents=True, exist_ok=True)
        if not scaled:
            tensors["lm_head.weight"] = self.lm_head.weight.data
        config = asdict(self.config) | FIXED | {"tie_word_embeddings": scaled}
        config |= {"is_encoder_decoder": True, "architectures": ["T5ForConditionalGeneration"]}
        (folder / "config.json.tmp").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_safetensors(tensors, folder / "model.safetensors.tmp")
        for name in ("config.json", "model.safetensors"):
            os.replace(folder / f"{name}.tmp", folder / name)

def sample_token(logits, temperature, top_k, generator):
    """Choose the next token (B,) from logits (B, V): the most probable one, or a sample."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    values, ids = logits.float().topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    if not values[:, 0].isfinite().all():  # topk takes NaN for the largest number
        raise UserError("the model's logits are not finite; try --dtype float32 or another model")
    probs = (values / temperature).softmax(dim=-1)
    return ids.gather(-1, torch.multinomial(probs, 1, generator=generator))[:, 0]

def drop_finished(finished, rows, token, memory_bias, memory_kv, kv_cache):
    """Compact a batch of generate(): return its five tensors without the finished elements (B,).
    Elements from the end are copied over finished ones at the beginning: of [a, -, c, -, e] e fills
    the first gap, and [a, e, c] remains. This copies little."""
    n = len(finished) - int(finished.sum())
    slots = finished[:n].nonzero()[:, 0]
    movers = n + (~finished[n:]).nonzero()[:, 0]
    for tensor in (rows, token, memory_bias):
        tensor[slots] = tensor[movers]
    for tensor in (*memory_kv, *kv_cache):  # one layer at a time, to copy less at once
        tensor[:, slots] = tensor[:, movers]
    return rows[:n], token[:n], memory_bias[:n], memory_kv[:, :, :n], kv_cache[:, :, :n]

# --- files and downloads: config.json, tensor names, weights ---

# The settings that are the same in every T5.
FIXED = dict(model_type="t5", pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

def hf_name(name):
    """Translate a parameter's name into its name in Hugging Face files."""
    last = "layer.1" if name.startswith("encoder") else "layer.2"
    parts = {
        "blocks": "block", "final_norm": "final_layer_norm",
        "self_norm": "layer.0.layer_norm", "self_attention": "layer.0.SelfAttention",
        "cross_norm": "layer.1.layer_norm", "cross_attention": "layer.1.EncDecAttention",
        "ff_norm": f"{last}.layer_norm", "ff": f"{last}.DenseReluDense",
        "relative_bias": "block.0.layer.0.SelfAttention.relative_attention_bias"}
    return ".".join(parts.get(part, part) for part in name.split("."))

@contextlib.contextmanager
def names_file(path, what, remedy="download it again"):
    """Context manager: turn an error into a UserError that says what the file is not, and why."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, PermissionError):
        raise  # not the file's fault
    except Exception as error:  # torch.load raises many kinds, none of them documented
        kind = "no key" if isinstance(error, KeyError) else f"{type(error).__name__}:"
        reason = f"{kind} {' '.join(str(error).split())[:1000]}"
        if Path(path).is_file() and open(path, "rb").read(23) == b"version https://git-lfs":
            reason, remedy = "a git-lfs pointer", "run `git lfs pull`"
        raise UserError(f"{path}: not {what} ({reason}); {remedy}") from None

def read_config(name_or_dir):
    """Read a model's config.json; ignore keys that T5Config lacks."""
    path = model_file(name_or_dir, "config.json")
    with names_file(path, "the config of a T5"):
        stored = json.loads(path.read_bytes())
        config = T5Config(**{k: v for k, v in stored.items() if k in T5Config.__annotations__})
        for name, value in FIXED.items():
            if stored.get(name, value) != value:
                raise ValueError(f"{name} is {stored[name]!r}, not {value!r}")
        return config

def count_parameters(name_or_dir):
    """Return the number of a model's parameters; of its files only config.json is read."""
    with torch.device("meta"):  # shapes without values
        return sum(parameter.numel() for parameter in T5(read_config(name_or_dir)).parameters())

def read_weights(name_or_dir):
    """Read a model's weights, one file or shards, as {name: tensor}. No code in them is run."""
    path = model_file(name_or_dir, "model.safetensors", "model.safetensors.index.json",
                      "pytorch_model.bin", "pytorch_model.bin.index.json")
    safe = "safetensors" in path.name
    shards = [path.name]
    if path.suffix == ".json":
        with names_file(path, "a complete index of shards"):
            index = json.loads(path.read_bytes())["weight_map"]
            shards = sorted({Path(shard).name for shard in index.values()})
    weights = {}
    for path in [model_file(name_or_dir, shard) for shard in shards]:
        with names_file(path, "a complete file of weights"):
            stored = read_safetensors(path) if safe else torch.load(path, "cpu", weights_only=True)
            for key in ("state_dict", "model_state_dict", "model"):
                stored = stored.get(key, stored)  # the weights in a training script's checkpoint
            for name, tensor in stored.items():
                # torch.compile, DDP and Lightning prefix names; embed_tokens is a copy.
                name = re.sub(r"\b(_orig_mod|module|model)\.", "", name)
                weights[re.sub(r"^(en|de)coder\.embed_tokens", "shared", name)] = tensor
    return weights

def read_safetensors(path):
    """Map a safetensors file into memory: {name: tensor}. Pages are read when they are used.
    The format: 8 bytes with the length of the header, a JSON header, the bytes of the tensors."""
    data = np.memmap(path, mode="c")  # a change stays in memory
    first = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:first].tobytes())
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = DTYPES[entry["dtype"]]
        start, end = end, end + math.prod(entry["shape"]) * dtype.itemsize
        if entry["data_offsets"] != [start, end]:
            raise ValueError(f"{name} is not at {start} to {end}")
        part = torch.from_numpy(data[first + start : first + end])
        if (first + start) % dtype.itemsize:  # a view must start at a multiple of its item size
            part = part.clone()
        tensors[name] = part.view(dtype).view(entry["shape"])
    return tensors

def write_safetensors(tensors, path):
    """Write {name: tensor} as one safetensors file."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        if x.dtype not in names:
            raise UserError(f"{path}: {name} is in {x.dtype}; save it in fp32, fp16 or bf16")
        start, end = end, end + x.nbytes
        header[name] = {"dtype": names[x.dtype], "shape": x.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            file.write(x.cpu().contiguous().view(-1).view(torch.uint8).numpy())

def model_file(model, *names):
    """Return the path of the first of these files that a model has, downloading it if necessary."""
    folder = Path(model) if os.path.isdir(model) else hub_folder(str(model), names)
    for name in names:
        if (folder / name).exists():
            return folder / name
    remedy = "copy one there"
    if "spiece.model" in names:  # transformers 5 does not save it
        remedy = "copy the base model's there, such as google/flan-t5-base's"
    elif (folder / "adapter_config.json").exists():
        remedy = "merge this PEFT adapter first: merge_and_unload(), then save_pretrained()"
    raise UserError(f"{model}: no {', no '.join(names)} in {folder}; {remedy}")

def hub_folder(model, names):
    """Return a hub model's folder in the Hugging Face cache, with the first of these files it has.
    Its layout, the variables such as HF_HOME and the token are those of huggingface_hub."""
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model):
        raise UserError(f"{model}: no such folder; give a folder or the name of a hub model")
    get = os.environ.get
    home = Path(get("HF_HOME") or "~/.cache/huggingface").expanduser()
    hub = Path(get("HF_HUB_CACHE") or get("HUGGINGFACE_HUB_CACHE") or home / "hub").expanduser()
    cache = hub / f"models--{model.replace('/', '--')}"
    main = cache / "refs" / "main"  # holds the commit of the cached snapshot
    commit = main.read_text().strip() if main.exists() else "main"
    folder = cache / "snapshots" / commit
    if any((folder / name).exists() for name in names):
        return folder
    offline = get("HF_HUB_OFFLINE") or get("TRANSFORMERS_OFFLINE") or ""
    if offline.upper() in ("1", "TRUE", "YES", "ON"):
        raise UserError(f"{folder}: no {names[0]}; unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE")
    endpoint = (get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    login = (home / "token").read_text() if (home / "token").exists() else ""
    token = re.sub("[^!-~]", "", get("HF_TOKEN") or login)  # what a header cannot hold
    listing = f"{endpoint}/api/models/{model}/revision/{commit}?blobs=true"
    with names_file(listing, "a list of files", "for a gated model set HF_TOKEN; without a network "
                    f"copy the model's files to {folder}"):
        repository = json.loads(open_url(listing, token).read())
        files = {entry["rfilename"]: entry for entry in repository["siblings"]}
        folder = cache / "snapshots" / Path(repository["sha"]).name
    for name in [name for name in names if name in files][:1]:
        sha256 = (files[name].get("lfs") or {}).get("sha256")
        url = f"{endpoint}/{model}/resolve/{folder.name}/{name}"
        download(url, folder / name, sha256, files[name].get("size"), token)
        main.parent.mkdir(parents=True, exist_ok=True)
        main.write_text(folder.name)
    return folder

def download(url, path, sha256=None, size=None, token=""):
    """Download a URL to path, unless the file exists, and return path. Raises UserError.
    It is written as PATH.part, checked, and renamed; status 206 continues an interrupted file."""
    part = path.with_name(path.name + ".part")
    for attempt in range(0 if path.exists() else 4):
        time.sleep(attempt)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            response = open_url(url, token, start=part.stat().st_size if part.exists() else 0)
            if response.headers.get_content_type() == "text/html":
                raise OSError("a web page was received in place of the file")
            with response, open(part, "ab" if response.status == 206 else "wb") as file:
                total = size or file.tell() + int(response.headers.get("Content-Length") or 0)
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    show_progress(f"{path.name}: {file.tell() / 1e6:,.1f} of {total / 1e6:,.1f} MB")
                show_progress("")
                if file.tell() < total or (size and file.tell() > size):
                    raise OSError(f"{file.tell():,} of {total:,} bytes were received")
            if sha256 and hashlib.sha256(np.memmap(part, mode="r")).hexdigest() != sha256:
                raise ValueError(f"its SHA-256 is not {sha256}")
            return part.replace(path)
        except Exception as error:
            code = getattr(error, "code", None)
            if code == 416 or isinstance(error, ValueError):  # the part is of another file
                part.unlink(missing_ok=True)
            if attempt == 3 or code in (401, 403, 404):
                raise UserError(f"cannot download {url} ({error!r}); try again, with HF_TOKEN for "
                                f"a gated model, or copy the file to {path}") from None
    return path

class Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects; the token goes to its own host only, such as to a renamed model there."""

    def redirect_request(self, request, *arguments):
        new = super().redirect_request(request, *arguments)
        if (new.type, new.host) != (request.type, request.host):
            new.remove_header("Authorization")
        return new

def open_url(url, token="", start=0):
    """Open a URL from byte `start` on, with a token for its host if there is one."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    headers |= {"Range": f"bytes={start}-"} if start else {}
    request = urllib.request.Request(url, headers=headers)
    return urllib.request.build_opener(Redirects).open(request, timeout=30)

def show_progress(text):
    """Rewrite the progress line; do nothing unless stderr is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

# --- the tokenizer ---

class Tokenizer:
    """T5's SentencePiece vocabulary: a spiece.model, a folder that holds one, or a hub name.
    pieces: the string of each id; "\u2581" (not the underscore) marks the start of a word."""

    def __init__(self, name_or_path):
        is_file = Path(name_or_path).is_file()
        self.path = Path(name_or_path) if is_file else model_file(name_or_path, "spiece.model")
        with names_file(self.path, "a T5 vocabulary"):
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
            if [self.model.pad_id(), self.model.eos_id(), self.model.unk_id()] != [PAD, EOS, UNK]:
                raise ValueError("<pad>, </s> and <unk> are not 0, 1 and 2")
        self.pieces = self.model.id_to_piece(list(range(len(self.model))))
        # T5's sentinels, which mark gaps, have the ids after its 32,000 pieces, the last one first.
        gaps = 100 if len(self.model) == 32000 else 0
        self.sentinels = {f"<extra_id_{n}>": 32099 - n for n in range(gaps)}
        added = self.path.with_name("added_tokens.json")
        if added.exists():
            with names_file(added, "a table of T5's sentinels", "use a model without added tokens"):
                if others := json.loads(added.read_bytes()).items() - self.sentinels.items():
                    raise ValueError(f"it adds {dict(others)}")

    def split(self, text, kind=str):
        """Return a text's pieces, without </s>. Half a surrogate pair, as JSON can hold, is "?".
        As in transformers 5, T5's sentinels are pieces, and the parts between them are separate."""
        text, pieces = text.encode("utf-8", "replace").decode(), []
        for part in re.split("(<extra_id_[1-9]?[0-9]>)", text) if self.sentinels else [text]:
            if part in self.sentinels:
                pieces.append(part if kind is str else self.sentinels[part])
            else:
                pieces += self.model.encode(part, out_type=kind)
        return pieces

    def encode(self, text):
        """Return the ids of a text, ending in </s>."""
        return self.split(text, int) + [EOS]

    def decode(self, ids):
        """Return the text of ids (a list or a 1-D tensor), leaving out special tokens."""
        return self.model.decode([i for i in map(int, ids) if UNK < i < len(self.pieces)])

    def save(self, folder):
        """Copy the vocabulary into a model's folder."""
        (Path(folder) / "spiece.model").write_bytes(self.path.read_bytes())

def load_pretrained(name_or_dir, **options):
    """Return a model (options: see T5.from_pretrained) and its tokenizer."""
    model, tokenizer = T5.from_pretrained(name_or_dir, **options), Tokenizer(name_or_dir)
    if len(tokenizer.pieces) > model.config.vocab_size:
        raise UserError(f"{tokenizer.path}: {len(tokenizer.pieces)} pieces, but the model has only "
                        f"{model.config.vocab_size} ids; copy the right one there")
    return model, tokenizer

def pad_sequences(sequences, device="cpu"):
    """Pad lists of ids on the right with 0: (B, longest)."""
    batch = nn.utils.rnn.pad_sequence(list(map(torch.as_tensor, sequences)), batch_first=True)
    return batch.long().to(device)

# --- two faster layers for a CPU ---

class Linear(nn.Module):
    """x W^T, without a bias vector; W has no values before init_weights or loading."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.packed = None  # the weights as packed_weights() rearranges them

    def forward(self, x):
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or self.packed is None:
            return F.linear(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, None, "none", [], "")

@contextlib.contextmanager
def packed_weights(*modules):
    """Context manager: on an x86 CPU, rearrange fp32 weights once, not in every product. For the
    few rows of a decoding step that takes longer than the product. Do not change them inside."""
    x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    packs = x86 and torch.backends.mkldnn.is_available()
    layers = [layer for layer in nn.ModuleList(modules).modules() if isinstance(layer, Linear)]
    with contextlib.ExitStack() as stack:
        for layer in layers:
            if packs and layer.weight.is_cpu and layer.weight.dtype == torch.float32:
                layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
                stack.callback(setattr, layer, "packed", None)
        yield

class Dropout(nn.Dropout):
    """PyTorch's dropout; on a CPU twice as fast, with 16 random bits per element, not a double."""

    def forward(self, x):
        if not (self.training and self.p and x.is_cpu):
            return super().forward(x)
        dropped = round(self.p * 2**16)  # of the 2**16 values
        bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
        kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
        return x * kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))

# --- the command ---

def best_device():
    """Return the fastest device here: "cuda", Apple's "mps", or "cpu"."""
    mps = "mps" if torch.backends.mps.is_available() else "cpu"
    return "cuda" if torch.cuda.is_available() else mps

def free_memory(device):
    """Return the bytes that tensors on a device can still take: 85% of what is free, because an
    allocator cannot use all of it."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    elif device == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    elif (meminfo := Path("/proc/meminfo")).exists():
        free = 1024 * int(re.search(r"MemAvailable: +(\d+)", meminfo.read_text())[1])
    else:  # macOS says only how much there is
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return int(0.85 * free)

def is_out_of_memory(error):
    """Return whether an error says that a device has run out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory"))  # MPS, CPU

def in_range(kind, above=-math.inf, below=math.inf):
    """Return an argparse type: a number of at least 0, above `above` and below `below`."""
    def number(text):  # argparse prints this name: "invalid number value"
        value = kind(text)
        if value >= 0 and above < value < below:
            return value
        raise ValueError
    return number

def run_command(main):
    """Run a command's main(); print errors that the user can fix as one line, and exit with 1."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # the shell's status after Ctrl-C
    except BrokenPipeError:  # for example `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # for example a full disk
        name, cause = error.filename or "writing a file", error.strerror or error
        sys.exit(f"error: {name}: {cause}; fix this and run it again")

def main():
    """Generate from one text: python t5.py MODEL "text"."""
    parser = argparse.ArgumentParser(description="Generate text with a T5 checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("model", help="folder or hub name such as google/flan-t5-small")
    add("text", help="input, such as 'Q: What is 2 + 3? A:'")
    add("--device", choices=sorted({"cpu", best_device()}), default=best_device(), help="device")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="type of the weights")
    add("--max-new-tokens", type=in_range(int, above=0), default=256, help="longest output")
    add("--temperature", type=in_range(float), default=0.0, help="0 decodes greedily")
    add("--num-samples", type=in_range(int, above=0), default=1, help="number of outputs")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model, tokenizer = load_pretrained(args.model, device=args.device, dtype=dtype)
    input_ids = pad_sequences([tokenizer.encode(args.text)], args.device)
    for ids in model.generate(input_ids, None, args.max_new_tokens, args.temperature,
                              num_samples=args.num_samples):
        print(tokenizer.decode(ids))

if __name__ == "__main__":
    run_command(main)
