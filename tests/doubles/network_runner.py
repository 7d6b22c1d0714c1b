"""Runs the TensorRT network of an engine over the recording network, as a model runner would."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import Tensor

from doubles.recording_network import RecordedWeights, RecordingNetwork
from enginehouse.build.tensorrt.compile import load_tensorrt
from enginehouse.build.tensorrt.network import DecoderNetwork, NetworkPart
from enginehouse.build.tensorrt.ops import NetworkOps
from enginehouse.build.tensorrt.parts import cut_decoder
from enginehouse.build.tensorrt.worker import rank_constants
from enginehouse.runtime.checkpoint.traits import traits_of
from enginehouse.runtime.engine import read_config
from enginehouse.runtime.tensorrt.inputs import (
    RotaryInputs,
    bound_weights,
    cache_sizes,
    shift_layer,
)


class NetworkRunner:
    """One network for all ranks of a checkpoint folder, with a cache for each sequence.

    plan_layers: the parts that it is cut into, each defined once for all that are alike; baked:
    its weights are constants, so that it is of one rank.
    """

    def __init__(
        self,
        checkpoint: Path,
        context: int,
        batch: int,
        plan_layers: int | None = None,
        baked: bool = False,
    ) -> None:
        self.config = read_config(checkpoint)
        self.context = context
        self.rotary = RotaryInputs(self.config, context)
        self.dtype: torch.dtype = getattr(torch, self.config.dtype)
        self.parts = cut_decoder(self.config, plan_layers, shared=not baked)
        self.networks: dict[NetworkPart, RecordingNetwork] = {}
        self.weights = []
        tensors = [
            load_file(checkpoint / f"rank{rank}.safetensors")
            for rank in range(self.config.mapping.tp_size)
        ]
        for rank, each in enumerate(tensors):
            bound = bound_weights(self.config, each, rank)
            self.weights.append({**bound, **self.rotary.tables})
        assert len(tensors) == 1 or not baked
        asked: set[str] = set()
        fed: dict[NetworkPart, set[str]] = {}
        for part, like in self.parts:
            if like not in self.networks:
                network = self.networks[like] = RecordingNetwork()
                constants = None
                if baked:
                    constants = rank_constants(self.config, checkpoint, 0, like, context)
                trt = SimpleNamespace(**vars(load_tensorrt()) | {"Weights": RecordedWeights})
                decoder = DecoderNetwork(
                    NetworkOps(trt, network), self.config, context, context, like, constants
                )
                fed[like] = set(decoder.weights)
            asked |= {shift_layer(name, part.first_layer) for name in fed[like]}
        wanted: set[str] = set() if baked else set(self.weights[0])
        if set(traits_of(self.config).ropes) == {None}:
            wanted -= self.rotary.tables.keys()
        assert asked == wanted, "some weight is in no part, or fed to none"
        self.caches = [
            {
                name: torch.zeros((batch, heads, context, size), dtype=self.dtype)
                for name, (heads, size) in cache_sizes(self.config).items()
            }
            for _ in tensors
        ]

    def step(
        self, ids: Tensor, starts: Tensor, counts: Tensor, contexts: Tensor, looked_at: int
    ) -> Tensor:
        """ids: [B, T], of which counts [B] are no padding, from position starts [B] on.

        contexts: [B], each sequence's whole length, what is still to be prefilled included.
        """
        positions = starts.unsqueeze(1) + torch.arange(ids.shape[1])
        positions = positions.clamp(max=self.context - 1)
        fed = {
            "input_ids": ids,
            "position_ids": positions,
            "write_indices": starts,
            "last_token_ids": counts.unsqueeze(1) - 1,
            "kv_positions": torch.arange(looked_at),
        }
        fed = {name: tensor.to(torch.int32) for name, tensor in fed.items()}
        fed["rotary_ids"] = self.rotary.rows(positions, contexts.unsqueeze(1))
        known = []
        for rank, weights in enumerate(self.weights):
            rows = len(weights["transformer.vocab_embedding.weight"])
            start = torch.tensor([rank * rows], dtype=torch.int32)
            known.append({**weights, **self.caches[rank], **fed, "vocab_start": start})
        for part, like in self.parts:
            network = self.networks[like]
            names = {name: shift_layer(name, part.first_layer) for name in network.inputs}
            feeds = [{name: rank[ours] for name, ours in names.items()} for rank in known]
            outputs = network.run(feeds)
            for rank, output in zip(known, outputs, strict=True):
                if not part.heads:
                    rank["hidden_states"] = output["next_hidden_states"]
        for other in outputs[1:]:
            torch.testing.assert_close(other["logits"], outputs[0]["logits"], rtol=0, atol=0)
        return outputs[0]["logits"]

    def logits(self, prompts: list[Tensor], decodes: int, chunk: int) -> list[Tensor]:
        """Of each prompt's last token and of `decodes` tokens more: [1 + decodes, vocab] each.

        The last tokens of a prompt are what is decoded. Prompts are computed together in padded
        chunks; a sequence that has ended its own early is padded whole until the others have.
        """
        lengths = torch.tensor([len(ids) - decodes for ids in prompts])
        rows: list[list[Tensor]] = [[] for _ in prompts]
        for start in range(0, int(lengths.max()), chunk):
            counts = (lengths - start).clamp(0, chunk)
            ids = torch.zeros(len(prompts), chunk, dtype=torch.int64)
            for row, prompt in enumerate(prompts):
                ids[row, : counts[row]] = prompt[start : start + counts[row]]
            starts = torch.where(counts > 0, start, lengths)
            reach = min(self.context, start + chunk)
            found = self.step(ids, starts, counts.clamp(min=1), lengths, reach)
            for row, at in enumerate(counts.tolist()):
                if at and start + at == lengths[row]:
                    rows[row].append(found[row])
        for done in range(decodes):
            ids = torch.stack([prompt[len(prompt) - decodes + done] for prompt in prompts])
            starts = lengths + done
            one = torch.ones_like(starts)
            found = self.step(ids.unsqueeze(1), starts, one, starts + 1, int(starts.max()) + 1)
            for row, logits in enumerate(found):
                rows[row].append(logits)
        return [torch.stack(row) for row in rows]
