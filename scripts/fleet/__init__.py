"""What `scripts/simulate_fleet.py` is made of: replicas that serve conversations, on paper.

`service.py` is how long a step takes, by measured figures; `workload.py` who asks what, and when;
`replica.py` a batch with its queue and its prefix cache; `fleet.py` the clock, the routing and the
failures; `outcome.py` what came of it. Nothing is served, no model is run. Read `fleet.py` first.
"""
