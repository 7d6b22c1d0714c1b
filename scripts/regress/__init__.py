"""The regression floor: two engines, asked the same; one verdict.

Stands above build, runtime and server; the front door's verb `regress` calls it.
"""

import enginehouse.runtime as _runtime  # noqa: F401  sets up the process before torch loads
