"""gunicorn -c configs/gunicorn.conf.py 'enginehouse.server.app:create_app()'

What it says is said in server/launch/gunicorn_conf.py; write below what is to be otherwise.
"""

from enginehouse.server.launch.gunicorn_conf import *  # noqa: F403
