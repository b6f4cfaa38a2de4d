"""What is trained and how much that is: biases by role, counts by type."""

import pytest
import torch
from torch import nn

from fastadapt.nn import BottleneckAdapter, LoRALinear, attach, freeze_except, train_biases, trainable_parameters

from .battery import DEVICE


class Odd(nn.Module):
    """Names that say bias and mean none, and biases under other names."""

    def __init__(self):
        super().__init__()
        self.relative_attention_bias = nn.Embedding(4, 2)
        self.bias = nn.Parameter(torch.randn(3))  # of a type that isn't known
        self.register_buffer("bias_mask", torch.ones(3))
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.rnn = nn.LSTM(4, 3, bidirectional=True)
        self.convolution, self.norm, self.free = nn.Conv1d(4, 2, 1), nn.GroupNorm(1, 4), nn.Linear(4, 4, bias=False)
        self.unbiased = nn.LayerNorm(4)


ROLES = {
    "attention.in_proj_bias", "attention.out_proj.bias", "convolution.bias", "norm.bias", "unbiased.bias",
    *(f"rnn.bias_{kind}_l0{side}" for kind in ("ih", "hh") for side in ("", "_reverse")),
}  # fmt: skip


def test_biases_by_role():
    model = Odd()
    trained = train_biases(model)
    assert set(trained) == ROLES == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(model.get_parameter(name) is p for name, p in trained.items())


def test_biases_of_some_modules_and_with_other_kinds():
    model = nn.ModuleDict({"encoder": Odd(), "head": nn.Linear(4, 2)})
    assert set(train_biases(model, targets=["encoder.rnn", nn.GroupNorm])) == {
        f"encoder.{name}" for name in ROLES if name.startswith(("rnn", "norm"))
    }
    assert set(freeze_except(model, ("bitfit", nn.Linear))) == {
        *(f"encoder.{name}" for name in ROLES), "encoder.attention.out_proj.weight", "encoder.free.weight", "head.weight",
        "head.bias",
    }  # fmt: skip


def test_what_is_trained_beside_the_adapters_is_named():
    adapters, heads = nn.ModuleList(BottleneckAdapter(4, 2) for _ in range(2)), nn.ModuleDict({"a": nn.Linear(4, 2)})
    model = nn.ModuleDict({"adapters": adapters, "heads": heads, "headstrong": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    own = {f"adapters.{i}.{part}.{name}" for i in range(2) for part in ("down", "up") for name in ("weight", "bias")}
    for extra, expected in (
        ("heads", {"heads.a.weight", "heads.a.bias"}),
        (["heads.a.bias", "norm"], {"heads.a.bias", "norm.weight", "norm.bias"}),
        ("head*.weight", {"heads.a.weight", "headstrong.weight"}),
        ((), set()),
    ):
        trained = freeze_except(model, "bottleneck", extra=extra)
        assert trained.keys() == own | expected == {name for name, p in model.named_parameters() if p.requires_grad}
    for wrong in ("head", ["heads", "norm.scale"], "classifier.*"):
        with pytest.raises(ValueError, match="extra must name parameters, buffers or submodules of the model, got '.*"):
            freeze_except(model, "bottleneck", extra=wrong)
        assert own == {name for name, p in model.named_parameters() if p.requires_grad}
    model["tied"] = nn.Linear(4, 2)
    model["tied"].weight = heads["a"].weight
    assert own | {"heads.a.weight"} == freeze_except(model, "bottleneck", extra="tied.weight").keys()


def test_biases_in_adapters_are_left_and_those_of_bases_trained():
    model = nn.Sequential(LoRALinear(nn.Linear(8, 8), 2, lora_bias=True), BottleneckAdapter(8, 2, norm="pre"))
    assert list(attach(model, "bitfit")) == ["0.base.bias"]
    y = model(torch.randn(3, 8))
    y.sum().backward()
    assert torch.equal(model[0].base.bias.grad, torch.full((8,), 3.0)) and model[0].lora_A.weight.grad is None
    assert set(freeze_except(model, ("bitfit", "lora"))) == {
        "0.base.bias", "0.lora_A.weight", "0.lora_B.weight", "0.lora_B.bias",
    }  # fmt: skip


def test_biases_of_hugging_face():
    hf = pytest.importorskip("transformers", reason="transformers is not installed (pip install fastadapt[peers])")
    gpt2 = hf.GPT2Model(hf.GPT2Config(vocab_size=9, n_embd=8, n_head=2, n_layer=1))
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    assert list(train_biases(gpt2)) == [*(f"h.0.{part}.bias" for part in parts), "ln_f.bias"]
    t5 = hf.T5EncoderModel(hf.T5Config(vocab_size=9, d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1))
    with pytest.raises(ValueError, match="model must have biases for the kind 'bitfit', got none in T5EncoderModel"):
        train_biases(t5)
    assert all(p.requires_grad for p in t5.parameters())


def test_bad_input():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"which has no 'query' but \* \(Linear\)"):
        train_biases(model, targets="query")
    with pytest.raises(ValueError, match="kinds must be types of modules or some of .*'bitfit'.*, got 'biases'"):
        freeze_except(model, "biases")
    assert model[0].weight.requires_grad


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 99_136), ({"bias": False}, 98_304), ({"norm": "pre"}, 99_136 + 2 * 768), ({"scale": "channel"}, 99_136 + 768)],
    ids=str,
)
def test_counts_of_a_bottleneck(options, count):
    adapter = BottleneckAdapter(768, 64, **options, device="meta")
    assert trainable_parameters(adapter).trainable == count
    if not options:
        assert count - adapter.up.bias.numel() == 98_368


