"""Files of adapters: bit for bit what was trained and nothing else, in a model that fits, or an error that says why not."""

import copy
import json
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors.torch")
import safetensors  # noqa: E402

from fastadapt.nn import (  # noqa: E402
    AdapterBank,
    BottleneckAdapter,
    CompacterAdapter,
    HyperAdapter,
    KronALinear,
    LoRABank,
    LoRAEmbedding,
    LoRALinear,
    LoRAMultiheadAttention,
    ParallelAdapter,
    PrefixAttention,
    PrefixEncoder,
    PromptEncoder,
    attach,
    freeze_except,
    load_adapters,
    save_adapters,
)  # fmt: skip

D = 16


def model(**options):
    """Every kind of adapter, frozen layers between them, and a head."""
    first, second = CompacterAdapter.compacter_plus_plus(2, D, 8)
    base = nn.Linear(D, D)
    bank = LoRABank(nn.Linear(D, D), 2, 3)
    bank.add(LoRALinear(bank.base, 2, alpha=3))
    return nn.ModuleDict(
        {
            "words": LoRAEmbedding(nn.Embedding(7, D), 2),
            "prompt": PromptEncoder(3, D, hidden=4),
            "attention": PrefixAttention(D, 2, p=5, gate="per_head"),
            "heads": LoRAMultiheadAttention(nn.MultiheadAttention(D, 2), 2),
            "linear": LoRALinear(base, 4, **{"dora": True, **options}),
            "kron": KronALinear(nn.Linear(D, D)),
            "parallel": ParallelAdapter(nn.Linear(D, D), BottleneckAdapter(D, 4, norm="pre", scale="learned")),
            "bank": AdapterBank(2, D, 4, skip="hidden"),
            "slots": bank,
            "hyper": HyperAdapter(["a", "b"], 2, D, 4, embedding=3, hidden=5),
            "phm": nn.ModuleList([first, second]),
            "twice": nn.ModuleList([first]),
            "head": nn.Linear(D, 2),
        }
    )


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return module


def names(module):
    frozen = "base.", "parallel.layer.", "q_proj", "k_proj", "v_proj", "o_proj", "head."
    return [name for name in module.state_dict() if not any(part in name for part in frozen)]


def changed(before, module):
    return {name for name, t in module.state_dict().items() if not torch.equal(t, before[name])}


