"""Merge an adapter of peft into a checkpoint, file by file: ``python examples/merge.py CHECKPOINT ADAPTER OUT``.

No model is built: each tensor of the checkpoint is read, merged if the adapter has something for it, and rounded once; most
memory is taken by the largest of its files. LoRA, rsLoRA and DoRA on linear layers and embeddings are known, with biases, with
ranks and alphas that differ between layers, and with modules that were saved whole.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastadapt
from fastadapt.ops.lora_linear import row_norms

PREFIX = "base_model.model."
PARTS = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B")


def read_adapter(folder: Path) -> tuple[dict, dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """The configuration, the parts of every adapted layer by its path, and the tensors that were saved whole by their names."""
    config = json.loads((folder / "adapter_config.json").read_text())
    if config["peft_type"] != "LORA":
        raise ValueError(f"{folder} must hold a LoRA adapter, got {config['peft_type']}")
    layers, whole = {}, {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        name = name.removeprefix(PREFIX)
        part = next((part for part in PARTS if name.endswith("." + part)), None)
        if part is not None:
            layers.setdefault(name.removesuffix("." + part), {})[part] = tensor
        elif "lora_" in name:
            raise ValueError(f"{folder} must hold plain LoRA or DoRA, got {name}")
        else:
            whole[name.replace(".base_layer.", ".")] = tensor
    return config, layers, whole


def scale_of(config: dict, path: str, r: int) -> float:
    """Alpha over the rank or its root, as ``peft`` finds them for the layer ``path``."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), path), config["lora_alpha"])
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def merged(weight: torch.Tensor, bias: torch.Tensor | None, parts: dict, scale: float, transposed: bool):
    """Weight and bias of a layer with its adapter; ``transposed`` layers keep ``(k, n)``, as embeddings do."""
    embedding = "lora_embedding_A" in parts
    a = parts["lora_embedding_A" if embedding else "lora_A.weight"]
    b = parts["lora_embedding_B" if embedding else "lora_B.weight"]
    magnitude, added = parts.get("lora_magnitude_vector"), parts.get("lora_B.bias")
    weight = weight.T if transposed or embedding else weight
    if added is not None:
        if bias is None:
            raise ValueError("a layer with lora_bias must have a bias to merge it into, got none")
        gain = 1.0 if magnitude is None else magnitude / row_norms(weight, a, b, scale)
        bias = (bias + scale * gain * added).to(bias.dtype)
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight = fastadapt.lora_merge(weight, a.to(wide), b.to(wide), scale=scale, magnitude=magnitude)
    return (weight.T.contiguous() if transposed or embedding else weight), bias


def place(path: str, names: set[str]) -> str:
    """The layer of the checkpoint that the adapter calls ``path``: models are saved with and without their outermost name."""
    layers = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    found = {layer for layer in layers if layer == path} or {
        layer for layer in layers if layer.endswith("." + path) or path.endswith("." + layer)
    }
    if len(found) != 1:
        raise ValueError(f"the checkpoint must have one layer {path}, got {sorted(found) or 'none'}")
    return found.pop()


def merge(checkpoint: Path, adapter: Path, out: Path) -> int:
    """Write the merged checkpoint to the folder ``out`` and return the number of layers that the adapter changed.

    The folder appears only when it is complete.
    """
    config, layers, whole = read_adapter(adapter)
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{checkpoint} must hold safetensors, got none")
    names = set()
    for file in files:
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
    layers = {place(path, names): (path, parts) for path, parts in layers.items()}
    for name in list(whole):
        path, _, last = name.rpartition(".")
        whole[f"{place(path, names)}.{last}"] = whole.pop(name)
    if out.exists():
        raise FileExistsError(f"{out} must be a folder to be made, but exists")
    out.parent.mkdir(parents=True, exist_ok=True)
    transposed = bool(config.get("fan_in_fan_out"))
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        complete = Path(folder) / out.name
        complete.mkdir()
        for file in checkpoint.iterdir():
            if file.is_file() and file.suffix != ".safetensors":
                shutil.copy(file, complete)
        for file in files:
            with safe_open(file, "pt") as tensors:
                kept = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
                kept.update({name: tensor.to(kept[name].dtype) for name, tensor in whole.items() if name in kept})
                for name, (path, parts) in layers.items():
                    if f"{name}.weight" not in kept:
                        continue
                    bias = kept.get(f"{name}.bias")
                    r = len(parts.get("lora_A.weight", parts.get("lora_embedding_A")))
                    weight, bias = merged(kept[f"{name}.weight"], bias, parts, scale_of(config, path, r), transposed)
                    kept.update({f"{name}.weight": weight} | ({} if bias is None else {f"{name}.bias": bias}))
                save_file(kept, complete / file.name, tensors.metadata() or {"format": "pt"})
        complete.rename(out)
    return len(layers)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder with safetensors")
    parser.add_argument("adapter", type=Path, help="folder that save_pretrained of peft has written")
    parser.add_argument("out", type=Path, help="folder to be made")
    args = parser.parse_args(argv)
    try:
        count = merge(args.checkpoint, args.adapter, args.out)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{count} layers merged into {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
