import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdiff.errors import UserError
from fastdiff.eval.clip import ClipScore
from fastdiff.eval.encoders import classifier, dinov2, hf_classifier, huggingface_clip, open_clip_model, resample_positions
from fastdiff.eval.preprocess import Preprocess


def images(n: int = 2, side: int = 40) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))


def normal(levels: torch.Tensor, mean, std) -> torch.Tensor:
    return (levels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def test_dinov2_takes_metas_file_and_metas_position_embedding(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    whole = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0, img_size=70)  # 5x5 patches
    nn.init.normal_(whole.pos_embed)
    for name, value in whole.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(value)  # at 1e-5 the class token would hear nothing of the patches
    torch.save({"mask_token": torch.zeros(1, 384), **whole.state_dict()}, tmp_path / "dinov2_vits14_pretrain.pth")
    extractor = dinov2("vits14", weights=tmp_path, size=42)  # 3x3 patches
    x = images()
    grid = whole.pos_embed[:, 1:].reshape(1, 5, 5, 384).permute(0, 3, 1, 2)
    positions = F.interpolate(grid, scale_factor=(3.1 / 5, 3.1 / 5), mode="bicubic").flatten(2).transpose(1, 2)
    small = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0, img_size=42).eval()
    state = {**whole.state_dict(), "pos_embed": torch.cat([whole.pos_embed[:, :1], positions], 1)}
    small.load_state_dict(state)
    prepared = normal(Preprocess("pil-bicubic")(x, (42, 42)), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.inference_mode():
        expected = small.forward_features(prepared)[:, 0]
    torch.testing.assert_close(extractor(x), expected, rtol=1e-4, atol=1e-5)
    assert extractor.label.startswith("FD[dinov2-vits14-42#")
    timms = timm.layers.resample_abs_pos_embed(whole.pos_embed, (3, 3))
    assert (timms - state["pos_embed"]).abs().max() > 0.1  # timm's antialiased embedding is another network
    torch.save({"x": torch.zeros(1)}, tmp_path / "dinov2_vits14_pretrain.pth")
    with pytest.raises(UserError, match="holds no DINOv2 vits14"):
        dinov2("vits14", weights=tmp_path, size=42)


def test_positions_of_the_trained_size_stay_themselves():
    embedding = torch.randn(1, 17, 8)
    assert resample_positions(embedding, 4) is embedding


def test_open_clip_embeddings_are_those_of_the_clip_score(clip_folder):
    extractor, score, x = open_clip_model(clip_folder), ClipScore(clip_folder), images(side=32)
    with torch.inference_mode():
        expected = score.model.encode_image(score.prepare((255 * x).round() / 255), normalize=True)
        raw = score.model.encode_image(score.prepare((255 * x).round() / 255))
    torch.testing.assert_close(extractor(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(extractor(x).norm(dim=1), torch.ones(2))
    unscaled = open_clip_model(clip_folder, unit=False)
    torch.testing.assert_close(unscaled(x), raw, rtol=1e-4, atol=1e-5)
    assert unscaled.id != extractor.id
    module = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")[0]
    torch.testing.assert_close(open_clip_model(module)(x), extractor(x))


def preprocessor(folder, side: int) -> None:
    config = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3], "size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_hugging_face_folders_give_their_projected_embedding(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    configs = {"text_config": {**size, "vocab_size": 30}, "vision_config": {**size, "image_size": 24, "patch_size": 8}}
    config = getattr(transformers, f"{family}Config")(**configs, **({"projection_dim": 12} if family == "CLIP" else {}))
    model = getattr(transformers, f"{family}Model")(config).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no preprocessor_config\.json"):
        huggingface_clip(tmp_path)
    preprocessor(tmp_path, 24)
    x = images()
    prepared = normal(Preprocess("torch-bicubic")(x, (24, 24)), [0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
    with torch.inference_mode():
        pooled = model.vision_model(pixel_values=prepared).pooler_output
        expected = F.normalize(model.visual_projection(pooled) if family == "CLIP" else pooled, dim=1)
    torch.testing.assert_close(huggingface_clip(tmp_path)(x), expected, rtol=1e-4, atol=1e-5)


def test_a_transformers_classifier_gives_what_enters_its_head(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=24, patch_size=8, num_labels=7
    )
    model = transformers.ViTForImageClassification(config).eval()
    nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path)
    preprocessor(tmp_path, 24)
    pool, logits = hf_classifier(tmp_path), hf_classifier(tmp_path, layer="logits")
    assert (pool.dim, logits.dim) == (16, 7)
    x = images()
    with torch.inference_mode():
        torch.testing.assert_close(model.classifier(pool(x)), logits(x), rtol=1e-4, atol=1e-5)
    prepared = normal(Preprocess("torch-bicubic")(x, (24, 24)), [0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
    torch.testing.assert_close(logits(x), model(prepared).logits.detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="no image embedding"):
        huggingface_clip(tmp_path)


def test_a_timm_classifier_gives_its_pre_logits():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained=False, num_classes=5).eval()
    extractor, x = classifier(model, name="mine", size=48), images()
    prepared = normal(Preprocess("torch-bicubic")(x, (48, 48)), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(prepared), pre_logits=True)
    torch.testing.assert_close(extractor(x), expected, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_not_called_is_named():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.used(x.mean(dim=(2, 3)))

    with pytest.raises(UserError, match="was not called once an image"):
        classifier(Bare(), name="bare", size=8)
    assert classifier(Bare(), name="bare", size=8, head="used").dim == 3
    with pytest.raises(UserError, match="no module 'head' for a head"):
        classifier(nn.Conv2d(3, 3, 1), name="conv", size=8, head="head")
