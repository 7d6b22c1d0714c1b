"""What a build makes, one file a backend: the stages that lead from a plan to a finished folder.

Imports `plan/`, `sources/`, `quantize/`, `convert/`, `forms/`, `tensorrt/`, `tensorrt_llm/`
and `report/`. Does not know flags or the command line. `base.py` says what a
backend is, `shared_stages.py` has the stages that several go through; adding one adds its file and
a row in `build/stages.py`. Read `base.py` first, then `torch.py`.
"""
