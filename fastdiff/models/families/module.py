"""A user's own ``nn.Module`` as a teacher, and with it a law in closed form, whose network only gives the student its start.

The module is called ``module(x_t, network_time, cond)`` and puts out a tensor like x_t. Conditions are class labels by default:
prompts are the numbers 0..n-1 as text, and ``""`` is -1, the label that means no condition.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastdiff.diffusion.prediction import PREDICTION_TYPES
from fastdiff.diffusion.process import NoiseProcess
from fastdiff.errors import UserError
from fastdiff.models.denoiser import Network
from fastdiff.models.discriminator import VectorHead
from fastdiff.models.families.base import Family


class Module(Family):
    """See ``Teacher.from_module``."""

    def __init__(
        self,
        module: nn.Module,
        process: NoiseProcess,
        prediction_type: str,
        shape: Sequence[int],
        *,
        encode: Callable[[list[str]], Any] | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        lora_targets: Sequence[str] = (),
        call: Callable[[nn.Module, Tensor, Tensor, Any], Tensor] | None = None,
        time_embedding: tuple[str, int] | None = None,
        bottleneck: tuple[str, int] | None = None,
        blocks: Sequence[tuple[str, int]] = (),
    ) -> None:
        self.module, self._process, self._shape = module, (process, prediction_type), tuple(shape)
        if prediction_type not in PREDICTION_TYPES:
            raise UserError(f"prediction_type is {prediction_type!r}: expected one of {', '.join(PREDICTION_TYPES)}.")
        self._encode, self._decode, self._call = encode, decode, call
        self._time_embedding, self._bottleneck, self._blocks = time_embedding, bottleneck, tuple(blocks)
        self.lora_targets = tuple(lora_targets) or _linear_layers(module)

    @property
    def backbone(self) -> nn.Module:
        return self.module

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self._shape

    def process(self) -> tuple[NoiseProcess, str]:
        return self._process

    def network(self, backbone: nn.Module) -> Network:
        if self._call is None:
            return backbone
        call = self._call
        return lambda x_t, t, cond: call(backbone, x_t, t, cond)

    def time_embedding(self, backbone: nn.Module) -> tuple[nn.Module, int]:
        if self._time_embedding is None:
            return super().time_embedding(backbone)
        name, width = self._time_embedding
        return backbone.get_submodule(name), width

    def bottleneck(self, backbone: nn.Module) -> nn.Module:
        return super().bottleneck(backbone) if self._bottleneck is None else backbone.get_submodule(self._bottleneck[0])

    def head(self) -> nn.Module:
        return super().head() if self._bottleneck is None else VectorHead(self._bottleneck[1])

    def guidance_embedding(self) -> Callable[[nn.Module], nn.Module]:
        """The module's own ``with_guidance_embedding()``, as ``TimeMLP`` has it; a module without such a method has none."""
        if not hasattr(self.module, "with_guidance_embedding"):
            return super().guidance_embedding()
        return lambda backbone: backbone.with_guidance_embedding()  # type: ignore[operator]

    def blocks(self, backbone: nn.Module) -> list[nn.Module]:
        return [backbone.get_submodule(name) for name, _ in self._blocks] or super().blocks(backbone)

    def block_heads(self) -> list[nn.Module]:
        return [VectorHead(width) for _, width in self._blocks] or super().block_heads()

    def encode(self, prompts: list[str]) -> Any:
        if self._encode is not None:
            return self._encode(prompts)
        try:
            labels = [int(prompt) if prompt else -1 for prompt in prompts]
        except ValueError as error:
            raise UserError(
                f"{error}: a module's prompts are class labels as text. For captions pass encode=, which makes a condition of them."
            ) from error
        return torch.tensor(labels, device=next(self.module.parameters()).device)

    def decode(self, latents: Tensor) -> Tensor:
        return latents if self._decode is None else self._decode(latents)


def _linear_layers(module: nn.Module) -> tuple[str, ...]:
    """All but the output layer of ``nn.MultiheadAttention``, whose weights are read past any adapter."""
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    return tuple(name for name, layer in layers if not isinstance(layer, NonDynamicallyQuantizableLinear))
