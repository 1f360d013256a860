"""A student's adapter as LoRA files of their own, beside the folder it was merged into.

    pytorch_lora_weights.safetensors    diffusers:  pipeline.load_lora_weights(folder), on the teacher's pipeline
    lora_kohya.safetensors              kohya-ss names, for other programs; load_lora_weights reads it too; of UNets alone

Both hold ``A`` [r, in] and ``B`` [out, r] of each layer, whose weight becomes ``W + (alpha / r) B A``. No alpha is stored in the
first, which means alpha = r; the second stores alpha = r.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.files import aside

LORA = "pytorch_lora_weights.safetensors"
KOHYA = "lora_kohya.safetensors"

CARD = """
The adapter alone, for the teacher's own pipeline or another fine-tuned one of its kind: {files}.

```python
from diffusers import {kind}, {scheduler}
pipeline = {kind}.from_pretrained("path/to/the/teacher")
pipeline.load_lora_weights("path/to/this/folder", weight_name="{lora}")
pipeline.scheduler = {made}
pipeline("{prompt}", {call}).images[0]
```
"""
_NONE = """
The student was trained as an adapter, which is merged here: a {kind} loads no LoRA files.
"""


def export_adapter(
    pipeline: Any, adapter: Mapping[str, Tensor], folder: Path, *, scheduler: str, call: Mapping[str, Any], prompt: str
) -> None:
    """``export_lora``, and what the folder's card says of it: the scheduler to put in and the arguments of the call."""
    kind, unet = type(pipeline).__name__, hasattr(pipeline, "unet")
    text = _NONE.format(kind=kind)
    if hasattr(pipeline, "load_lora_weights"):
        files = export_lora(pipeline, adapter, folder)
        scheduler = scheduler if unet else type(pipeline.scheduler).__name__
        saved = f'{scheduler}.from_pretrained("path/to/this/folder", subfolder="scheduler")'
        made = f"{scheduler}.from_config(pipeline.scheduler.config)" if unet else saved
        told = {**call, "guidance_scale": call.get("guidance_scale", 1.0)}
        words = ", ".join(f"{key}={value!r}" for key, value in told.items())
        text = CARD.format(files=files, kind=kind, scheduler=scheduler, made=made, lora=LORA, prompt=prompt, call=words)
    with (folder / "README.md").open("a", encoding="utf-8") as card:
        card.write(text)


def export_lora(pipeline: Any, adapter: Mapping[str, Tensor], folder: Path) -> str:
    """Write the files, and say which; kohya-ss has names for a UNet's layers only.

    Args:
        pipeline: the teacher's, which names the network that the layers are of: a UNet or a transformer.
        adapter: ``Roles.adapter`` of a role whose alpha is its rank.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    from diffusers.utils import convert_state_dict_to_kohya

    network = getattr(pipeline, "unet_name", None) or pipeline.transformer_name
    named = {f"{network}.{key}": value.cpu().contiguous() for key, value in adapter.items()}
    files = {LORA: named}
    if network == "unet":
        files[KOHYA] = {key: value.contiguous() for key, value in convert_state_dict_to_kohya(named).items()}
    try:
        for name, tensors in files.items():
            with aside(folder / name) as part:
                save_file(tensors, part, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the LoRA to {folder}: {error}. Free space or choose another --output; the checkpoint is kept."
        ) from error
    return f"`{LORA}`, and `{KOHYA}` in kohya-ss names" if KOHYA in files else f"`{LORA}`"
