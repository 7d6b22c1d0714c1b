"""An engine directory -> a folder of manifests that a cluster runs it from.

Imports `launch/` and `nodes/`. Does not know a cluster: nothing is asked of one, and nothing is
applied; what it needs of nodes is what the engine's own manifest says. Read `folder.py` first.
"""
