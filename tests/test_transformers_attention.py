"""Prefixes in models of Hugging Face against the same models with the prefix in a cache, or concatenated in every layer."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastadapt.nn import freeze_except

from .accuracy import assert_within_reference_error
from .battery import DEVICE

transformers = pytest.importorskip("transformers", reason="the library transformers is not installed")

from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache  # noqa: E402
from transformers.masking_utils import eager_mask  # noqa: E402

from fastadapt.integrations.transformers import (  # noqa: E402
    add_prefix,
    attention,
    attention_layers,
    clear_prefix,
    mask,
    remove_prefix,
    set_prefix,
)

P, B, T, VOCABULARY, PAD = 3, 3, 6, 40, 0
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 11, 12, 13, 14], [0, 0, 0, 0, 15, 16]])
LEFT, RIGHT = IDS.ne(PAD).long(), IDS.flip(1).ne(PAD).long()
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY, "pad_token_id": PAD}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(intermediate_size=48, num_key_value_heads=2, head_dim=16, **SIZES),
    "gpt2": lambda: transformers.GPT2Config(n_positions=32, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, **SIZES),
    "mistral": lambda: transformers.MistralConfig(intermediate_size=48, num_key_value_heads=1, sliding_window=3, **SIZES),
}
over_decoders = pytest.mark.parametrize("name", CONFIGS)


def concatenation(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """What ``attn_implementation="fastadapt"`` stands for, with everything there is to see in one mask."""
    prefix = getattr(module, "fastadapt_prefix", None)
    b, t, t_k = len(query), query.shape[2], key.shape[2]
    attend = lambda *args, mask: F.scaled_dot_product_attention(  # noqa: E731
        *args, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    attention_mask = query.new_zeros(b, 1, t, t_k) if attention_mask is None else attention_mask[..., :t_k]
    if prefix is None:
        return attend(query, key, value, mask=attention_mask).transpose(1, 2), None
    ids = torch.arange(b) if prefix.adapter_ids is None else prefix.adapter_ids
    bank = [t.to(query.dtype) for t in (prefix.key, prefix.value)]
    bank = [t.expand(b, -1, -1, -1) if t.dim() == 3 else t[ids] for t in bank]
    attention_mask = attention_mask.expand(b, -1, t, -1)
    if prefix.gate is None:
        both = (torch.cat([p, own], 2) for p, own in zip(bank, (key, value)))
        y = attend(query, *both, mask=F.pad(attention_mask, (bank[0].shape[2], 0)))
    else:
        y = attend(query, key, value, mask=attention_mask) + prefix.gate[:, None, None] * attend(query, *bank, mask=None)
    return y.transpose(1, 2), None


AttentionInterface.register("concatenation", concatenation)
AttentionMaskInterface.register("concatenation", eager_mask)


def decoder(name, implementation="fastadapt"):
    config = CONFIGS[name]()
    cls = transformers.AutoModelForCausalLM
    model = cls.from_config(config, attn_implementation=implementation).to(DEVICE, torch.float64).eval()
    with torch.no_grad():  # far enough from uniform attention
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * (0.3 if p.dim() > 1 else 0.5) + (p.dim() == 1))
    return model


def rand(*shape):
    return torch.randn(shape, dtype=torch.float64, device=DEVICE)


def on_device(*tensors):
    return [t.to(DEVICE) for t in tensors]


def assert_same(fast, slow, parameters):
    """Losses or outputs, and the gradients of ``parameters``, in float64: the two round in places of their own."""
    results, parameters = [], list(parameters)
    for call in (fast, slow):
        y = call()
        results.append([y, *torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def switched(model, implementation, call):
    """``call`` with the model switched to another attention."""

    def run():
        before = model.config._attn_implementation
        model.set_attn_implementation(implementation)
        y = call()
        model.set_attn_implementation(before)
        return y

    return run


@pytest.mark.parametrize("padding", [None, LEFT, RIGHT], ids=["full", "left", "right"])
@over_decoders
def test_without_a_prefix_a_model_is_what_it_was(name, padding):
    model, (ids,) = decoder(name), on_device(IDS)
    seen = torch.ones_like(ids, dtype=torch.bool) if padding is None else padding.to(DEVICE).bool()

    def call():  # with a cache, as by default: so positions alone don't make a mask
        return model(ids, attention_mask=None if padding is None else padding.to(DEVICE)).logits[seen]

    assert_same(call, switched(model, "sdpa", call), model.parameters())


@over_decoders
def test_a_static_cache(name):
    """Its keys go on after the last query, also in the first call; there is no padding, with a mask that says so or without."""
    model, (ids,) = decoder(name), on_device(IDS)
    expected = model(ids, use_cache=False).logits
    for seen in (None, torch.ones_like(ids)):
        cache = StaticCache(model.config, max_cache_len=T + 3)
        for start, end in ((0, 3), (3, 5), (5, T)):
            options = {} if seen is None else {"attention_mask": seen[:, :end]}
            where = torch.arange(start, end, device=DEVICE)
            y = model(ids[:, start:end], past_key_values=cache, cache_position=where, **options).logits
            torch.testing.assert_close(y, expected[:, start:end])


def in_a_cache(model, encoder, ids, padding, **kwargs):
    """A call of ``model`` without hooks, where the prefix is the past of every sequence."""
    cache = DynamicCache()
    for i, prefix in enumerate(encoder()):
        cache.update(*(t.expand(len(ids), -1, -1, -1) for t in prefix[:2]), i)
    padding = torch.cat([padding.new_ones(len(ids), P), padding], 1)
    positions = torch.arange(P, P + ids.shape[1], device=DEVICE).expand(len(ids), -1)
    return model(ids, attention_mask=padding, past_key_values=cache, position_ids=positions, **kwargs)


@pytest.mark.parametrize("hidden", [None, 8], ids=["direct", "mlp"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prefix_tuning_is_a_prefix_in_the_cache(name, hidden):
    """With the positions of peft: those of the tokens begin at p."""
    model = decoder(name)
    plain, (ids, padding) = copy.deepcopy(model), on_device(IDS, LEFT)
    encoder = add_prefix(model, P, hidden=hidden)
    plain.set_attn_implementation("sdpa")
    plain.load_state_dict(model.state_dict(), strict=False)
    seen = padding.bool()
    trained = freeze_except(model, "prefix")
    assert trained and all(name.startswith("prefix_encoder.") for name in trained)

    def slow():
        return in_a_cache(plain, encoder, ids, padding).logits[seen]

    assert_same(lambda: model(ids, attention_mask=padding).logits[seen], slow, trained.values())
    call = {"input_ids": ids, "attention_mask": padding, "position_ids": torch.arange(T, device=DEVICE)[None]}
    assert_same(lambda: model(**call).logits[seen], slow, trained.values())


def encoder_model(name="Splinter"):
    config = getattr(transformers, f"{name}Config")(intermediate_size=48, **SIZES)
    return getattr(transformers, f"{name}Model")(config).to(DEVICE, torch.float64).eval()


@pytest.mark.parametrize("gate", [None, "per_head", "scalar"])
@pytest.mark.parametrize("name", ["llama", "mistral", "Splinter", "Bert"])
def test_prefixes_are_concatenation_in_every_layer(name, gate):
    model, (ids, padding) = decoder(name) if name in CONFIGS else encoder_model(name), on_device(IDS, LEFT)
    if not attention_layers(model):
        pytest.skip(f"{name} has attention code of its own before transformers 5")
    encoder = add_prefix(model, P, gate=gate)
    with torch.no_grad():
        for p in encoder.parameters():
            p.normal_()
    seen, trained = padding.bool(), freeze_except(model, "prefix")

    def call():
        output = model(ids, attention_mask=padding)
        return (output.logits if name in CONFIGS else output.last_hidden_state)[seen]

    assert_same(call, switched(model, "concatenation", call), trained.values())


def test_one_layer_with_a_prefix_for_every_row():
    """``set_prefix`` with a bank, on one layer, beside none on the other."""
    model, (ids, adapter_ids) = decoder("llama"), on_device(IDS, torch.tensor([1, 0, 1]))
    key, value = rand(2, 2, 2, P, 16).requires_grad_()
    set_prefix(attention_layers(model)[1], key, value, adapter_ids=adapter_ids)
    call = lambda: model(ids, attention_mask=torch.ones_like(ids)).logits  # noqa: E731
    assert_same(call, switched(model, "concatenation", call), [key, value])
    with_prefix = call()
    clear_prefix(model)
    assert not torch.allclose(call(), with_prefix)
    assert_same(call, switched(model, "sdpa", call), model.parameters())


def test_llama_adapter_starts_as_the_model():
    model, (ids,) = decoder("llama"), on_device(IDS)
    before = model(ids).logits
    encoder = add_prefix(model, P, layers=attention_layers(model)[-1:], gate="per_head")
    torch.testing.assert_close(model(ids).logits, before)
    model(ids).logits.square().sum().backward()
    assert encoder.gate.shape == (1, 4) and encoder.gate.grad.abs().min() > 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("hidden", [None, 8], ids=["direct", "mlp"])
def test_activation_checkpointing(name, hidden):
    model, (ids, padding) = decoder(name).train(), on_device(IDS, LEFT)
    add_prefix(model, P, hidden=hidden)
    trained, results = freeze_except(model, "prefix"), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        y = model(ids, attention_mask=padding, use_cache=False).logits
        results.append([y, *torch.autograd.grad(y.square().sum(), list(trained.values()))])
    assert all(map(torch.equal, *results))


def test_checkpointing_repeats_the_dropout():
    model, (ids,) = decoder("llama").train(), on_device(IDS)
    add_prefix(model, P)
    for layer in attention_layers(model):
        layer.attention_dropout = 0.5
    trained, results = freeze_except(model, "prefix"), []
    for checkpointing in (False, False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(4 if results else 3)
        y = model(ids, use_cache=False).logits
        results.append([y, *torch.autograd.grad(y.square().sum(), list(trained.values()))])
    assert not torch.equal(results[0][0], results[1][0])
    assert all(map(torch.equal, results[1], results[2]))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation(name):
    """Greedy, of a batch with left padding; the logits of every step are those of a model with the prefix in its cache."""
    model, (ids, padding) = decoder(name), on_device(IDS, LEFT)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    encoder = add_prefix(model, P)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(ids, attention_mask=padding, eos_token_id=None, **options)
    tokens, logits = ids, []
    for _ in range(4):
        cache = DynamicCache()
        for i, prefix in enumerate(encoder()):
            cache.update(*(t.expand(B, -1, -1, -1) for t in prefix[:2]), i)
        seen = torch.cat([padding.new_ones(B, P), padding], 1)
        where = (padding.cumsum(1) - 1).clamp(min=0) + P
        with torch.no_grad():
            last = plain(tokens, attention_mask=seen, past_key_values=cache, position_ids=where).logits[:, -1]
        logits.append(last)
        tokens = torch.cat([tokens, last.argmax(-1, keepdim=True)], 1)
        padding = torch.cat([padding, padding.new_ones(B, 1)], 1)
    assert torch.equal(found.sequences, tokens)
    for ours, theirs in zip(found.logits, logits, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)  # generate gives float32
    encoder.flatten()
    options |= {"cache_implementation": "static", "disable_compile": True}
    static = model.generate(ids, attention_mask=LEFT.to(DEVICE), eos_token_id=None, **options)
    assert torch.equal(static.sequences, found.sequences)


def test_float32_prefix_in_a_16_bit_model():
    model, (ids, padding) = decoder("llama").bfloat16(), on_device(IDS, LEFT)
    encoder = add_prefix(model, P, hidden=8)
    call = lambda model: model(ids, attention_mask=padding).logits[padding.bool()]  # noqa: E731
    y, oracle = call(model), call(copy.deepcopy(model).double())
    assert y.dtype == torch.bfloat16
    assert_within_reference_error(y, switched(model, "concatenation", lambda: call(model))(), oracle, "logits")
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.slow
def test_compiles_without_graph_break():
    model, (ids, padding) = decoder("llama").float(), on_device(IDS, LEFT)
    encoder = add_prefix(model, P, hidden=8)
    trained = freeze_except(model, "prefix")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second time with another prefix, from the same graph
        eager, traced = (
            [y, *torch.autograd.grad(y[padding.bool()].square().sum(), list(trained.values()))]
            for y in (call(ids, attention_mask=padding, use_cache=False).logits for call in (model, compiled))
        )
        for ours, theirs in zip(traced, eager):
            torch.testing.assert_close(ours, theirs)
        with torch.no_grad():
            encoder.output.bias.add_(1.0)


def test_copies_and_pickles_have_prefixes_of_their_own():
    model, (ids,) = decoder("llama"), on_device(IDS)
    add_prefix(model, P, hidden=8)
    y = model(ids).logits  # with a graph, which no tensor could be copied with
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(ids).logits, y)
        with torch.no_grad():
            other.prefix_encoder.output.bias.add_(1.0)
        assert not torch.allclose(other(ids).logits, y) and torch.equal(model(ids).logits, y)


def test_remove_prefix():
    model, (ids,) = decoder("llama", "sdpa"), on_device(IDS)
    before, names = model(ids).logits, list(model.state_dict())
    add_prefix(model, P)
    assert model.config._attn_implementation == "fastadapt"
    assert not torch.allclose(model(ids).logits, before)
    remove_prefix(model)
    assert torch.equal(model(ids).logits, before) and list(model.state_dict()) == names
    assert model.config._attn_implementation == "sdpa"


def test_what_attention_is_given(monkeypatch):
    """No mask where nothing is hidden, one row a sequence for padding, and queries by keys only for what needs it."""
    shapes = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        shapes.append(None if attention_mask is None else tuple(attention_mask.shape))
        y, weights = attention(module, query, key, value, attention_mask, **kwargs)
        assert y.is_contiguous() and y.shape == (len(query), query.shape[2], query.shape[1], query.shape[3]) and weights is None
        return y, weights

    monkeypatch.setitem(AttentionInterface._global_mapping, "fastadapt", spy)
    ids, left = on_device(IDS, LEFT)
    for name, padding, shape in (
        ("llama", None, None), ("llama", torch.ones_like(ids), None), ("llama", left, (B, T)), ("gpt2", left, (B, T)),
        ("mistral", left, (B, 1, T, T)),
    ):  # fmt: skip
        shapes.clear()
        decoder(name)(ids, attention_mask=padding)
        assert set(shapes) == {shape}, name
    if attention_layers(bert := encoder_model("Bert")):  # since transformers 5
        bert.set_attn_implementation("fastadapt")
        for padding, shape in ((None, None), (torch.ones_like(ids), None), (left, (B, 1, 1, T))):
            shapes.clear()
            bert(ids, attention_mask=padding)
            assert set(shapes) == {shape}


def test_a_mask_of_queries_and_keys_says_everything():
    """As PyTorch's attention has it; and it may be wider than the keys."""
    q, k, layer = rand(2, 4, 3, 8), rand(2, 2, 5, 8), nn.Module()
    seen = torch.rand(2, 1, 3, 9, device=DEVICE) < 0.6
    plain = F.scaled_dot_product_attention(q, k, k, attn_mask=seen[..., :5], enable_gqa=True, scale=0.3).transpose(1, 2)
    for is_causal in (None, True, False):
        found = attention(layer, q, k, k, seen, scaling=0.3, is_causal=is_causal)[0]
        torch.testing.assert_close(found, plain)
    layer.is_causal = False
    everything = F.scaled_dot_product_attention(q, k, k, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(attention(layer, q, k, k, None)[0], everything)


def test_refuses():
    layer, (q, k) = nn.Module(), torch.randn(2, 1, 2, 4, 8)
    with pytest.raises(ValueError, match='attn_implementation="fastadapt" doesn\'t support softcap'):
        attention(layer, q, k, k, None, softcap=50.0)
    for name in ("head_mask", "position_bias"):
        with pytest.raises(ValueError, match=f"doesn't support {name}"):
            attention(layer, q, k, k, None, **{name: torch.ones(2)})
    with pytest.raises(TypeError, match=r"attention_mask must be torch.bool where it is \(b, t_k\), got torch.int64"):
        attention(layer, q, k, k, torch.ones(1, 4, dtype=torch.int64))
    assert mask(kv_length=4, attention_mask=torch.ones(1, 4, dtype=torch.bool)) is None
    with pytest.raises(ValueError, match=f"those of Linear don't in transformers {transformers.__version__}"):
        add_prefix(nn.Linear(3, 3), P)
    model = decoder("llama")
    with pytest.raises(ValueError, match="layers must be attention layers .* at least one of the 2 of LlamaForCausalLM"):
        add_prefix(model, P, layers=[model.lm_head])
    add_prefix(model, P)
    with pytest.raises(ValueError, match="model must have no prefix yet"):
        add_prefix(model, P)


@pytest.mark.parametrize("name", ["ViT", "Esm"])
def test_models_whose_positions_stay(name):
    """One takes none, the other counts from the id of padding on."""
    sizes = {k: v for k, v in SIZES.items() if k[:3] in ("hid", "num")} if name == "ViT" else {**SIZES, "mask_token_id": 1}
    config = getattr(transformers, f"{name}Config")(image_size=8, patch_size=4, intermediate_size=48, **sizes)
    model = getattr(transformers, f"{name}Model")(config).to(DEVICE, torch.float64).eval()
    with pytest.raises(ValueError, match=f"shift_positions must be False for {name}Model, which doesn't take positions"):
        add_prefix(model, P, shift_positions=True)
    trained = add_prefix(model, P).parameters()
    inputs = rand(1, 3, 8, 8) if name == "ViT" else IDS.to(DEVICE)
    call = lambda: model(inputs).last_hidden_state  # noqa: E731
    assert_same(call, switched(model, "concatenation", call), trained)