def test_table():
    d, r = 16, 4
    layer = nn.TransformerEncoderLayer(d, 2, 32, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2), "head": nn.Linear(d, 3)})
    frozen = sum(p.numel() for p in model["encoder"].parameters())
    attach(model, "compacter", r=4, n=2)
    attach(model, "lora", targets="linear1", r=r)
    attach(model, "bank", targets="norm1", g=3, r=r)
    freeze_except(model, ("compacter", "lora"))
    model["head"].requires_grad_(True)
    compacter = 4 * (2 * (2 * 8 + 2 * 2) + 4 + 16) + 2**3  # s and t of both projections, the biases, and one rule
    table = trainable_parameters(model)
    rows = {row.type: row for row in table.rows}
    assert rows["CompacterAdapter"] == ("compacter", "CompacterAdapter", 4, compacter, compacter)
    assert rows["LoRALinear"] == ("lora", "LoRALinear", 2, 2 * r * (16 + 32), 2 * r * (16 + 32))
    assert rows["AdapterBank"] == ("bottleneck", "AdapterBank", 2, 2 * 3 * (2 * d * r + d + r), 0)
    assert rows["Linear"] == ("model", "Linear", 1, 51, 51)
    assert rows["frozen"].parameters == frozen and rows["frozen"].trainable == 0
    assert [row.kind for row in table.rows] == ["bottleneck", "compacter", "lora", "model", "model"]
    assert table.parameters == sum(p.numel() for p in model.parameters())
    assert table.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = str(table).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[0].split() == [
        "kind", "type", "modules", "parameters", "trainable", "share",
    ]  # fmt: skip
    share = 100 * table.trainable / table.parameters
    assert lines[-1].split()[-4:] == [f"{table.parameters:,}", f"{table.trainable:,}", f"{share:.3f}", "%"]


def test_counts_of_kinds_in_each_other():
    """An adapter after a layer with LoRA is a bottleneck's; the factors of KronA are KronA's."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(DEVICE)
    attach(model, "lora", targets="0", r=2)
    attach(model, "bottleneck", targets="0", r=2, bias=False)
    attach(model, "kron", targets="1", a_shape=(2, 2))
    assert list(freeze_except(model, "lora")) == ["0.lora_A.weight", "0.lora_B.weight"]
    freeze_except(model, ("lora", "bottleneck", "kron"))
    assert [tuple(row) for row in trainable_parameters(model).rows] == [
        ("bottleneck", "BottleneckAdapter", 1, 32, 32), ("kron", "KronALinear", 1, 20, 20), ("lora", "LoRALinear", 1, 32, 32),
        ("model", "frozen", 2, 144, 0),
    ]  # fmt: skip
