"""BitFit: biases are all that is trained."""

from torch import nn

from .freeze import freeze_except
from .structure import Targets, resolve


def train_biases(model: nn.Module, *, targets: Targets | None = None) -> dict[str, nn.Parameter]:
    """Freeze ``model`` but for its biases: those of linear layers, convolutions, recurrent layers, attention and norms.

    They are found by the types of modules; biases inside adapters aren't among them. With :func:`freeze_except`, the kind
    ``"bitfit"`` joins others, and ``extra`` names a classification head. Source: Ben Zaken et al. 2022.

    Args:
        model: any module.
        targets: train only biases of these modules and of what is in them, named as in :func:`attach`: in the paper's smaller
            variant the query projections and the first linear layers of the feed-forward blocks.

    Returns:
        The parameters that stay trainable, by their names in ``model``: what an optimizer needs.

    Raises:
        ValueError: there are no biases, or a target means no module; ``model`` is as it was.
    """
    if targets is not None:
        # Checked before anything is frozen.
        within = {p for module in resolve(model, targets).values() for p in module.parameters()}
    trained = freeze_except(model, "bitfit")
    if targets is None:
        return trained
    for parameter in trained.values():
        parameter.requires_grad_(parameter in within)
    return {name: parameter for name, parameter in trained.items() if parameter.requires_grad}
