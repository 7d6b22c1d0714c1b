"""transformers in bfloat16 in this process: `run_transformers.py GGUF`, asked by lines.

A batch of equally long prompts is generated together, as its generate() does it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from child import Operation, answer


def open_all() -> dict[str, Operation]:
    import torch
    from transformers import AutoModelForCausalLM

    path = Path(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16
    )
    model.eval()

    def run(prompts: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
        ids = torch.tensor([prompt["ids"] for prompt in prompts])
        began = time.perf_counter()
        with torch.inference_mode():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        wall = time.perf_counter() - began
        assert found.shape == (len(prompts), ids.shape[1] + tokens)
        return {"wall_s": wall}

    return {"run": run}


if __name__ == "__main__":
    answer(open_all)
