"""A pipeline of several one-step students that share all else: each prompt goes to its own student.

The folder holds the shared components, ``partition.json`` (which prompt is whose; ``partition.safetensors`` has the centroids by
which other prompts are routed) and ``students/0 .. K-1/unet``. This file is in the folder too, as ``multi_student.py``:

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)(["a red boot", "a blue bag"]).images

A batch is divided at the network, not before it: noise is drawn for the whole batch in its own order, each student gets its rows,
and the results return to their places. A student is read from disk when a prompt first asks for it. After a call
``pipeline.touched()`` says how many parameters had a part in it. Nothing but diffusers, torch and safetensors is imported here.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from safetensors.torch import load_file
from torch import nn


class RoutedStudents(nn.Module):
    """The students as one network: row i of a batch goes through student ``route[i]``.

    ``limit`` is how many stay in memory, the least recently used one leaving first; None is all of them.
    """

    def __init__(self, parameters: Any, config: Any, limit: int | None = None) -> None:
        super().__init__()
        self.sizes, self.config, self.limit = list(parameters), FrozenDict(config), limit
        self.folder: Any = None
        self.route: Any = None
        self.used: list[int] = []
        self.loaded = nn.ModuleDict()  # by number, the most recently used one last
        self.register_buffer("place", torch.zeros(0), persistent=False)  # moves with the pipeline and says where to

    @property
    def dtype(self) -> Any:
        return self.place.dtype

    @property
    def device(self) -> Any:
        return self.place.device

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """Nothing: the weights are on disk, whichever are loaded; ``config`` has their hash."""
        return {}

    def student(self, k: int) -> Any:
        """Student k, from memory or from disk."""
        if str(k) in self.loaded:
            network: Any = self.loaded.pop(str(k))
        else:
            self.make_room(1)
            path = self.folder / "students" / str(k) / "unet"
            network = UNet2DConditionModel.from_pretrained(str(path), use_safetensors=True, local_files_only=True)
            network = network if network.dtype == self.dtype else network.to(self.dtype)
            network.to(self.device).eval().requires_grad_(False)
        self.loaded[str(k)] = network
        return network

    def make_room(self, extra: int) -> None:
        """Forget students until ``extra`` more fit under the limit."""
        while self.limit is not None and len(self.loaded) and len(self.loaded) + extra > self.limit:
            self.loaded.pop(next(iter(self.loaded)))

    def forward(
        self,
        sample: Any,
        timestep: Any,
        encoder_hidden_states: Any,
        timestep_cond: Any = None,
        return_dict: bool = True,
        **unused: Any,
    ) -> Any:
        """What each row's student answers, in the rows' order."""
        if self.route is None or len(self.route) != len(sample):
            raise ValueError(f"a batch of {len(sample)} without as many students: call the pipeline, which routes its prompts.")
        output, used = torch.empty_like(sample), self.route.unique().tolist()
        for k in used:
            rows = (self.route == k).nonzero()[:, 0].to(sample.device)
            t = timestep[rows] if torch.is_tensor(timestep) and timestep.ndim else timestep
            guidance = None if timestep_cond is None else timestep_cond[rows]
            answer = self.student(k)(sample[rows], t, encoder_hidden_states[rows], timestep_cond=guidance, return_dict=False)
            output[rows] = answer[0]
        self.used = sorted({*self.used, *used})
        return SimpleNamespace(sample=output) if return_dict else (output,)


class MultiStudentPipeline(StableDiffusionPipeline):
    """See the module docstring."""

    _optional_components = ["safety_checker", "feature_extractor", "image_encoder", "unet"]  # noqa: RUF012 - as in diffusers

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        unet: Any = None,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        parameters: Any = (),
        network: Any = None,
        requires_safety_checker: bool = False,
    ) -> None:
        """``parameters`` are the sizes of the students, ``network`` what the pipeline asks their common config for."""
        unet = RoutedStudents(parameters, network or {}).to(vae.dtype)
        parts = (vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder)
        super().__init__(*parts, requires_safety_checker=requires_safety_checker)
        self.register_to_config(parameters=list(parameters), network=dict(network or {}))
        self._partition: Any = None

    @property
    def folder(self) -> Path:
        """Where the students are."""
        folder = Path(self.config._name_or_path)
        if not (folder / "partition.json").is_file():
            raise ValueError(
                f"{folder} has no partition.json: prompts have no students. Load a local folder (hub ids: snapshot_download)."
            )
        return folder

    @property
    def partition(self) -> Any:
        """The student of every known prompt, and the centroids or None. The empty prompt is of all parts: the first one answers."""
        if self._partition is None:
            record = json.loads((self.folder / "partition.json").read_text(encoding="utf-8"))
            tensors = self.folder / "partition.safetensors"
            centroids = load_file(tensors)["centroids"] if tensors.is_file() else None
            self._partition = {"": 0, **dict(zip(record["prompts"], record["part"], strict=True))}, centroids
        return self._partition

    def keep(self, limit: int | None) -> None:
        """Keep at most ``limit`` students in memory from now on; None keeps all."""
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}: the student that is called has to be in memory.")
        self.unet.limit = limit
        self.unet.make_room(0)

    def touched(self) -> dict[str, Any]:
        """What the last call ran, in parameters: ``student`` of the students it used, ``shared`` of the rest, ``all`` in all.

        ``students`` are their numbers, ``loaded`` those in memory now.
        """
        parts = [part for name, part in self.components.items() if name != "unet" and isinstance(part, nn.Module)]
        shared, sizes = sum(p.numel() for part in parts for p in part.parameters()), self.unet.sizes
        return {
            "students": self.unet.used,
            "student": sum(sizes[k] for k in self.unet.used),
            "shared": shared,
            "all": shared + sum(sizes),
            "loaded": sorted(map(int, self.unet.loaded)),
        }

    @torch.no_grad()
    def students_of(self, prompts: list[str]) -> Any:
        """The student of each prompt [B]: of the list, or by the nearest centroid of the mean text state.

        Raises ValueError for a prompt that is not in the list where there are no centroids.
        """
        known, centroids = self.partition
        unseen = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if unseen and centroids is None:
            raise ValueError(
                f"no student was trained for {unseen[0]!r}: pass student=k, 0..{len(self.unet.sizes) - 1}, to choose one."
            )
        found = dict(known)
        if unseen:
            states = self.encode_prompt(unseen, self._execution_device, 1, False)[0].float().mean(1)
            found.update(zip(unseen, torch.cdist(states.cpu(), centroids).argmin(1).tolist(), strict=True))
        return torch.tensor([found[prompt] for prompt in prompts])

    def __call__(
        self,
        prompt: Any = None,
        num_inference_steps: int = 1,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Any = None,
        output_type: str = "pil",
        student: Any = None,
        **options: Any,
    ) -> Any:
        """StableDiffusionPipeline's call; ``student`` is a number, or one a prompt, that overrides the routing."""
        if prompt is None and student is None:
            raise ValueError("prompt_embeds without a prompt have no student: pass student=k as well.")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        count = len(prompts) or len(options["prompt_embeds"])
        route = self.students_of(prompts) if student is None else torch.as_tensor(student).expand(count)
        self.unet.folder, self.unet.used = self.folder, []
        self.unet.route = route.repeat_interleave(num_images_per_prompt)
        options |= {"num_inference_steps": num_inference_steps, "num_images_per_prompt": num_images_per_prompt}
        try:
            return super().__call__(prompt, generator=generator, latents=latents, output_type=output_type, **options)
        finally:
            self.unet.route = None

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        """Refused: the students stay on disk until they are asked for."""
        raise NotImplementedError("copy the folder: this pipeline does not hold all of its students.")
