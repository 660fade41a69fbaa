"""How far a backbone's parameters are from the head, counted in layers as timm counts them."""

from __future__ import annotations

from timm.models import group_parameters
from torch import nn

__all__ = ["layers_to_head"]


def layers_to_head(net: nn.Module, classifier: nn.Module) -> dict[str, int]:
    """For every parameter of a feature network, by name, the layers from it to the classifier's last.

    timm's feature networks have other names and lack the grouping of layers that the classifiers bring along
    (``group_matcher``: a stem, block after block, the last layer). So the classifier is asked, and its names are
    matched as its weights are: a feature network only joins them by other marks, and puts one word before them.

    The last block is 1 away; at 0 is what timm takes together with the classifier, such as a last norm.

    Args:
        net: As of ``features_only``.
        classifier: The whole network of that name in timm, with a last layer.

    Raises:
        ValueError: A classifier that groups nothing, or a parameter that it does not have.
    """
    matcher = getattr(classifier, "group_matcher", None)
    if matcher is None:
        raise ValueError("timm does not say which layers this network has")
    ids = group_parameters(classifier, matcher(coarse=False), reverse=True)
    last = max(ids.values())
    away = {name.replace(".", "_"): last - i for name, i in ids.items()}
    layers: dict[str, int] = {}
    for name, _ in net.named_parameters():
        key = name.removeprefix("model.").replace(".", "_")
        if key not in away:
            raise ValueError(f"timm does not say which layer its {name} is in")
        layers[name] = away[key]
    return layers
