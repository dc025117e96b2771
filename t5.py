"""T5 written by hand: the model, its files, its tokenizer and generation.

Read it from top to bottom: configuration, the blocks of Figure 1 of the Transformer, the model, decoding with a
key/value cache, reading and writing Hugging Face folders, the tokenizer. It holds all three families of checkpoints:
T5 1.0 (Raffel et al., 2020, arXiv 1910.10683), T5 1.1 and its LM-adapted form (gated GELU, Shazeer, 2020,
arXiv 2002.05202), and FlanT5 (Chung et al., 2022, arXiv 2210.11416). The reference it must agree with is
`transformers.T5ForConditionalGeneration`.

This file knows nothing of teachers, alignment, math problems or training.
Shapes: B batch, S source length, T target length, D d_model, H heads, K d_kv, V vocabulary.

    python t5.py google/flan-t5-small "Translate to German: The house is wonderful."
"""

import argparse
import functools
import gc
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

# What imports make stays. The garbage collector, which would look through it again and again, is spared that: 0.1 of the
# 1.35 s from the start of a process to a flan-t5-base that is loaded.
gc.disable()

import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data.cpu import Dropout, Linear, computes_in_bf16, packed
from data.download import InputError, hub_folder, run_command
from data.huggingface import read_folder, tensor_names, write_config
from data.weights import check_shapes, joined, write_safetensors

gc.freeze()
gc.enable()

PAD, EOS = 0, 1  # the same in every T5; the decoder starts from PAD


