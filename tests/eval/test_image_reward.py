import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertTokenizer

from fastdiff.errors import UserError
from fastdiff.eval.image_reward import MEAN, SD, ImageReward


def drawn(n: int) -> Tensor:
    return torch.rand(n, 3, 40, 40, generator=torch.Generator().manual_seed(0))


def blip_state() -> dict[str, Tensor]:
    """Random weights under the names of the published file: two blocks of ViT (128 wide) and of BERT (64 wide)."""
    generator = torch.Generator().manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, 128),
        "blip.visual_encoder.pos_embed": (1, 5, 128),
        "blip.visual_encoder.patch_embed.proj.weight": (128, 3, 16, 16),
        "blip.text_encoder.embeddings.word_embeddings.weight": (12, 64),
        "blip.text_encoder.embeddings.position_embeddings.weight": (40, 64),
    }
    linear = {"blip.visual_encoder.norm": (128,), "blip.text_encoder.embeddings.LayerNorm": (64,)}
    linear |= {"mlp.layers.0": (8, 64), "mlp.layers.2": (1, 8), "blip.vision_proj": (4, 128)}
    for i in range(2):
        block, layer = f"blip.visual_encoder.blocks.{i}", f"blip.text_encoder.encoder.layer.{i}"
        linear |= {f"{block}.norm1": (128,), f"{block}.norm2": (128,), f"{block}.attn.qkv": (384, 128)}
        linear |= {f"{block}.attn.proj": (128, 128), f"{block}.mlp.fc1": (96, 128), f"{block}.mlp.fc2": (128, 96)}
        for kind, seen in (("attention", 64), ("crossattention", 128)):
            linear |= {f"{layer}.{kind}.self.query": (64, 64), f"{layer}.{kind}.self.key": (64, seen)}
            linear |= {f"{layer}.{kind}.self.value": (64, seen), f"{layer}.{kind}.output.dense": (64, 64)}
            linear |= {f"{layer}.{kind}.output.LayerNorm": (64,)}
        linear |= {f"{layer}.intermediate.dense": (80, 64), f"{layer}.output.dense": (64, 80), f"{layer}.output.LayerNorm": (64,)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes["blip.visual_encoder.patch_embed.proj.bias"] = (128,)
    state = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**state, "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}


@pytest.fixture(scope="module")
def reward_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    torch.save(blip_state(), folder / "ImageReward.pt")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red black boot dress on white"
    (folder / "vocab.txt").write_text("\n".join(words.split()) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    return folder


@pytest.fixture
def reward(reward_files):
    return ImageReward(reward_files, tokenizer=reward_files / "bert")


def blip_by_hand(state: dict[str, Tensor], pixels: Tensor, ids: Tensor) -> Tensor:
    """The published network in plain torch, for one image and unpadded token ids [L]."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = [
            (x[:, i : i + 64], y[:, i : i + 64], z[:, i : i + 64]) for x, y, z in [(q, k, v)] for i in range(0, q.shape[1], 64)
        ]
        return torch.cat([((x @ y.T) / 8).softmax(dim=1) @ z for x, y, z in heads], dim=1)

    eye, words = "blip.visual_encoder", "blip.text_encoder"
    patches = F.conv2d(pixels[None], state[f"{eye}.patch_embed.proj.weight"], state[f"{eye}.patch_embed.proj.bias"], stride=16)
    x = torch.cat([state[f"{eye}.cls_token"][0], patches[0].flatten(1).T]) + state[f"{eye}.pos_embed"][0]
    for i in range(2):
        block = f"{eye}.blocks.{i}"
        x = x + linear(attend(*linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, dim=1)), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    seen = norm(x, f"{eye}.norm", 1e-6)
    h = state[f"{words}.embeddings.word_embeddings.weight"][ids]
    h = h + state[f"{words}.embeddings.position_embeddings.weight"][: len(ids)]
    h = norm(h, f"{words}.embeddings.LayerNorm", 1e-12)
    for i in range(2):
        layer = f"{words}.encoder.layer.{i}"
        for kind in ("attention", "crossattention"):
            source, part = (h if kind == "attention" else seen), f"{layer}.{kind}"
            found = attend(linear(h, f"{part}.self.query"), *(linear(source, f"{part}.self.{n}") for n in ("key", "value")))
            h = norm(h + linear(found, f"{part}.output.dense"), f"{part}.output.LayerNorm", 1e-12)
        wide = F.gelu(linear(h, f"{layer}.intermediate.dense"))
        h = norm(h + linear(wide, f"{layer}.output.dense"), f"{layer}.output.LayerNorm", 1e-12)
    return (linear(linear(h[0], "mlp.layers.0"), "mlp.layers.2")[0] - MEAN) / SD


def test_imagereward_is_the_published_network_in_plain_torch(reward):
    state, images = blip_state(), drawn(3)
    captions = {"a red boot": [2, 5, 6, 8, 3], "black dress on white boot": [2, 7, 9, 10, 11, 8, 3], "blue": [2, 1, 3]}
    found = reward(images, list(captions))
    pixels = reward.prepare(images)
    expected = [blip_by_hand(state, x, torch.tensor(ids)) for x, ids in zip(pixels, captions.values(), strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert found.std() > 0.01


def test_imagereward_reads_35_tokens_and_no_more(reward):
    image, words = drawn(1), "boot " * 33
    assert reward(image, [words + "red"]).equal(reward(image, [words + "white"]))  # [CLS], 33 words, [SEP]
    assert not reward(image, ["boot " * 32 + "red"]).equal(reward(image, ["boot " * 32 + "white"]))


@pytest.mark.parametrize("missing", ["blip.visual_encoder.blocks.1.attn.qkv.weight", "blip.text_encoder.embeddings.LayerNorm.bias"])
def test_imagereward_does_not_run_on_half_of_its_weights(reward_files, tmp_path, missing):
    state = {key: value for key, value in blip_state().items() if key != missing}
    torch.save(state, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match="holds no ImageReward weights"):
        ImageReward(tmp_path, tokenizer=reward_files / "bert")


def test_batches_and_padding_do_not_matter_and_autocast_does_not_reach_it(reward):
    images, captions = drawn(64), ["a red boot", "black dress on white boot", "boot", "a a a a a white dress"] * 16
    alone = reward(images, captions, batch_size=1)
    assert alone.std() > 1e-3
    torch.testing.assert_close(reward(images, captions, batch_size=64), alone, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert reward(images, captions, batch_size=1).equal(alone)
