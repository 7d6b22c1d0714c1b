"""The build floor: a Hugging Face checkpoint becomes an engine directory."""

import enginehouse.runtime as _runtime  # noqa: F401  sets up the process before torch loads
