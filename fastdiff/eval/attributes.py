"""Does a garment have the class and the two colours its caption asks for? The small counterpart of GenEval.

A picture of the world is ``background + g (foreground - background)`` with g in [0, 1], so all its pixels lie on the
segment between two of the eight colours. The background is read from the border, which the padding keeps free; the
foreground is the colour whose segment from the background lies nearest to all pixels in the least-squares sense. No
pixel need be close to the foreground colour (a dark photograph has none), which is why the nearest colour of the
brightest pixels is wrong on 5 % of real images and the segment on none. The class is the classifier's.
"""

import torch
from torch import Tensor, nn

from fastdiff.data.fashion import palette, parse
from fastdiff.eval.stats import Score

BORDER = 2  # pixels of padding around the 28x28 photograph


def background_colour(images: Tensor) -> Tensor:
    """Index [B] of the colour nearest to the mean of the two outermost pixels all around ``images`` [B, 3, H, W]."""
    inside = images[:, :, BORDER:-BORDER, BORDER:-BORDER]
    pixels = images[0, 0].numel() - inside[0, 0].numel()
    border = (images.sum(dim=(2, 3)) - inside.sum(dim=(2, 3))) / pixels
    return torch.cdist(border, palette().to(border)).argmin(dim=1)


def segment_distance(images: Tensor, background: Tensor) -> Tensor:
    """Mean squared distance of all pixels to the segment from the background to each colour.

    Args:
        images: RGB [B, 3, H, W] in [0, 1].
        background: colour indices [B].

    Returns:
        [B, 8] in squared RGB units; infinite at the background itself, whose segment is a point.
    """
    colours = palette().to(images)
    start = colours[background]
    pixels = images.flatten(2) - start[..., None]
    direction = colours - start[:, None]
    length = direction.square().sum(dim=2, keepdim=True)
    along = torch.einsum("bkc,bcp->bkp", direction, pixels)
    g = (along / length.clamp(min=1e-12)).clamp(0, 1)
    squared = pixels.square().sum(dim=1, keepdim=True) - 2 * g * along + g.square() * length
    return squared.mean(dim=2).masked_fill(length[..., 0] == 0, torch.inf)


def foreground_colour(images: Tensor, background: Tensor) -> Tensor:
    """Index [B] of the colour whose segment from the background fits the pixels best."""
    return segment_distance(images, background).argmin(dim=1)


@torch.inference_mode()
def attributes(images: Tensor, classifier: nn.Module, *, batch_size: int = 250) -> tuple[Tensor, Tensor, Tensor]:
    """Garment, foreground and background of ``images`` [B, 3, 32, 32] in [0, 1], as index tensors [B].

    ``classifier`` gives garment logits [B, 10]; the order of the indices is that of ``GARMENTS`` and ``COLOURS``.
    """
    found = []
    for part in images.split(batch_size):
        background = background_colour(part)
        found.append((classifier(part).argmax(dim=1), foreground_colour(part, background), background))
    garment, foreground, background = (torch.cat(column) for column in zip(*found, strict=True))
    return garment, foreground, background


def attribute_score(images: Tensor, captions: list[str], classifier: nn.Module) -> Score:
    """Share of images whose garment and both colours are those of the caption, with its standard error.

    ``ValueError`` for captions that are not of the world, or when their number is not that of the images.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images and {len(captions)} captions: expected one caption an image.")
    asked = [parse(caption) for caption in captions]
    wanted = torch.tensor([(a.garment, a.foreground, a.background) for a in asked])
    found = torch.stack(attributes(images, classifier), dim=1).cpu()
    return Score.of((found == wanted).all(dim=1))
