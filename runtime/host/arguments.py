"""The command line of `enginehouse-host` -> what an engine is opened with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from enginehouse.runtime.executor import ExecutorOptions, RemoteRanks
from enginehouse.runtime.host.admission import QueueLimits
from enginehouse.runtime.host.log_lines import FORMATS, LEVELS


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="enginehouse-host",
        description="Serve one engine directory to gunicorn's workers over ZeroMQ.",
    )
    parser.add_argument("engine", type=Path, help="engine directory made by enginehouse-build")
    parser.add_argument(
        "--address",
        required=True,
        help="ZeroMQ address, such as ipc:///tmp/eh or tcp://0.0.0.0:5555 (port 0: any free one)",
    )
    parser.add_argument(
        "--key-file", type=Path, help="take no client but those that have this file's secret"
    )
    parser.add_argument(
        "--open-host",
        action="store_true",
        help="let whoever reaches the address run what they like, as TCP does",
    )
    parser.add_argument("--max-seq-len", type=int, help="prompt plus output, in tokens")
    parser.add_argument("--max-batch-size", type=int, help="sequences that run at once")
    parser.add_argument("--max-num-tokens", type=int, help="tokens of one iteration")
    parser.add_argument("--kv-cache-gib", type=float, help="memory of the KV cache")
    parser.add_argument("--compute-dtype", choices=("auto", "float32", "bfloat16"))
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="of the torch backend; auto: the first CUDA device, else the CPU",
    )
    parser.add_argument("--tp-size", type=int, help="GPUs that share a Hugging Face checkpoint")
    parser.add_argument(
        "--ranks-address",
        metavar="HOST:PORT",
        help="of TensorRT plans: where ranks of other machines come to (enginehouse-rank)",
    )
    parser.add_argument("--ranks-key-file", type=Path, help="the secret that they prove to have")
    parser.add_argument("--local-ranks", type=int, help="ranks of this machine (default 1)")
    parser.add_argument("--start-s", type=float, help="time for TensorRT-LLM to start in")
    parser.add_argument("--num-threads", type=int, help="CPU threads of the engine")
    parser.add_argument("--grammar-timeout-s", type=float, help="time to compile a grammar in")
    parser.add_argument(
        "--grammars-later",
        action="store_true",
        help="start the process that compiles grammars with the first of them, not with the engine",
    )
    parser.add_argument("--prefill-ms", type=float, help="of an iteration, for prompts, on a CPU")
    parser.add_argument("--speculative", choices=("ngram", "off"), help="drafts, on backend=cpu")
    parser.add_argument("--num-speculative-tokens", type=int, help="of a draft")
    parser.add_argument("--max-matching-ngram-size", type=int, help="last tokens looked for")
    parser.add_argument("--speculative-batch-size", type=int, help="sequences beyond which none is")
    parser.add_argument(
        "--shared-weights",
        action="store_true",
        help="map the packed weights of backend=cpu, and share their pages with other hosts",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="let no neighbour in the batch change a result (slower: see docs/determinism.md)",
    )
    queue = QueueLimits()
    parser.add_argument("--max-queue-requests", type=int, default=queue.max_requests)
    parser.add_argument("--max-queue-tokens", type=int, default=queue.max_tokens)
    parser.add_argument("--max-queue-s", type=float, default=queue.max_wait_s)
    parser.add_argument("--log-level", choices=LEVELS, default="info", help="(default info)")
    parser.add_argument(
        "--log-format", choices=FORMATS, default="text", help="of each line (default text)"
    )
    parser.add_argument(
        "--log-traffic",
        action="store_true",
        help="a line of throughput every ten seconds, as long as there are requests",
    )
    parser.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Ends the process with status 2 for what cannot be meant."""
    parser = make_parser()
    args = parser.parse_args(argv)
    is_open = args.key_file is None and not args.open_host
    if not args.address.startswith("ipc://") and is_open:
        parser.error(
            f"--address {args.address} is open to whoever reaches it; wanted ipc://PATH in a "
            "private folder, --key-file, or --open-host where the network lets nobody in"
        )
    if (args.ranks_address is None) != (args.ranks_key_file is None):
        parser.error("--ranks-address and --ranks-key-file go together: ranks prove who they are")
    if args.local_ranks is not None and args.ranks_address is None:
        parser.error("--local-ranks wants --ranks-address, where the others come to")
    return args


def options_of(args: argparse.Namespace) -> ExecutorOptions:
    remote = None
    if args.ranks_address is not None:
        remote = RemoteRanks(args.ranks_address, args.ranks_key_file, args.local_ranks or 1)
    return ExecutorOptions(
        max_seq_len=args.max_seq_len,
        max_batch_size=args.max_batch_size,
        max_num_tokens=args.max_num_tokens,
        kv_cache_gib=args.kv_cache_gib,
        compute_dtype=args.compute_dtype,
        num_threads=args.num_threads,
        deterministic=args.deterministic,
        grammar_timeout_s=args.grammar_timeout_s,
        tp_size=args.tp_size,
        start_s=args.start_s,
        device=args.device,
        grammars_at_once=not args.grammars_later,
        prefill_ms=args.prefill_ms,
        speculative=args.speculative,
        num_speculative_tokens=args.num_speculative_tokens,
        max_matching_ngram_size=args.max_matching_ngram_size,
        speculative_batch_size=args.speculative_batch_size,
        shared_weights=args.shared_weights,
        remote_ranks=remote,
    )
