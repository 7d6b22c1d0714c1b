"""An engine over several nodes -> what each of them runs, started and watched.

Imports no other wing of this floor. Does not know a server, nor what a rank computes.
TensorRT-LLM's ranks are mpirun's or srun's: `rank_group.py`. Those of TensorRT plans are processes
that come to their leader: Read `tensorrt_ranks.py` first.
"""
