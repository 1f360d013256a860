"""Runs of ``fastdiff.eval.generate`` that tests start in processes of their own."""

import json
import os
import signal
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdiff.eval.generate import generate
from fastdiff.eval.generation import Generation
from fastdiff.eval.subject import Subject

N, BATCH = 11, 3  # blocks of 3, 3, 3 and 2
PROMPTS = [f"{i}" for i in range(N)]


def subject(die_at: int | None = None, name: str = "tiny") -> Subject:
    """Two calls of a small network an image; the process that would draw image ``die_at`` kills itself."""
    torch.manual_seed(0)
    network = nn.Conv2d(3, 3, 3, padding=1)

    @torch.no_grad()
    def draw(prompts: list[str], generators: list[torch.Generator]) -> Tensor:
        if die_at is not None and str(die_at) in prompts:
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.stack([torch.randn(3, 8, 8, generator=g) for g in generators])
        return network(network(x)).sigmoid()

    return Subject(name=name, generate=draw, network=network, networks=(network,), steps=2, guidance_scale=1.0, resolution=(8, 8))


def killed(rank: int, folder: str, die_at: int) -> None:
    torch.set_num_threads(1)
    generate(subject(die_at), PROMPTS, folder, batch_size=BATCH)


def as_rank(rank: int, world_size: int, folder: str) -> None:
    from accelerate import PartialState

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1")  # asked for, but not used after a rendezvous by file
    torch.set_num_threads(1)
    store = f"file://{folder}-rendezvous"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    state = PartialState(cpu=True)
    ranks = {"rank": state.process_index, "world_size": state.num_processes}
    written = generate(subject(), PROMPTS, folder, batch_size=BATCH, **ranks)
    Path(f"{folder}-{rank}.json").write_text(json.dumps({**ranks, "written": written}))
    state.wait_for_everyone()
    assert not Generation.open(folder).missing()
    state.destroy_process_group()
