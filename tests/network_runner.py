"""Runs the TensorRT network of an engine over the recording network, as a model runner would."""

from __future__ import annotations

from pathlib import Path

import torch
from recording_network import RecordingNetwork
from safetensors.torch import load_file
from torch import Tensor

from enginehouse.build.network import DecoderNetwork
from enginehouse.build.network_ops import NetworkOps
from enginehouse.runtime.engine import read_config
from enginehouse.runtime.tensorrt_inputs import RotaryInputs, bound_weights


class NetworkRunner:
    """One network for all ranks of a checkpoint folder, with a cache for each sequence."""

    def __init__(self, checkpoint: Path, context: int, batch: int) -> None:
        from enginehouse.build.compile_tensorrt import load_tensorrt

        self.config = read_config(checkpoint)
        self.context = context
        self.network = RecordingNetwork()
        ops = NetworkOps(load_tensorrt(), self.network)
        decoder = DecoderNetwork(ops, self.config, context, max_positions=context)
        self.rotary = RotaryInputs(self.config, context)
        self.dtype: torch.dtype = getattr(torch, self.config.dtype)
        self.fixed = []
        for rank in range(self.config.mapping.tp_size):
            tensors = load_file(checkpoint / f"rank{rank}.safetensors")
            weights = bound_weights(self.config, tensors)
            feeds = {**weights, **self.rotary.tables}
            assert feeds.keys() == decoder.weights.keys()
            shape = (batch, decoder.kv_heads, context, self.config.head_size)
            for layer in range(self.config.num_hidden_layers):
                for side in ("key", "value"):
                    feeds[f"past_{side}_{layer}"] = torch.zeros(shape, dtype=self.dtype)
            if self.config.mapping.tp_size > 1:
                rows = len(weights["transformer.vocab_embedding.weight"])
                feeds["vocab_start"] = torch.tensor([rank * rows], dtype=torch.int32)
            self.fixed.append(feeds)

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
        outputs = self.network.run([{**fixed, **fed} for fixed in self.fixed])
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