def values(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


def test_every_kind_comes_back_to_the_bit(tmp_path):
    source, target = randomised(model()), randomised(model(), 1)
    saved = save_adapters(source, tmp_path / "a.safetensors")
    assert sorted(saved) == sorted(names(source))
    before, kept = values(target), dict(target.named_parameters())
    for p in target["phm"].parameters():
        p.requires_grad_(False)
    assert sorted(load_adapters(target, tmp_path / "a.safetensors")) == sorted(saved)
    for name, t in target.state_dict().items():
        assert torch.equal(t, source.state_dict()[name] if name in saved else before[name]), name
    assert all(p is kept[name] for name, p in target.named_parameters())
    assert not any(p.requires_grad for p in target["phm"].parameters()) and target["bank"].up_weight.requires_grad
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_is_shared_is_in_the_file_once(tmp_path):
    source = randomised(model())
    saved = save_adapters(source, tmp_path / "a")
    with safetensors.safe_open(tmp_path / "a", framework="pt") as file:
        stored, metadata = set(file.keys()), file.metadata()
    rules = [name for name in saved if name.endswith("rule")]
    assert len(rules) == 6 and len(stored & set(rules)) == 1  # down and up of two adapters, one of them in two places
    assert not any(name.startswith("twice") for name in stored)
    assert set(json.loads(metadata["shared"])) == set(saved) - stored and metadata["format"] == "pt"
    apart = model()
    apart["phm"][1] = CompacterAdapter(D, 8, activation="gelu_tanh")
    before = values(apart)
    with pytest.raises(ValueError, match=r"phm\.0\.down\.rule is one tensor with .*phm\.1\.down\.rule.* in the file, with "):
        load_adapters(apart, tmp_path / "a")
    assert not changed(before, apart)
    path = save(nn.ModuleDict({"phm": apart["phm"]}), tmp_path / "b")
    with pytest.raises(ValueError, match=r"phm\.0\.down\.rule is one tensor with phm\.0\.up\.rule in the file, with .*phm\.1"):
        load_adapters(nn.ModuleDict({"phm": source["phm"]}), path)


def save(module, path, **options):
    save_adapters(module, path, **options)
    return path


def test_extra_names(tmp_path):
    source, target = randomised(model()), randomised(model(), 1)
    trained = freeze_except(source, ("lora", nn.Linear))
    path = save(source, tmp_path / "a", extra=["head", "parallel.layer.bias", *trained])
    before = values(target)
    loaded = load_adapters(target, path)
    assert {"head.weight", "head.bias", "parallel.layer.bias", "attention.q_proj.weight"} <= set(loaded)
    assert "parallel.layer.weight" in loaded and "linear.base.weight" not in loaded
    assert changed(before, target) == {name for name in loaded if not torch.equal(before[name], source.state_dict()[name])}
    assert "head.weight" in changed(before, target)
    only = nn.Sequential(nn.Linear(D, 2))
    assert save_adapters(only, path, extra="0.bias") == save_adapters(only, path, extra="*.b*") == ["0.bias"]
    with pytest.raises(ValueError, match="0.bias is not in the model"):
        load_adapters(nn.ModuleList(), path)
    with pytest.raises(ValueError, match="extra must name parameters, buffers or submodules of the model, got 'classifier'"):
        save_adapters(source, path, extra="classifier")
    with pytest.raises(ValueError, match="model must have adapters, or extra names, got none in Sequential"):
        save_adapters(only, path)


def adapter(**options):
    return nn.ModuleDict({"a": BottleneckAdapter(**{"d": D, "r": 4, **options})})


OTHERS = {
    "missing": (
        adapter(norm="pre"),
        r"a has norm=None in the file, norm='pre' in the model; a\.norm\.weight is missing in the file",
    ),
    "unexpected": (adapter(bias=False), r"a\.down\.bias is not in the model"),
    "shape": (adapter(r=5), r"a\.down\.weight is \(4, 16\) in the file, \(5, 16\) in the model"),
    "dtype": (adapter(dtype=torch.bfloat16), r"a\.down\.weight is torch\.float32 in the file, torch\.bfloat16 in the model"),
    "option": (adapter(activation="gelu"), "a has activation='relu' in the file, activation='gelu' in the model"),
    "scale": (adapter(scale=2), r"a has scale=1\.0 in the file, scale=2\.0 in the model"),
    "type": (
        nn.ModuleDict({"a": CompacterAdapter(D, 4)}),
        "a is a BottleneckAdapter in the file, a CompacterAdapter in the model; .*; and [0-9]+ more differences",
    ),
    "meta": (adapter(device="meta"), "a.down.weight is on the meta device in the model"),
    "nothing": (nn.Linear(D, D), "a.down.weight is not in the model"),
}  # fmt: skip


@pytest.mark.parametrize("other, message", OTHERS.values(), ids=OTHERS)
def test_a_file_for_another_model_changes_nothing(other, message, tmp_path):
    path = save(randomised(adapter()), tmp_path / "a")
    before = None if "meta" in message else values(other)
    with pytest.raises(ValueError, match=f"a must fit the model, got .*{message}"):
        load_adapters(other, path)
    assert before is None or not changed(before, other)


def test_the_last_difference_is_found_before_the_first_copy(tmp_path):
    source = nn.ModuleList(BottleneckAdapter(D, 4) for _ in range(3))
    path = save(randomised(source), tmp_path / "a")
    target = nn.ModuleList([*(BottleneckAdapter(D, 4) for _ in range(2)), BottleneckAdapter(D, 5)])
    before = values(target)
    with pytest.raises(ValueError, match=r"2\.down\.weight is \(4, 16\) in the file"):
        load_adapters(target, path)
    assert not changed(before, target)


def test_what_cannot_be_written_to_is_found_before_the_first_copy(tmp_path):
    path = save(randomised(nn.ModuleList(BottleneckAdapter(D, 4) for _ in range(2))), tmp_path / "a")
    expanded = nn.ModuleList(BottleneckAdapter(D, 4) for _ in range(2))
    expanded[1].up.weight = nn.Parameter(torch.zeros(1).expand(D, 4))
    with torch.inference_mode():
        inference = nn.ModuleList(BottleneckAdapter(D, 4) for _ in range(2))
    for last, message in ((expanded[1], "single memory location"), (inference[1], "inference tensor")):
        target = nn.ModuleList([BottleneckAdapter(D, 4), last])
        before = values(target)
        with pytest.raises(RuntimeError, match=message):
            load_adapters(target, path)
        assert not changed(before, target)


def test_alpha_of_lora_is_compared(tmp_path):
    path = save(nn.Sequential(LoRALinear(nn.Linear(D, D), 4, alpha=8)), tmp_path / "a")
    with pytest.raises(ValueError, match=r"0 has scale=2\.0 in the file, scale=4\.0 in the model"):
        load_adapters(nn.Sequential(LoRALinear(nn.Linear(D, D), 4)), path)


def test_generated_adapters_are_compared(tmp_path):
    tasks, sizes = ["a", "b"], {"embedding": 3, "hidden": 5}
    path = save(HyperAdapter(tasks, 2, D, 4, **sizes), tmp_path / "a")
    with pytest.raises(ValueError, match="the model has norm='post' in the file, norm='pre' in the model"):
        load_adapters(HyperAdapter(tasks, 2, D, 4, norm="pre", **sizes), path)
    with pytest.raises(ValueError, match=r"task_embeddings\.c is missing in the file; task_embeddings\.b is not in the model"):
        load_adapters(HyperAdapter(["a", "c"], 2, D, 4, **sizes), path)


def with_prefixes(*names):
    attention = PrefixAttention(D, 2)
    for name in names:
        attention.add(name, 3)
    return nn.ModuleDict({"a": attention})


def test_what_ids_mean_is_compared(tmp_path):
    path = save(HyperAdapter(["x", "y"], 2, D, 4), tmp_path / "a")
    with pytest.raises(ValueError, match=r"the model has tasks=\['x', 'y'\] in the file, tasks=\['y', 'x'\] in the model"):
        load_adapters(HyperAdapter(["y", "x"], 2, D, 4), path)
    source, target = with_prefixes("x", "y"), with_prefixes("x", "y")
    path = save(source, tmp_path / "b")
    with pytest.raises(ValueError, match=r"a has names=\['x', 'y'\] in the file, names=\['y', 'x'\] in the model"):
        load_adapters(with_prefixes("y", "x"), path)
    assert load_adapters(target, path) == ["a.prefixes.x.prefix", "a.prefixes.y.prefix"]
    assert torch.equal(target["a"].prefixes["y"].prefix, source["a"].prefixes["y"].prefix)


def test_a_file_need_not_know_every_option(tmp_path):
    source, target = PrefixEncoder(2, 3, 4), PrefixEncoder(2, 3, 4)
    target.placed = {"layers": [0], "shift_positions": True}
    load_adapters(target, save(source, tmp_path / "a"))
    assert torch.equal(target.prefix, source.prefix)


def test_attached_adapters(tmp_path):
    """Each method on the same model; one after a layer with LoRA lies inside that."""
    models = [nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 2 * D), 2, enable_nested_tensor=False) for _ in range(2)]
    x = torch.randn(3, 2, D)
    for one in models:
        attach(one, "lora", targets="linear2", r=2)
        attach(one, "houlsby", r=4)
        attach(one, "compacter", targets="linear1", r=8)
    source, target = randomised(models[0]).eval(), models[1].eval()
    trained = freeze_except(source, ("lora", "bottleneck", "compacter"))
    path = save(source, tmp_path / "a")
    frozen = {name: t for name, t in source.state_dict().items() if name not in trained}
    target.load_state_dict(frozen, strict=False)
    assert not torch.equal(target(x), source(x))
    assert set(trained) <= set(load_adapters(target, path)) and torch.equal(target(x), source(x))


