"""Hugging Face's folders of a T5: config.json, and the names that the model's parameters have in the weights' file.

Knows nothing of the model but its configuration and its parameters' names. The files of weights themselves are in
data/weights.py, fetching folders in data/download.py.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import get_args

import torch

from data.download import InputError
from data.weights import open_weights

# Copies of shared.weight that some files hold, and a bias that the first T5 1.0 files hold but no T5 uses.
EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNUSED_BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

# What config.json may say for a field of each type.
ALLOWED = {
    int: ("a positive whole number below 262,144", lambda value: type(value) is int and 0 < value < 2**18),
    float: ("a number of at least 0 and below 1", lambda value: type(value) in (int, float) and 0 <= value < 1),
    bool: ("true or false", lambda value: type(value) is bool),
    str: ("a text", lambda value: type(value) is str),
}
IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}  # the same in every T5
ACTIVATIONS = {"relu": "relu", "gated-gelu": "gelu_new"}  # feed_forward_proj's name for it, and dense_act_fn's


def read_config(path, config_class):
    """Read a config.json as a config_class, a dataclass; keys that it has no field for are ignored.

    Raises InputError naming the file and the key.
    """
    known = {field.name: field.type for field in fields(config_class)}
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(stored, dict) or stored.get("model_type", "t5") != "t5":
            raise InputError("not the configuration of a T5 (model_type must be 't5')")
        for key, value in stored.items():
            if key in known:
                kind, *optional = get_args(known[key]) or (known[key],)
                if not (ALLOWED[kind][1](value) or optional and value is None):
                    raise InputError(f"{key} is {value!r}, not {ALLOWED[kind][0]}")
        config = config_class(**{key: value for key, value in stored.items() if key in known})
        for key, only in (IDS | {"dense_act_fn": ACTIVATIONS[config.feed_forward_proj]}).items():
            if stored.get(key, only) != only:
                raise InputError(f"{key} is {stored[key]!r}; in a T5 of this kind it is {only!r}")
        return config
    except (OSError, ValueError, RecursionError, InputError) as error:
        raise InputError(f"{path}: {error}; fetch it again") from None


def write_config(config, path):
    """Write a config.json that `transformers` 4 and 5 read as the same model.

    To version 4 tie_word_embeddings says that the head is the embedding *and* that the decoder's output is scaled, so it
    is written as the latter, and where it is false T5.save_pretrained stores the head, be it the embedding or not. One
    kind is beyond version 4, which no published T5 is of: scaled, with a head of its own.
    """
    scaled = config.scale_decoder_outputs
    stored = asdict(config) | IDS | {"model_type": "t5", "is_encoder_decoder": True, "tie_word_embeddings": scaled}
    stored["architectures"] = ["T5ForConditionalGeneration"]
    Path(path).write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_folder(folder, config_class):
    """The configuration and the tensors {name: tensor} of a folder, without copies of the embedding among them.

    The weights decide whether the head is the embedding: a stored head that differs from it is a head of its own.
    Raises InputError naming the folder.
    """
    config, stored = read_config(folder / "config.json", config_class), open_weights(folder)
    if config.num_layers + config.num_decoder_layers > len(stored):  # checked before anything is made of that size
        raise InputError(f"{folder}: {len(stored)} tensors, but config.json says {config.num_layers} layers; fetch it again")
    stored.pop(UNUSED_BIAS, None)
    for name in EMBEDDING_COPIES:
        if name in stored:
            copy = stored.pop(name)
            if not same(stored.setdefault("shared.weight", copy), copy):
                raise InputError(f"{folder}: {name} differs from shared.weight, which it should be a copy of")
    if "lm_head.weight" in stored:
        config.tie_word_embeddings = "shared.weight" in stored and same(stored["lm_head.weight"], stored["shared.weight"])
        if config.tie_word_embeddings:
            del stored["lm_head.weight"]
    return config, stored


def same(a, b):
    """Whether two stored tensors are equal, number by number, in whatever dtypes."""
    both = torch.promote_types(a.dtype, b.dtype)
    return a.shape == b.shape and torch.equal(a.to(both), b.to(both))


def tensor_names(config):
    """{parameter: the names of the tensors in Hugging Face files that are its rows}, for reading and writing."""
    wi = ("wi_0", "wi_1") if config.feed_forward_proj == "gated-gelu" else ("wi",)
    names = {"shared": ["shared"], "lm_head": ["shared" if config.tie_word_embeddings else "lm_head"]}
    for stack, layers, ff in (("encoder", config.num_layers, 1), ("decoder", config.num_decoder_layers, 2)):
        parts = {
            "self_norm": ["0.layer_norm"],
            "self_attention.qkv": [f"0.SelfAttention.{letter}" for letter in "qkv"],
            "self_attention.o": ["0.SelfAttention.o"],
            "ff_norm": [f"{ff}.layer_norm"],
            "ff.wi": [f"{ff}.DenseReluDense.{name}" for name in wi],
            "ff.wo": [f"{ff}.DenseReluDense.wo"],
        }
        if stack == "decoder":
            parts |= {
                "cross_norm": ["1.layer_norm"],
                "cross_attention.q": ["1.EncDecAttention.q"],
                "cross_attention.kv": [f"1.EncDecAttention.{letter}" for letter in "kv"],
                "cross_attention.o": ["1.EncDecAttention.o"],
            }
        for i in range(layers):
            for part, theirs in parts.items():
                names[f"{stack}.blocks.{i}.{part}"] = [f"{stack}.block.{i}.layer.{name}" for name in theirs]
        names[f"{stack}.relative_bias"] = [f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"]
        names[f"{stack}.final_norm"] = [f"{stack}.final_layer_norm"]
    return {f"{own}.weight": [f"{name}.weight" for name in theirs] for own, theirs in names.items()}
