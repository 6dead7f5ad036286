"""A refusal of the gateway: an HTTP status, a code for programs, a sentence for people."""

from __future__ import annotations


class ApiError(Exception):
    """Raised anywhere below a request; the handler answers `{"error": code, "message": message}`."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


def no_such_kernel(kernel_id: str) -> ApiError:
    """The same words whether the kernel does not exist or belongs to somebody else."""
    return ApiError(404, "no_such_kernel", f"you have no kernel {kernel_id[:140]!r}")


def unavailable(reason: str) -> ApiError:
    return ApiError(503, "unavailable", reason)
