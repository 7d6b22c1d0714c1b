"""What stands between clients and many engines, by parts: `python scripts/bench_fleet_parts.py`.

A choice of each router by the number of replicas, and what it remembers; a message of the host's
protocol, by the tokens in it, over ZeroMQ to another process. In CPU time of the one process that
does it, which neighbours change least. The front's own is scripts/bench_server.py's.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which PYTHONSAFEPATH leaves out

from benches.goals import markdown  # noqa: E402
from simulate_fleet import POLICIES  # noqa: E402

from enginehouse.runtime.host import messages  # noqa: E402
from enginehouse.runtime.request import TokenOutput  # noqa: E402
from enginehouse.server.replicas.prefix_router import PrefixRouter  # noqa: E402

_LAST = b"last"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 16, 128, 1000], metavar="N")
    parser.add_argument("--prompt-tokens", type=int, default=2000, metavar="N")
    parser.add_argument("--choices", type=int, default=300, metavar="N", help="timed (default 300)")
    parser.add_argument("--messages", type=int, default=20_000, metavar="N", help="(default 20000)")
    parser.add_argument(
        "--blocks", type=int, default=16_384, metavar="N", help="remembered at most (default 16384)"
    )
    parser.add_argument("--receive", metavar="ADDRESS", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.receive is not None:
        return receive(args.receive)
    rows = [("replicas", *(f"{policy}, µs" for policy in POLICIES))]
    for count in args.replicas:
        times = (choice_s(policy, count, args.prompt_tokens, args.choices) for policy in POLICIES)
        rows.append((f"{count:,}", *(f"{1e6 * each:.0f}" for each in times)))
    print(markdown(rows))
    full = router_bytes(args.prompt_tokens, args.blocks)
    print(f"\nA prefix router that is full holds {full / 2**20:.1f} MiB of a replica\n")
    rows = [("tokens a message", "bytes", "sender, µs", "receiver, µs")]
    for tokens in (1, 8, 64):
        size, sent_s, received_s = message_s(tokens, args.messages)
        rows.append((str(tokens), str(size), f"{1e6 * sent_s:.1f}", f"{1e6 * received_s:.1f}"))
    print(markdown(rows))
    return 0


def choice_s(policy: str, num_replicas: int, prompt_tokens: int, count: int) -> float:
    """CPU seconds of one choice, for conversations that come back with a prompt that has grown."""
    draw, router = random.Random(0), POLICIES[policy]()
    loads = {f"replica-{index}": float(draw.randrange(16)) for index in range(num_replicas)}
    prompts = [[draw.getrandbits(17) for _ in range(prompt_tokens)] for _ in range(count)]
    for prompt in prompts:
        router.choose(prompt[: prompt_tokens * 3 // 4], loads)
    begin = time.process_time()
    for prompt in prompts:
        router.choose(prompt, loads)
    return (time.process_time() - begin) / count


def router_bytes(prompt_tokens: int, max_blocks: int, block_tokens: int = 64) -> int:
    """Of one replica's memory, once it is full."""
    draw, router = random.Random(0), PrefixRouter(block_tokens, max_blocks=max_blocks)
    tracemalloc.start()
    for _ in range(2 * max_blocks * block_tokens // prompt_tokens):
        router.choose([draw.getrandbits(17) for _ in range(prompt_tokens)], {"one": 0.0})
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size


def message_s(tokens: int, count: int) -> tuple[int, float, float]:
    """Bytes of a message, and CPU seconds to encode and send one, and to receive and decode it."""
    outputs = [TokenOutput(request_id=index, token_ids=[index + 1000]) for index in range(tokens)]
    message = messages.Outputs(outputs)
    size = len(messages.encode(message))
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context:
        address = f"ipc://{folder}/socket"
        with context.socket(zmq.PUSH) as socket:
            socket.bind(address)
            command = [sys.executable, __file__, "--receive", address]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
                for _ in range(count // 10):
                    socket.send(messages.encode(message))  # it has started when it takes these
                begin = time.process_time()
                for _ in range(count):
                    socket.send(messages.encode(message))
                sent = time.process_time() - begin
                socket.send(_LAST)
                told, _ = other.communicate(timeout=120)
    return size, sent / count, float(told)


def receive(address: str) -> int:
    """The other process: prints the CPU seconds of a message."""
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.connect(address)
        count, begin = 0, time.process_time()
        receive_one: Callable[[], bytes] = socket.recv
        while (data := receive_one()) != _LAST:
            messages.decode_to_worker(data)
            count += 1
        print((time.process_time() - begin) / count)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
