"""Train the feature network of FD[fashion]: ten garments, whatever their colours.

python trainers/fashion_classifier.py --output runs/fashion-classifier.safetensors --epochs 8
python trainers/fashion_classifier.py --init runs/fashion-classifier.safetensors --epochs 9 --lr 2e-3 --seed 1
"""

from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file, save_file

from fastdiff.data.fashion import Coloured
from fastdiff.eval.classifier import WEIGHTS, FashionClassifier, accuracy


def main(
    output: Path = WEIGHTS,
    init: Path | None = None,
    epochs: int = 8,
    batch_size: int = 128,
    lr: float = 4e-3,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data, test = Coloured("train"), Coloured("t10k")
    network = FashionClassifier()
    if init:
        network.load_state_dict(load_file(init))
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.02)
    steps = len(data) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    held_out = test.pick(torch.arange(len(test)), torch.Generator().manual_seed(1))
    for epoch in range(epochs):
        network.train()
        for index in torch.randperm(len(data), generator=generator)[: steps * batch_size].split(batch_size):
            images, labels, _ = data.pick(index, generator)
            shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
            images = images.roll(shift, dims=(2, 3))
            loss = torch.nn.functional.cross_entropy(network(images), labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(
            f"epoch {epoch + 1} loss {loss.item():.3f} held-out accuracy {accuracy(network.eval(), *held_out[:2]):.4f}",
            flush=True,
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, output)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
