"""Whether contestants compute the same: seen before they are timed. That it is correct is shown by the tests."""

import torch
from torch import Tensor

from .contestants import Contestant

# Relative l2 distance from plain PyTorch: enough to see that two calls compute the same thing.
SAME = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Random results are compared by means over draws. A factor of 0.9, that of dropout of 0.1 which doesn't rescale, is seen in
# the gradients, whose means over 500 elements lie within 0.02 of each other; so is a noise a quarter off, that of another rate.
DRAWS, SHARE, NOISE = 4, 0.06, 0.25


def disagreement(results: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """What differs from plain PyTorch by more than rounding, or None."""
    for name, value in results.items():
        a, b = value.double(), expected[name].double()
        distance = ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
        if not distance <= SAME[value.dtype]:
            return f"{_what(name)} differs from eager by {distance:.1e}"
    return None


def moments(draws: list[dict[str, Tensor]], exact: dict[str, Tensor]) -> dict[str, tuple[float, float, float]]:
    """Of each result: which multiple of the exact one is in it, how much else in units of that, and what rounding allows."""
    found = {}
    for name, value in exact.items():
        b = value.double().flatten()
        size = b.norm().clamp_min(1e-30)
        pairs = []
        for draw in draws:
            a = draw[name].double().flatten()
            share = a @ b / size**2
            pairs.append(torch.stack([share, (a - share * b).norm() / size]))
        found[name] = (*torch.stack(pairs).mean(0).tolist(), SAME[value.dtype])
    return found


def disagreement_of_moments(results: dict, expected: dict) -> str | None:
    """As ``disagreement``, in expectation."""
    for name, (share, noise, same) in results.items():
        other_share, other_noise, _ = expected[name]
        if not abs(share - other_share) <= SHARE:
            return f"{_what(name)} is {share:.3f} of that without randomness in the mean, and {other_share:.3f} in eager"
        if not abs(noise - other_noise) <= NOISE * other_noise + same:
            return f"{_what(name)} varies by {noise:.3f}, and by {other_noise:.3f} in eager"
    return None


def _what(name: str) -> str:
    return "output" if name == "y" else f"gradient of {name}"


class Judge:
    """Compares contestants with the first one, in expectation where ``quiet`` says what they compute without randomness."""

    def __init__(self, quiet: Contestant | None):
        self.quiet, self.exact, self.expected = quiet, None, None

    def fault(self, contestant: Contestant, grad_y: Tensor | None) -> str | None:
        if self.quiet is None:
            results, compare = contestant.results(grad_y), disagreement
        else:
            self.exact = self.exact or self.quiet.results(grad_y)
            draws = [contestant.results(grad_y) for _ in range(DRAWS)]
            results, compare = moments(draws, self.exact), disagreement_of_moments
        self.expected = self.expected or results
        return compare(results, self.expected)
