"""Train the bundled CLIP: an open_clip model of 1.5 M parameters on garments in random colours and their captions.

Symmetric cross-entropy over the *distinct* captions of a batch: with 560 captions a batch holds equal ones, and the
usual loss, whose targets are the diagonal, would push an image away from its own caption wherever that occurs twice.
Image to text has one target; text to image is spread evenly over the images of that caption.

The folder loads without fastdiff: ``open_clip.create_model_and_transforms("local-dir:fastdiff/assets/fashion-clip")``.

python trainers/fashion_clip.py --output fastdiff/assets/fashion-clip --minutes 8
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.data.fashion import Coloured, captions, save_tokenizer, vocabulary

PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


def config() -> dict[str, Any]:
    """A residual image tower for 32x32 pixels, a text tower over the world's vocabulary, 64 numbers each."""
    vision = {"image_size": 32, "layers": [1, 2, 2, 1], "width": 16, "head_width": 32}
    text: dict[str, Any] = {
        "context_length": 16,
        "vocab_size": len(vocabulary()[0]),
        "width": 64,
        "heads": 4,
        "layers": 2,
    }
    text |= {"hf_tokenizer_name": "local", "tokenizer_kwargs": {"clean": "lower"}}
    return {"model_cfg": {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": PREPROCESS}


def new_model() -> open_clip.CLIP:
    arguments = json.loads(json.dumps(config()["model_cfg"]))
    return open_clip.CLIP(**arguments)


def loss_of_distinct_captions(image: Tensor, text: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """Unit features of images [B, E] and of their U distinct captions [U, E]; ``index`` [B] says whose is which."""
    logits = scale * image @ text.T
    own = F.one_hot(index, len(text)).to(logits.dtype)
    to_text = F.cross_entropy(logits, index)
    to_image = F.cross_entropy(logits.T, (own / own.sum(0)).T)
    return (to_text + to_image) / 2


def save(model: open_clip.CLIP, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "open_clip_config.json").write_text(json.dumps(config(), indent=2))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, output / "open_clip_model.safetensors")
    save_tokenizer(output)


@torch.inference_mode()
def retrieval(model: open_clip.CLIP, images: Tensor, index: Tensor, tokens: Tensor) -> tuple[float, float]:
    """Share of images whose own caption scores highest of all 560, and mean cosine with it."""
    text = model.encode_text(tokens, normalize=True)
    cosine = torch.cat([model.encode_image(2 * x - 1, normalize=True) @ text.T for x in images.split(500)])
    right = (cosine.argmax(1) == index).float().mean().item()
    return right, cosine.gather(1, index[:, None]).mean().item()


def main(
    output: Path = Path("fastdiff/assets/fashion-clip"),
    minutes: float = 8,
    batch_size: int = 128,
    lr: float = 2e-3,
    warmup: int = 100,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data, test = Coloured("train"), Coloured("t10k")
    model = new_model()
    save(model, output)
    every = captions()
    number = {text: i for i, text in enumerate(every)}
    tokens = open_clip.get_tokenizer(f"local-dir:{output}")(every)
    images, _, texts = test.pick(torch.arange(2000), torch.Generator().manual_seed(1))
    held_out = images, torch.tensor([number[t] for t in texts]), tokens
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)

    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    start, step = time.time(), 0
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, 1) * max(1 - progress, 0.0)
        images, _, texts = data.batch(batch_size, generator)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        distinct, index = torch.tensor([number[t] for t in texts]).unique(return_inverse=True)
        image = model.encode_image(2 * images.roll(shift, dims=(2, 3)) - 1, normalize=True)
        text = model.encode_text(tokens[distinct], normalize=True)
        loss = loss_of_distinct_captions(image, text, index, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        step += 1
        if step % 100 == 0:
            print(
                f"{step:6d} {progress:5.2f} loss {loss.item():.3f} scale {model.logit_scale.exp().item():.1f}",
                flush=True,
            )
    right, cosine = retrieval(model.eval(), *held_out)
    save(model, output)
    print(f"held-out: own caption first of 560 in {right:.4f}, mean cosine {cosine:.3f}; saved in {output}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
