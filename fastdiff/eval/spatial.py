"""sFID is the Frechet distance of spatial features: of where things are, not only of what is there.

The features are the first seven channels of the layer ``mixed_6/conv`` of the 2015 Inception graph, 17 x 17 x 7 = 2023
numbers, in the order height, width, channel of TensorFlow. (Nash et al., "Generating images with sparse representations",
ICML 2021, arXiv:2103.03841; layer and channels as in the evaluator of guided-diffusion.) In torchvision's names the layer is
``Mixed_6d.branch1x1``, the 1x1 branch of the third block on the 17 x 17 grid, 192 channels: so says the table by which
torch-fidelity converts the graph's weights. That the tensor of this name is the one behind the ReLU is recalled.

>>> frechet(Stats.of(spatial_features(maps), extractor="inception-2015/mixed_6"), reference)
"""

from torch import Tensor


def spatial_features(maps: Tensor, *, channels: int = 7) -> Tensor:
    """Maps [N, C, H, W] to rows [N, H W channels] of their first channels, ordered as ``mu_s`` and ``sigma_s`` of ADM's files.

    ``ValueError`` for maps that have no four axes or fewer channels.
    """
    if maps.ndim != 4 or maps.shape[1] < channels:
        raise ValueError(f"maps have shape {tuple(maps.shape)}: expected [N, C, H, W] with C >= {channels}, before pooling.")
    return maps[:, :channels].permute(0, 2, 3, 1).flatten(1)
