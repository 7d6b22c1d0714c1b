"""TensorRT-LLM itself: imported here and nowhere else, when an engine is opened.

Source: TensorRT-LLM 1.2.1, `_tensorrt_engine.LLM` and `llmapi`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from enginehouse.runtime.errors import EngineError
from enginehouse.runtime.machine.mpi_environment import forget_ranks
from enginehouse.runtime.tensorrt_llm.deployment import Deployment, llm_arguments

log = logging.getLogger("enginehouse.trtllm")


def load_llm(deployment: Deployment) -> tuple[Any, Callable[..., Any], Callable[..., Any]]:
    """The LLM, and the two classes its requests are made of. Raises EngineError when it fails."""
    if forgotten := forget_ranks(os.environ):  # before anything of it is imported
        log.info("no launcher started this process; it leaves out %s", ", ".join(forgotten))
    from tensorrt_llm import SamplingParams as TrtllmSamplingParams
    from tensorrt_llm.llmapi import (
        CapacitySchedulerPolicy,
        GuidedDecodingParams,
        KvCacheConfig,
        SchedulerConfig,
    )

    if deployment.compiled:
        from tensorrt_llm._tensorrt_engine import LLM
    else:
        from tensorrt_llm import LLM
    arguments = llm_arguments(deployment)
    policy = arguments["scheduler_config"]["capacity_scheduler_policy"]
    arguments["scheduler_config"] = SchedulerConfig(
        capacity_scheduler_policy=CapacitySchedulerPolicy[policy]
    )
    arguments["kv_cache_config"] = KvCacheConfig(**arguments["kv_cache_config"])
    try:
        llm = LLM(**arguments)
    except EngineError:  # the start's deadline
        raise
    except Exception as error:  # TensorRT-LLM raises what it likes
        raise EngineError(f"TensorRT-LLM does not load {deployment.path}: {error}") from error
    return llm, TrtllmSamplingParams, GuidedDecodingParams
