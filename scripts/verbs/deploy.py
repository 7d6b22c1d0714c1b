"""`enginehouse deploy`: an engine -> the manifests by which a cluster runs it. Applies nothing."""

from __future__ import annotations

from pathlib import Path

from enginehouse.verbs.base import VerbParser, count_up_to


def make_parser() -> VerbParser:
    parser = VerbParser(
        "deploy",
        "kubernetes ENGINE -o DIR [OPTIONS]",
        "Write a kustomize folder for an engine: a Deployment, or a LeaderWorkerSet for an engine "
        "over several nodes, with the GPUs, nodes and memory that its manifest asks for, a "
        "service, a disruption budget, and scaling by the queue. Nothing is asked of a cluster.",
        "enginehouse deploy kubernetes engines/mine -o deploy/mine --replicas 2",
    )
    parser.add_argument("cluster", nargs="?", metavar="kubernetes", help="what runs it")
    parser.add_argument(
        "engine", nargs="?", type=Path, metavar="ENGINE", help="directory made by build"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="the folder to write")
    parser.add_argument("--name", help="of every object (default: the engine's)")
    parser.add_argument("--namespace", help="else the one in which it is applied")
    parser.add_argument("--image", help="else that of Dockerfile or Dockerfile.cpu")
    parser.add_argument(
        "--replicas",
        type=count_up_to(10_000),
        metavar="N",
        default=1,
        help="servers at least (default 1)",
    )
    parser.add_argument(
        "--max-replicas",
        type=count_up_to(100_000),
        metavar="N",
        help="servers at most (default: four times --replicas)",
    )
    parser.add_argument(
        "--nodes",
        type=count_up_to(1000),
        metavar="N",
        help="of one engine (default: one for each eight GPUs)",
    )
    parser.add_argument(
        "--tp-size",
        type=count_up_to(9999),
        metavar="N",
        help="GPUs that share a checkpoint of --format hf (default 1)",
    )
    parser.add_argument(
        "--claim", default="engine", help="the volume with the engine in it (default engine)"
    )
    parser.add_argument(
        "--keda", metavar="URL", help="scale by KEDA, which asks the Prometheus at this address"
    )
    parser.add_argument(
        "--gateway",
        nargs="?",
        const="",
        metavar="GATEWAY",
        help="an InferencePool for the Gateway API too; with the name of a Gateway, an HTTPRoute "
        "from it as well",
    )
    return parser


def main(argv: list[str]) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.cluster != "kubernetes":
        found = "" if args.cluster is None else f", and {args.cluster} is not known"
        parser.error(f"say for which cluster: kubernetes{found}")
    if args.engine is None or args.output is None:
        parser.error(f"{'ENGINE' if args.engine is None else '-o DIR'} is not given")
    from enginehouse.server.deploy.engine_facts import read_facts
    from enginehouse.server.deploy.folder import render, write_folder
    from enginehouse.server.deploy.options import choose_options

    facts = read_facts(args.engine, nodes=args.nodes, tp_size=args.tp_size)
    options = choose_options(
        facts,
        name=args.name,
        image=args.image,
        namespace=args.namespace,
        replicas=args.replicas,
        max_replicas=args.max_replicas,
        claim=args.claim,
        keda=args.keda,
        gateway=args.gateway,
    )
    texts, wanted = render(facts, options)
    write_folder(texts, args.output)
    where = f"{facts.num_gpus} GPUs" if facts.num_gpus else "CPUs"
    sms = f" of SM {' or '.join(map(str, facts.sms))}" if facts.sms else ""
    nodes = f" on {facts.num_nodes} nodes" if facts.num_nodes > 1 else ""
    print(f"{args.output}: {options.name}, backend {facts.kind}, {where}{sms}{nodes} a replica")
    print("wanted in the cluster before it is applied:")
    for each in wanted:
        print(f"  {each}")
    print(f"kubectl apply -k {args.output}")
    return 0
