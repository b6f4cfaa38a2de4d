"""Strides that an argument may come in: views of the same shape; "expanded" repeats the first entry."""

import torch


def sliced(t):  # rows and columns cut out of something larger
    if t.dim() < 2:
        return torch.nn.functional.pad(t, (1, 3))[1 : t.shape[-1] + 1]
    return torch.nn.functional.pad(t, (1, 3, 2, 1))[..., 2 : t.shape[-2] + 2, 1 : t.shape[-1] + 1]


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "leading-transposed": lambda t: t.transpose(0, -2).contiguous().transpose(0, -2) if t.dim() > 2 else t,
    "sliced": sliced,
    "every-second": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "behind-others": lambda t: torch.cat([t[:1], t])[1:] if t.dim() > 1 else t,  # contiguous, but not where its memory begins
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() > 1 else t,
}
