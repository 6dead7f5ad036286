"""A replica of an NBOS kernel. For user code: `nbos_kernel.grant()` says which GPUs the running cell holds,
`nbos_kernel.register_reducer(type, reduce)` says how values of a type are replicated.

Runs inside the user's image: needs ipykernel and cloudpickle, uses numpy and torch only where the user's program
does.
"""

from .binding import Grant, Share, grant
from .capture.rebuilt import register_reducer
from .lost import NotReplicatedError

__version__ = "0.1.0"

__all__ = ["Grant", "NotReplicatedError", "Share", "__version__", "grant", "register_reducer"]