@dataclass
class T5Config:
    """A model's shape, in the names of config.json. The defaults are t5-small's.

    tie_word_embeddings: the output head is the embedding matrix.
    scale_decoder_outputs: the decoder's output is scaled by d_model**-0.5 before the head. T5 1.0 ties and scales,
    1.1 and FlanT5 do neither, so `transformers` 4 has one key for both; its version 5 has two.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None

    def __post_init__(self):
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers
        if self.scale_decoder_outputs is None:
            self.scale_decoder_outputs = self.tie_word_embeddings
        if not 4 <= self.relative_attention_num_buckets < 2 * self.relative_attention_max_distance:
            raise InputError("relative_attention_num_buckets must be 4 or more, and below twice relative_attention_max_distance")
        if self.feed_forward_proj not in ("relu", "gated-gelu"):
            raise InputError(f"feed_forward_proj is {self.feed_forward_proj!r}; T5 has 'relu' and 'gated-gelu'")


class Embedding(nn.Embedding):
    """A row for each id; T5.init_weights gives the rows their values."""

    def reset_parameters(self):
        pass


class RMSNorm(nn.Module):
    """T5's layer norm: x / rms(x) * weight, without mean and bias, computed in fp32 whatever the dtype of x."""

    def __init__(self, config):
        super().__init__()
        self.eps = config.layer_norm_epsilon
        self.weight = nn.Parameter(torch.ones(config.d_model))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class FeedForward(nn.Module):
    """relu(x W_i) W_o in T5 1.0; (gelu(x W_0) * (x W_1)) W_o in 1.1 and FlanT5, with W_0 and W_1 in one matrix."""

    def __init__(self, config):
        super().__init__()
        self.gated = config.feed_forward_proj == "gated-gelu"
        self.wi = Linear(config.d_model, config.d_ff * (2 if self.gated else 1))
        self.wo = Linear(config.d_ff, config.d_model)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x):
        x = self.wi(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            x = F.gelu(gate, approximate="tanh") * x
        else:
            x = F.relu(x)
        return self.wo(self.dropout(x))


class Attention(nn.Module):
    """Multi-head attention without biases and, T5's trap, without the division of the logits by sqrt(d_kv).

    What multiplies the same input lies in one matrix, one product in place of three or two: W_q, W_k and W_v in
    self-attention; W_k and W_v in cross-attention, whose W_q alone is on the decoder's side.
    """

    def __init__(self, config, is_cross=False):
        super().__init__()
        self.num_heads, self.d_kv = config.num_heads, config.d_kv
        inner = config.num_heads * config.d_kv
        self.dropout = Dropout(config.dropout_rate)
        if is_cross:
            self.q, self.kv = Linear(config.d_model, inner), Linear(config.d_model, 2 * inner)
        else:
            self.qkv = Linear(config.d_model, 3 * inner)
        self.o = Linear(inner, config.d_model)

    def heads(self, x):
        """(B, n, c*H*K) -> c tensors (B, H, n, K)."""
        B, n, _ = x.shape
        return x.view(B, n, -1, self.num_heads, self.d_kv).permute(2, 0, 3, 1, 4).unbind(0)

    def keys_values(self, memory):
        """The encoder's output (B, S, D) as keys and values of cross-attention, each (B, H, S, K)."""
        return self.heads(self.kv(memory))

    def forward(self, x, bias, memory_kv=None, past=None):
        """x (B, n, D); bias (B or 1, H or 1, n or 1, m) is added to the logits. memory_kv: keys_values() for cross-attention.

        past: for self-attention while decoding, a pair (key/value store (2, B, H, T, K), number of tokens in it).
        """
        if memory_kv is not None:
            (q,), (k, v) = self.heads(self.q(x)), memory_kv
        else:
            q, k, v = self.heads(self.qkv(x))
            if past is not None:
                store, t = past
                store[0, :, :, t], store[1, :, :, t] = k[:, :, 0], v[:, :, 0]
                k, v = store[:, :, :, : t + 1]
        if self.training and x.is_cpu:  # as torch does it there, but without scaling q and k by 1: 20% less time
            x = self.dropout((q @ k.transpose(-1, -2)).add_(bias).softmax(-1)) @ v
        else:
            dropout = self.dropout.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=1.0)  # (B, H, n, K)
        return self.o(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, in the decoder cross-attention, feed-forward; each as x + dropout(f(norm(x)))."""

    def __init__(self, config, is_decoder):
        super().__init__()
        self.self_norm, self.self_attention = RMSNorm(config), Attention(config)
        if is_decoder:
            self.cross_norm, self.cross_attention = RMSNorm(config), Attention(config, is_cross=True)
        self.ff_norm, self.ff = RMSNorm(config), FeedForward(config)
        self.is_decoder = is_decoder
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x, bias, memory=None, memory_bias=None, memory_kv=None, past=None):
        """x (B, n, D) -> (B, n, D). A decoder's also takes memory, the encoder's output (B, S, D), or in its place, where
        they have been made before, its keys and values memory_kv (2, B, H, S, K)."""
        x = x + self.dropout(self.self_attention(self.self_norm(x), bias, past=past))
        if self.is_decoder:
            if memory_kv is None:
                memory_kv = self.cross_attention.keys_values(memory)
            x = x + self.dropout(self.cross_attention(self.cross_norm(x), memory_bias, memory_kv))
        return x + self.dropout(self.ff(self.ff_norm(x)))


class Stack(nn.Module):
    """The encoder or the decoder: blocks, one relative-position bias shared by all of them, a last norm."""

    def __init__(self, config, is_decoder):
        super().__init__()
        layers = config.num_decoder_layers if is_decoder else config.num_layers
        self.is_decoder = is_decoder
        self.max_distance = config.relative_attention_max_distance
        self.relative_bias = Embedding(config.relative_attention_num_buckets, config.num_heads)
        self.blocks = nn.ModuleList(Block(config, is_decoder) for _ in range(layers))
        self.final_norm = RMSNorm(config)
        self.dropout = Dropout(config.dropout_rate)
        self.gradient_checkpointing = False

    def position_bias(self, query, key):
        """Positions (n,) and (m,) -> bias (1, H, n, m): one learned number a head for each bucket of distances.

        Near distances have a bucket each, far ones share buckets that widen logarithmically; the encoder, which looks
        both ways, gives half of its buckets to each direction.
        """
        distance = key[None, :] - query[:, None]  # (n, m)
        buckets, first = self.relative_bias.num_embeddings, 0
        if self.is_decoder:
            distance = -distance.clamp(max=0)
        else:
            buckets //= 2
            first = (distance > 0).long() * buckets
            distance = distance.abs()
        exact = buckets // 2
        far = (distance.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact) * (buckets - exact)
        bucket = torch.where(distance < exact, distance, (exact + far.long()).clamp(max=buckets - 1))
        return self.relative_bias(first + bucket).permute(2, 0, 1).unsqueeze(0)

    def forward(self, x, mask, memory=None, memory_bias=None):
        """x (B, n, D), mask (B or 1, 1, n or 1, n) true where attention may look -> (B, n, D)."""
        position = torch.arange(x.shape[1], device=x.device)
        bias = additive(mask, self.position_bias(position, position).to(x.dtype))
        x = self.dropout(x)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, bias, memory, memory_bias, use_reentrant=False)
            else:
                x = block(x, bias, memory, memory_bias)
        return self.dropout(self.final_norm(x))


def in_evaluation_mode(method):
    """A method that runs without dropout, whatever mode its module is in."""

    @functools.wraps(method)
    def wrapped(module, *arguments, **options):
        was_training = module.training
        module.eval()
        try:
            return method(module, *arguments, **options)
        finally:
            module.train(was_training)

    return wrapped


def additive(mask, bias):
    """Boolean mask and bias -> one bias for the attention logits, in the dtype in which attention will run.

    Hidden places get the lowest finite number and not -inf: a row that is all padding must not become NaN. bfloat16's
    lowest number is finite in fp32 too; fp16 has its own.
    """
    device = bias.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else bias.dtype
    lowest = torch.finfo(torch.float16 if dtype == torch.float16 else torch.bfloat16).min
    return bias.to(dtype).masked_fill(~mask, lowest)


class T5(nn.Module):
    """The encoder-decoder with its embedding and output head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.shared = Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, is_decoder=False)
        self.decoder = Stack(config, is_decoder=True)
        self.lm_head = Linear(config.d_model, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.shared.weight
        if not self.shared.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Random weights as T5 was pretrained from: embedding 1, every matrix fan_in**-0.5, the queries also
        d_kv**-0.5, which stands for the missing scaling of the attention logits. A head of its own counts as a
        matrix, so that the first loss is near log V."""
        for name, tensor in self.hf_tensors().items():
            if name.endswith("relative_attention_bias.weight"):
                tensor.normal_(std=self.config.d_model**-0.5)
            elif tensor.dim() == 2:
                tensor.normal_(std=tensor.shape[1] ** -0.5)
            if name.endswith(".q.weight"):
                tensor.mul_(self.config.d_kv**-0.5)
        self.shared.weight.normal_(std=1.0)

    def embed(self, ids):
        """Ids (B, n) -> (B, n, D), in the dtype in which all that follows will run: that of the weights, but fp32 on a
        CPU that has no instructions for bf16."""
        x = self.shared(ids)
        return x.float() if x.is_cpu and not computes_in_bf16() else x

    def encode(self, input_ids, attention_mask):
        """(B, S), (B, S) -> the encoder's output (B, S, D) and the bias (B, 1, 1, S) of attention to it."""
        mask = attention_mask.bool()[:, None, None, :]
        memory = self.encoder(self.embed(input_ids), mask)
        return memory, additive(mask, memory.new_zeros(1))

    def logits(self, x):
        """The decoder's output (..., D) -> (..., V)."""
        return self.lm_head(x * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else x)

    def forward(self, input_ids, attention_mask, decoder_input_ids):
        """(B, S), (B, S), (B, T) -> logits (B, T, V): place t predicts the token after decoder_input_ids[:, t]."""
        memory, memory_bias = self.encode(input_ids, attention_mask)
        T = decoder_input_ids.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=memory.device).tril()[None, None]
        return self.logits(self.decoder(self.embed(decoder_input_ids), causal, memory, memory_bias))

    def source_keys_values(self, input_ids, mask):
        """(B, S), (B, S) -> keys and values of the source in all L decoder blocks (L, 2, B, H, S, K), bias (B, 1, 1, S).

        A CPU takes about 2,048 tokens at a time, so that activations are made in the same memory again and again: 32
        rows of 470 in 5.2 s, at once in 6.4 (flan-t5-small, two cores). And it cuts each part of the batch where its
        longest row ends.
        """
        B, S = input_ids.shape
        size = max(1, 2048 // S) if input_ids.is_cpu else B
        bias = additive(mask[:, None, None, :], self.embed(input_ids[:1, :1]).new_zeros(1))
        blocks, c = self.decoder.blocks, self.config
        memory_kv = torch.zeros(len(blocks), 2, B, c.num_heads, S, c.d_kv, dtype=bias.dtype, device=bias.device)
        ends = (mask * torch.arange(1, S + 1, device=mask.device)).amax(1)  # (B,)
        ends[ends == 0] = S  # a row that sees nothing looks at all places alike, as in forward()
        for start in range(0, B, size):
            rows = slice(start, start + size)
            n = int(ends[rows].max())
            memory, _ = self.encode(input_ids[rows, :n], mask[rows, :n])
            for block, (keys, values) in zip(blocks, memory_kv):
                keys[rows, :, :n], values[rows, :, :n] = block.cross_attention.keys_values(memory)
        return memory_kv, bias

    @torch.no_grad()
    @in_evaluation_mode
    def generate(self, input_ids, attention_mask=None, max_new_tokens=256, temperature=0.0, top_k=0,
                 num_samples=1, generator=None, logits_processor=None):  # fmt: skip
        """Decode greedily (temperature 0) or sample, token by token with a key/value cache.

        input_ids, attention_mask: (B, S); without a mask, everything but padding is seen.
        top_k: sample among the k likeliest tokens only (0: all). generator: a torch.Generator on the model's device.
        logits_processor: a function that may change each step's logits: (ids so far (B, t), logits (B, V)) -> (B, V).
        The logits are made in torch's inference mode: clone() what is to be kept and used in autograd.
        Returns (B * num_samples, <= max_new_tokens), a prompt's samples beside each other: no start token, </s> kept,
        0 after it. Finished rows leave the batch, and decoding ends with the last of them.
        """
        if attention_mask is None:
            attention_mask = input_ids != PAD
        # Keys and values of the source are made once; those of the target go into a store of fixed size.
        memory_kv, memory_bias = self.source_keys_values(input_ids, attention_mask.bool())
        if num_samples > 1:
            memory_kv = memory_kv.repeat_interleave(num_samples, dim=2)
            memory_bias = memory_bias.repeat_interleave(num_samples, dim=0)
        (L, _, B, H, _, K), T = memory_kv.shape, max_new_tokens
        store = memory_kv.new_empty(L, 2, B, H, T, K)
        # The bias depends on the distance alone: the last position's row, cut from the left, serves every step.
        position = torch.arange(T, device=memory_kv.device)
        bias = self.decoder.position_bias(position[-1:], position).to(memory_kv.dtype)  # (1, H, 1, T)

        output = torch.full((B, T), PAD, device=memory_kv.device)
        active = torch.arange(B, device=memory_kv.device)  # rows of `output` that the batch still holds
        token = torch.full((B,), PAD, device=memory_kv.device)
        # Inference mode keeps no record of views and versions: an eighth of the time of a step of tiny tensors.
        with torch.inference_mode(), packed(self.decoder, self.lm_head):
            for t in range(T):
                x = self.embed(token[:, None])  # (B, 1, D)
                for block, kv, past in zip(self.decoder.blocks, memory_kv, store):
                    x = block(x, bias[..., T - 1 - t :], memory_bias=memory_bias, memory_kv=kv, past=(past, t))
                logits = self.logits(self.decoder.final_norm(x))[:, 0]  # (B, V)
                if logits_processor is not None:
                    logits = logits_processor(output[active, :t], logits)
                token = choose(logits, temperature, top_k, generator)
                output[active, t] = token
                ended = token == EOS
                n = len(active) - int(ended.sum())  # rows that go on
                if n == 0:
                    output = output[:, : t + 1]
                    break
                if n < len(active):
                    # Those behind place n move to the places of those that ended: cheaper than copying all that go on.
                    to, of = ended[:n].nonzero()[:, 0], n + (~ended[n:]).nonzero()[:, 0]
                    for rows in (active, token, memory_bias):
                        rows[to] = rows[of]
                    for kv in (memory_kv, store[..., : t + 1, :]):
                        kv[:, :, to] = kv[:, :, of]
                    active, token, memory_bias = active[:n], token[:n], memory_bias[:n]
                    memory_kv, store = memory_kv[:, :, :n], store[:, :, :n]
        return output

    def hf_tensors(self, of=lambda parameter: parameter.data):
        """{name in Hugging Face files: tensor}: rows of the parameters, or of what `of` takes from them, say gradients."""
        parameters = dict(self.named_parameters(remove_duplicate=False))
        return {
            name: rows
            for own, names in tensor_names(self.config).items()
            for name, rows in zip(names, of(parameters[own]).chunk(len(names)))
        }

    @classmethod
    def from_pretrained(cls, name_or_dir, device="cpu", dtype=torch.float32, dropout_rate=None):
        """Load an HF-format folder, or a hub name (from the local HF cache, else downloaded and kept there).

        Reads model.safetensors or pytorch_model.bin, whole or in shards, stored in fp32, bf16 or fp16.
        dropout_rate: in place of config.json's, and saved with the model, which comes in evaluation mode. On the CPU the
        weights that lie in the file as they are needed are mapped from there: it must not be changed in place
        (save_pretrained never does).
        Raises InputError naming the folder and what is missing, unknown or misshapen.
        """
        folder = hub_folder(name_or_dir)
        config, stored = read_folder(folder, T5Config)
        if dropout_rate is not None:
            config.dropout_rate = dropout_rate
        with torch.device("meta"):
            model = cls(config)
        check_shapes(stored, model.hf_tensors(), folder)
        weights = {
            own: joined([stored[name] for name in names]).to(device, dtype)
            for own, names in tensor_names(config).items()
        }
        model.load_state_dict(weights, assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.shared.weight
        return model.eval()

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors; each appears whole or not at all. `transformers` loads them."""
        folder, tensors = Path(folder), self.hf_tensors()
        if not self.config.scale_decoder_outputs:  # see write_config
            tensors["lm_head.weight"] = self.lm_head.weight
        folder.mkdir(parents=True, exist_ok=True)
        write_config(self.config, folder / "config.json.tmp")
        write_safetensors(tensors, folder / "model.safetensors.tmp")
        for name in ("config.json", "model.safetensors"):
            os.replace(folder / f"{name}.tmp", folder / name)


def choose(logits, temperature, top_k, generator):
    """Logits (B, V) -> the next token of each row (B,): the likeliest, or one drawn at this temperature."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


class Tokenizer:
    """T5's SentencePiece vocabulary. path: a spiece.model, a folder that holds one, or a hub name.

    pieces: the string of each id; "\u2581" (not the underscore) marks the start of a word. A newline becomes a space.
    """

    def __init__(self, path):
        self.path = Path(path) if Path(path).is_file() else hub_folder(path) / "spiece.model"
        if not self.path.exists():
            raise InputError(f"{self.path.parent}: no spiece.model, so the model has no tokenizer; copy it there")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (OSError, RuntimeError) as error:
            raise InputError(f"{self.path}: not a SentencePiece model ({error}); fetch it again") from None
        if (self.model.pad_id(), self.model.eos_id(), self.model.unk_id()) != (PAD, EOS, 2):
            raise InputError(f"{self.path}: not a T5 vocabulary, where padding, </s> and <unk> have the ids 0, 1 and 2; copy one")
        self.pieces = [self.model.id_to_piece(i) for i in range(len(self.model))]

    def encode(self, text):
        """Text -> ids, ending in </s>."""
        return self.model.encode(whole_characters(text)) + [EOS]

    def split(self, text):
        """Text -> its pieces as strings, one for each id of encode() but </s>; what has no piece stands as it is."""
        return self.model.encode(whole_characters(text), out_type=str)

    def decode(self, ids):
        """Ids (a list or a 1-D tensor) -> text, without padding, </s>, <unk> and ids that have no piece."""
        return self.model.decode([i for i in map(int, ids) if 2 < i < len(self.pieces)])

    def save(self, folder):
        """Put the vocabulary into a model's folder."""
        shutil.copyfile(self.path, Path(folder) / "spiece.model")


def whole_characters(text):
    """The text with "?" for what is no character: a half of a surrogate pair, as JSON can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def load_pretrained(name_or_dir, **options):
    """A model (with from_pretrained's options) and its tokenizer. Raises InputError also where they do not fit."""
    folder = hub_folder(name_or_dir)
    model, tokenizer = T5.from_pretrained(folder, **options), Tokenizer(folder)
    if len(tokenizer.pieces) > model.config.vocab_size:
        raise InputError(
            f"{folder}: spiece.model has {len(tokenizer.pieces)} pieces, the model only {model.config.vocab_size} ids"
        )
    return model, tokenizer


def pad(rows, device="cpu"):
    """Lists of ids -> (B, longest) with 0 behind the shorter ones."""
    batch = torch.full((len(rows), max(map(len, rows))), PAD)
    for row, ids in zip(batch, rows):
        row[: len(ids)] = torch.tensor(ids)
    return batch.to(device)


def best_device():
    """The device to use unless told otherwise: CUDA, Apple's MPS, or the CPU."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def existing_device(name):
    """A type for argparse: a device that torch can use here."""
    if name not in ("cpu", best_device()):
        raise argparse.ArgumentTypeError(f"torch finds no {name} here")
    return name


def main():
    """python t5.py MODEL "text": generate from one text."""
    parser = argparse.ArgumentParser(description="Generate text with a T5 checkpoint.")
    parser.add_argument("model", help="an HF-format folder or a hub name such as google/flan-t5-small")
    parser.add_argument("text", help="the input, e.g. 'Q: What is 2 + 3? A:'")
    parser.add_argument("--device", type=existing_device, default=best_device(), help="cpu, cuda or mps (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"],
                        help="of the weights; float16 overflows in the larger models on a GPU")  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy decoding (default)")
    parser.add_argument("--num-samples", type=int, default=1, help="texts to draw when the temperature is above 0")
    args = parser.parse_args()
    model, tokenizer = load_pretrained(args.model, device=args.device, dtype=getattr(torch, args.dtype))
    ids = pad([tokenizer.encode(args.text)], args.device)
    for row in model.generate(
        ids, max_new_tokens=args.max_new_tokens, temperature=args.temperature, num_samples=args.num_samples
    ):
        print(tokenizer.decode(row))


if __name__ == "__main__":
    run_command(main)