def test_cast(tmp_path):
    source, target = randomised(adapter()), adapter(dtype=torch.bfloat16)
    load_adapters(target, save(source, tmp_path / "a"), cast=True)
    for name, p in target.named_parameters():
        assert p.dtype == torch.bfloat16 and torch.equal(p, source.get_parameter(name).bfloat16())


def test_merged_layers_are_refused(tmp_path):
    module = nn.ModuleDict({"q": LoRALinear(nn.Linear(D, D), 4)})
    path = save(module, tmp_path / "a")
    content = path.read_bytes()
    module["q"].merge()
    for fn in (save_adapters, load_adapters):
        with pytest.raises(RuntimeError, match=r"q is merged: unmerge\(\) it first"):
            fn(module, path)
    assert path.read_bytes() == content
    module["q"].unmerge()
    assert save_adapters(module, path) == ["q.lora_A.weight", "q.lora_B.weight"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = save(randomised(adapter()), tmp_path / "a")
    content = path.read_bytes()

    def full(descriptor):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            save_adapters(randomised(adapter(), 1), path)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode == (tmp_path / "a").stat().st_mode
    save_adapters(randomised(adapter(), 1), path)
    assert path.read_bytes() != content


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a"
    torch.save(adapter().state_dict(), path)  # a pickle, which is never opened as one
    with pytest.raises(ValueError, match="a must be a file of safetensors: "):
        load_adapters(adapter(), path)
    safetensors.torch.save_file(adapter().state_dict(), path)
    with pytest.raises(ValueError, match="a must be a file of save_adapters, version 1, got a file of something else"):
        load_adapters(adapter(), path)
    safetensors.torch.save_file(adapter().state_dict(), path, {"fastadapt": "2"})
    with pytest.raises(ValueError, match="version 1, got version 2"):
        load_adapters(adapter(), path)
    with pytest.raises(FileNotFoundError):
        load_adapters(adapter(), tmp_path / "b")
    with pytest.raises(ValueError, match="model must have values, got 'a.down.weight' on the meta device"):
        save_adapters(adapter(device="meta"), path)


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="files of adapters need the package safetensors: pip install safetensors"):
        save_adapters(adapter(), tmp_path / "a")


def test_views_of_one_storage_are_saved_apart(tmp_path):
    module = adapter()
    flat = torch.cat([p.detach().flatten() for p in module.parameters()])
    for p, part in zip(module.parameters(), flat.split([p.numel() for p in module.parameters()])):
        p.data = part.view(p.shape)
    other = adapter()
    load_adapters(other, save(module, tmp_path / "a"))
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), other.parameters()))
    transposed = copy.deepcopy(other)
    transposed["a"].up.weight.data = transposed["a"].up.weight.data.T.contiguous().T
    load_adapters(transposed, save(randomised(module, 2), tmp_path / "a"))
    assert torch.equal(transposed["a"].up.weight, module["a"].up.weight)
