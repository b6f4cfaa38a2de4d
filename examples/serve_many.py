"""Serve many LoRA adapters in one batch: a model of peft as it is, and after ``fastadapt.accelerate(model)``.

The encoder is all-MiniLM-L6-v2 (see finetune.py) with adapters that stand in for those of as many customers; every sentence of
a batch asks for its own. peft goes through the adapters one by one; accelerated, a layer is one call of ``lora_linear`` with a
bank of the adapters that the batch asks for. The two take turns, and must give the same embeddings.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch

if not __package__:  # run as a script: its siblings are the package `examples` of this repository
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import fastadapt
from examples import adapt, data, fetch
from examples.finetune import positive


def with_adapters(encoder, count: int, r: int, dtype: torch.dtype):
    """A model of ``peft`` with ``count`` adapters on all linear layers, as if they had been trained."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=r, target_modules="all-linear", init_lora_weights=False, inference_mode=True)
    model = get_peft_model(encoder.to(dtype), config, "customer0")
    for i in range(1, count):
        model.add_adapter(f"customer{i}", config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(0.1)
    return model.eval()


@torch.inference_mode()
def timed(model, batch: data.Batch, names: list[str]) -> tuple[float, torch.Tensor]:
    """Seconds of one forward, and its embeddings."""
    start = time.perf_counter()
    hidden = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, adapter_names=names).last_hidden_state
    if hidden.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, hidden[:, 0].float()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--adapters", nargs="+", type=positive, default=[2, 8, 32], help="how many there are (default: 2 8 32)")
    option("--rank", type=positive, default=16, help="default: %(default)s")
    option("--batch-size", type=positive, default=32, help="sentences (default: %(default)s)")
    option("--rounds", type=positive, default=5, help="default: %(default)s")
    option("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    option("--backend", choices=("native", "triton", "reference"), help="default: the best that supports the call")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        encoder, tokenizer = adapt.load(fetch.model())
        sentences, _ = data.read(fetch.sentences() / "movie.tsv")
    except fetch.FetchError as error:
        print(error, file=sys.stderr)
        return 1
    tokens = data.Tokens(sentences[: 10 * args.batch_size], tokenizer, args.device)
    batch = tokens.training(args.batch_size, 1, 0)[0]
    print(f"{'adapters':>8}{'peft, ms':>12}{'fastadapt, ms':>16}{'speed-up':>11}{'difference':>13}")
    for count in args.adapters:
        torch.manual_seed(count)
        library = with_adapters(copy.deepcopy(encoder), count, args.rank, getattr(torch, args.dtype)).to(args.device)
        fast = copy.deepcopy(library)
        fastadapt.accelerate(fast, backend=args.backend)
        names = [f"customer{i}" for i in torch.randint(count, (args.batch_size,)).tolist()]
        seconds, far = {library: [], fast: []}, 0.0
        for _ in range(args.rounds + 1):
            outputs = []
            for model, times in seconds.items():
                taken, output = timed(model, batch, names)
                times.append(taken)
                outputs.append(output)
            far = max(far, ((outputs[0] - outputs[1]).norm() / outputs[0].norm()).item())
        theirs, ours = (1e3 * statistics.median(times[1:]) for times in seconds.values())
        print(f"{count:8}{theirs:12.1f}{ours:16.1f}{theirs / ours:11.2f}{far:13.1e}", flush=True)
        if far > (1e-4 if args.dtype == "float32" else 0.05):
            print("The two models differ too far", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
