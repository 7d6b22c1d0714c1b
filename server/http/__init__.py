"""An HTTP request -> its answer, whole or as a stream: the way every endpoint takes.

Imports every other wing of this floor but `launch/`. Does not know what the fields mean, nor
gunicorn's processes. Read `completion_routes.py` first, then `service.py`.
"""
