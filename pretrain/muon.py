"""Muon (Jordan et al. 2024) as DeepSpeed has it: matrices move along orthogonalised momentum, the rest by AdamW."""

import contextlib

import torch
from deepspeed.runtime.zero.muon.original_muon import SingleDeviceMuonWithAuxAdam


class Muon(SingleDeviceMuonWithAuxAdam):
    """Every rank updates every matrix, so that a checkpoint of one rank is whole and serves any number of them.

    For BERT-large that is 6.2e12 floating point operations a step on every rank; a step of 4,096 sequences of 128 is
    9.8e14 over all ranks. Groups say ``use_muon``, as DeepSpeed wants it. A parameter whose ``muon_num_heads`` is n is
    orthogonalised as n matrices, each an n-th of its rows.
    """

    def step(self) -> None:
        """Update every parameter. DeepSpeed compiles the orthogonalisation; on a CPU that would take minutes."""
        on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
        with torch.compiler.set_stance("force_eager") if on_cpu else contextlib.nullcontext():
            super().step()
