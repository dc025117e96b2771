"""Files of weights: safetensors and pytorch_model.bin, whole or in shards, read without running anything in them.

Knows nothing of models: a file of weights is {name: tensor}.
"""

import json
import math
import os
import struct
import zipfile

import torch

from data.download import InputError, shard_names

LONGEST_HEADER = 100_000_000  # bytes; the format allows no more
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def open_weights(folder):
    """The weights of an HF-format folder as {name: tensor}, the files mapped into memory.

    Nothing is read before it is used (flan-t5-base's 990 MB: 0.1 s in place of 0.5 to 1.1), and no memory is taken
    until a tensor is written to, whose pages then become copies: the file stays as it is. It must not be changed in
    place as long as its tensors are in use. They share one storage: torch.save of one of them would write all.
    """
    for stem, opener in (("model.safetensors", open_safetensors), ("pytorch_model.bin", open_bin)):
        index = folder / f"{stem}.index.json"
        if (folder / stem).exists():
            return opener(folder / stem)
        if index.exists():
            return {name: tensor for shard in shard_names(index) for name, tensor in opener(folder / shard).items()}
    raise InputError(f"{folder}: no model.safetensors, no pytorch_model.bin and no index of shards of either; fetch one")


def check_shapes(stored, tensors, folder):
    """Compare what open_weights found with the tensors that are wanted, {name: tensor}. Raises InputError naming the
    folder and the missing, unknown and misshapen ones."""
    faults = [f"missing {name}" for name in tensors if name not in stored]
    faults += [f"unknown {name}" for name in stored if name not in tensors]
    faults += [
        f"{name} has shape {tuple(stored[name].shape)}, config.json says {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    if faults:
        some = "; ".join(faults[:8])
        raise InputError(f"{folder}: {len(faults)} tensors do not fit this T5: {some}. Fetch the folder again")


def joined(parts):
    """torch.cat(parts); without a copy where they lie one behind the other in a file."""
    first = parts[0]
    adjacent = all(
        (a.untyped_storage().data_ptr(), a.data_ptr() + a.nbytes, a.dtype)
        == (b.untyped_storage().data_ptr(), b.data_ptr(), b.dtype)
        for a, b in zip(parts, parts[1:])
    )
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride()) if adjacent else torch.cat(parts)


def open_safetensors(path):
    """One safetensors file: 8 bytes with the header's length, a JSON header, then the tensors' bytes.

    Only those bytes are ever interpreted. Raises InputError where header and file disagree.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, LONGEST_HEADER):
                raise ValueError(f"the header claims {length:,} bytes, the file has {size:,}")
            header = json.loads(file.read(length))
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length :]
        tensors, last = {}, 0
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name} is stored as {entry['dtype']}, not as one of {', '.join(DTYPES)}")
            dtype, shape, (start, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (*shape, start)) or start != last:
                raise ValueError(f"{name}, of shape {shape}, does not begin at byte {last}, where the tensor before it ends")
            if not start <= end <= size - 8 - length or end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has shape {shape} but bytes {start} to {end} of {size - 8 - length:,}")
            last = end
            part = data[start:end]
            if (8 + length + start) % dtype.itemsize:  # a view of numbers must begin at a multiple of their size
                part = part.clone()
            tensors[name] = part.view(dtype).view(shape).data  # for autograd they have nothing to do with each other
        return tensors
    except FileNotFoundError:
        raise InputError(f"{path}: this shard is missing; fetch it again") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None


def open_bin(path):
    """One pytorch_model.bin, read by torch with weights_only: a pickle that would run code is refused."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not all(tensor.dtype in DTYPES.values() for tensor in tensors.values()):
            raise ValueError("it holds something else than tensors in fp32, fp16 or bf16")
    except Exception as error:  # torch.load raises many kinds, none of them documented
        reason = str(error).split(". ")[0]
        raise InputError(f"{path}: not a readable file of weights ({type(error).__name__}: {reason}); fetch it again") from None
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def write_safetensors(tensors, path):
    """Write {name: tensor} as one safetensors file, flushed to the disk."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        if tensor.dtype not in names:
            raise InputError(f"{path}: {name} is in {tensor.dtype}; weights are saved in fp32, fp16 or bf16")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())
