"""Which ranks of TensorRT plans run on which node, and the commands that start them there.

    node 0      the server; its first ranks are processes of the engine host, the others come to it
    each other  one `enginehouse-rank` for each of its GPUs, in the order of nodes

In a pod of a LeaderWorkerSet, variables say which node this is; elsewhere flags do. Starts nothing.
Source: LeaderWorkerSet 0.10, the variables of its pods; docs/tensorrt.md, "Over several machines".
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from enginehouse.runtime.errors import EngineError, EnginehouseError
from enginehouse.server.nodes.leader_worker import LEADER, SIZE

RANKS_PORT = 5600
INDEX = "LWS_WORKER_INDEX"
PROGRAM = "enginehouse-rank"
_ADDRESS = "ENGINEHOUSE_RANKS_ADDRESS"
_GPUS = "CUDA_VISIBLE_DEVICES"


class Node(NamedTuple):
    """number: 0 is the leader's. leader: the host on which it waits for ranks."""

    number: int
    num_nodes: int
    leader: str


class RankCommand(NamedTuple):
    """How one rank is started. gpu: what CUDA_VISIBLE_DEVICES is for it."""

    rank: int
    command: list[str]
    gpu: str


def ranks_per_node(path: Path, num_ranks: int, num_nodes: int) -> int:
    """GPUs that the engine at `path` takes of each node; EngineError when it takes unlike many."""
    count, rest = divmod(num_ranks, num_nodes)
    if rest or not count:
        fitting = [str(n) for n in range(1, num_ranks + 1) if num_ranks % n == 0]
        raise EngineError(
            f"the {num_ranks} ranks of {path} cannot be laid on {num_nodes} nodes alike; wanted "
            f"--nodes {', '.join(fitting)}"
        )
    return count


def leader_settings(
    env: Mapping[str, str], key_file: Path, num_nodes: int, num_local: int
) -> dict[str, str]:
    """Variables by which the server waits for ranks of other nodes, on all of its addresses.

    num_local: ranks of its own. Raises EnginehouseError in a group of another size.
    """
    size = env.get(SIZE)
    if size and size != str(num_nodes):
        raise EnginehouseError(f"there are {size} pods in the group; wanted --nodes {size}")
    return {
        _ADDRESS: env.get(_ADDRESS) or f"0.0.0.0:{RANKS_PORT}",
        "ENGINEHOUSE_RANKS_KEY_FILE": str(key_file),
        "ENGINEHOUSE_LOCAL_RANKS": str(num_local),
    }


def find_node(
    env: Mapping[str, str],
    *,
    number: int | None = None,
    num_nodes: int | None = None,
    leader: str | None = None,
) -> Node:
    """A worker's node as it is named, else as its LeaderWorkerSet says.

    Raises EnginehouseError where neither does, and for the leader's own.
    """
    said = [
        env.get(INDEX, "") if number is None else str(number),
        env.get(SIZE, "") if num_nodes is None else str(num_nodes),
        leader or env.get(LEADER, ""),
    ]
    if not (said[0].isdecimal() and said[1].isdecimal() and said[2]):
        raise EnginehouseError(
            f"a worker's node is {said[0] or 'not named'} of {said[1] or 'not named'}, and its "
            f"leader {said[2] or 'not named'}; wanted {INDEX}, {SIZE} and {LEADER} as a "
            "LeaderWorkerSet sets them, or --node, --nodes and --leader"
        )
    node = Node(int(said[0]), int(said[1]), said[2])
    if not 0 < node.number < node.num_nodes:
        raise EnginehouseError(
            f"node {node.number} of {node.num_nodes} is no worker; they are 1 to "
            f"{node.num_nodes - 1}, and the leader, node 0, is started without --worker"
        )
    return node


def rank_commands(
    engine: Path, num_ranks: int, node: Node, key_file: Path, env: Mapping[str, str]
) -> list[RankCommand]:
    """One for each GPU of a worker's node.

    Raises EngineError when ranks cannot be laid on its nodes or GPUs, EnginehouseError where the
    program is not installed.
    """
    count = ranks_per_node(engine, num_ranks, node.num_nodes)
    named = env.get(_GPUS)
    gpus = named.split(",") if named else [str(number) for number in range(count)]
    if len(gpus) < count:
        raise EngineError(
            f"{_GPUS}={named} names {len(gpus)} GPUs; {engine} takes {count} of each of "
            f"{node.num_nodes} nodes"
        )
    port = (env.get(_ADDRESS) or f":{RANKS_PORT}").rpartition(":")[2]
    leads = ["--leader", f"{node.leader}:{port}", "--key-file", str(key_file)]
    program, first = _program(env), node.number * count
    return [
        RankCommand(
            first + local, [program, str(engine), "--rank", str(first + local), *leads], gpu
        )
        for local, gpu in enumerate(gpus[:count])
    ]


def _program(env: Mapping[str, str]) -> str:
    beside = Path(sys.executable).with_name(PROGRAM)
    found = shutil.which(PROGRAM, path=env.get("PATH")) or (str(beside) if beside.exists() else "")
    if not found:
        raise EnginehouseError(
            f"{PROGRAM} is not on PATH, nor beside {sys.executable}; install enginehouse on this "
            "node, or put its environment's bin folder on PATH"
        )
    return found
