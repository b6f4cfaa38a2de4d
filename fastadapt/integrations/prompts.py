"""Soft prompts in models of Hugging Face: prompt tuning, P-tuning."""

import inspect

import torch
from torch import nn

from ..nn.prompt import PromptEmbedding, PromptEncoder, prompt_inputs
from .transformers import by_name


def _finds_the_last_token(kind: type[nn.Module]) -> bool:
    """Whether a head of this class looks in the ids of the tokens for the last that isn't padding, and takes it alone."""
    return "pooled_logits" in inspect.unwrap(kind.forward).__code__.co_varnames


def _prompted(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A hook: the arguments of a call with the prompt in front, and with a cache that it is in already only behind it."""
    kwargs = by_name(model.forward, args, kwargs)
    prompt, past, mask = model.prompt, kwargs.get("past_key_values"), kwargs.get("attention_mask")
    kwargs.pop("cache_position", None)  # counted by the model itself, from the length of the cache
    if mask is not None and getattr(mask, "ndim", None) != 2:
        raise ValueError("attention_mask must be (b, t) with a prompt; generate makes another for a static cache")
    if past is not None and past.get_seq_length():
        tokens = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        if mask is not None and mask.shape[1] + prompt.p != past.get_seq_length() + tokens.shape[1]:
            expected = f"the prompt and the tokens before those of the call, {prompt.p} + {mask.shape[1] - tokens.shape[1]}"
            forgets = "generate forgets a prompt where it drafts tokens, fills the cache in chunks or goes on from one"
            raise ValueError(f"past_key_values must hold {expected}, got {past.get_seq_length()}; {forgets}")
        extended = prompt_inputs(prompt.p, attention_mask=mask)
        if kwargs.get("position_ids") is not None:
            extended["position_ids"] = kwargs["position_ids"] + prompt.p
        return (), kwargs | extended
    embeds, ids = kwargs.get("inputs_embeds"), kwargs.pop("input_ids", None)
    pad = model.config.get_text_config().pad_token_id if ids is not None and _finds_the_last_token(type(model)) else None
    if pad is not None and (ids[:, -1] == pad).any():
        raise ValueError(f"input_ids must have padding at the left alone, since {type(model).__name__} reads the last position")
    embeds = model.get_input_embeddings()(ids) if embeds is None else embeds
    given = {name: kwargs.get(name) for name in ("attention_mask", "position_ids", "labels")}
    labels = given["labels"]
    if labels is not None and (labels.shape != embeds.shape[:2] or labels.is_floating_point()):
        del given["labels"]  # of sequences, not of tokens
    extended = prompt_inputs(prompt.p, **given)
    types = kwargs.get("token_type_ids")
    if types is not None:
        extended["token_type_ids"] = torch.cat([types.new_zeros(types.shape[0], prompt.p), types], 1)
    for name in ("start_positions", "end_positions"):
        if kwargs.get(name) is not None:
            extended[name] = kwargs[name].clamp(min=0) + prompt.p
    return (), kwargs | extended | {"inputs_embeds": prompt(embeds)}


def add_prompt(model: nn.Module, p: int = 16, *, prompt: PromptEmbedding | PromptEncoder | None = None) -> nn.Module:
    """Put a prompt before the embedded tokens of a Hugging Face model, in training and in ``generate``.

    The prompt becomes the submodule ``prompt`` of ``model``, so that it moves, loads and is saved with it;
    :func:`fastadapt.nn.freeze_except` with ``"prompt"`` trains nothing else. The arguments of a call are those of the model
    without prompt: masks, positions, token types and labels are extended, and the positions of answers moved. Outputs have
    ``p`` positions more. What reads the first position, such as BERT's pooler, reads the prompt's, as in ``peft``; a head that
    reads the last token, such as GPT-2's for sequences, has to find it at the end: padding at the right raises.

    ``generate`` counts the positions of a cache without the prompt where it drafts tokens (an assistant, look-up in the input),
    fills the cache in chunks, has a static one or goes on from one that it returned: that raises.

    Args:
        model: one that takes ``inputs_embeds``, and isn't an encoder with a decoder.
        p: length of the prompt.
        prompt: the prompt itself, of any length; None starts one of length ``p`` from tokens drawn from the vocabulary.

    Returns:
        The prompt.

    Raises:
        ValueError: the model can't take one, or has one already.
    """
    if "inputs_embeds" not in inspect.signature(model.forward).parameters or model.config.is_encoder_decoder:
        raise ValueError(f"model must take inputs_embeds and be no encoder with a decoder, got {type(model).__name__}")
    if getattr(model, "prompt", None) is not None:
        raise ValueError("model must have no prompt yet; remove_prompt() takes one away")
    prompt = PromptEmbedding.from_vocabulary(model.get_input_embeddings(), p) if prompt is None else prompt
    if not isinstance(prompt, PromptEmbedding | PromptEncoder):
        raise TypeError(f"prompt must be a PromptEmbedding or a PromptEncoder, got {type(prompt).__name__}")
    model.prompt = prompt.train(model.training)
    model.register_forward_pre_hook(_prompted, with_kwargs=True)
    return prompt


def remove_prompt(model: nn.Module) -> None:
    """Undo :func:`add_prompt`."""
    for handle, hook in list(model._forward_pre_hooks.items()):
        if hook is _prompted:
            del model._forward_pre_hooks[handle], model._forward_pre_hooks_with_kwargs[handle], model.prompt
