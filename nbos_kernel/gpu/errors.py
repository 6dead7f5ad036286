"""What the CUDA driver answers, in words: which call, the error's name, what it means here and the way out."""

from __future__ import annotations

RESTART = "restart the kernel"
MPS = "ask the administrator to look at nvidia-cuda-mps-control on this host"

ADVICE = {
    2: "the device has no memory left for it; free some (`del`, torch.cuda.empty_cache()) or ask for more with mem=",
    34: "this is the toolkit's stub, not the driver; take it off LD_LIBRARY_PATH",
    36: "the NVIDIA driver is too old; it needs to be 550 (CUDA 12.4) or newer",
    46: "another process has the device for itself (exclusive compute mode)",
    100: "the driver shows no device to this process",
    214: "the device has an uncorrectable memory error; its host must reset it",
    700: f"a kernel touched memory that is not its own, and CUDA in this process is broken by it; {RESTART}",
    719: f"a kernel failed, and CUDA in this process is broken by it; {RESTART}",
    710: f"an assertion failed in a kernel, and CUDA in this process is broken by it; {RESTART}",
    800: "this process is not permitted to do that; ask the administrator about MPS and the device's compute mode",
    801: "this device or driver does not support it",
    803: "library and kernel module of the NVIDIA driver differ; restart the host, or the container after an update",
    805: f"the MPS daemon does not answer; {MPS}",
    806: f"the MPS server does not answer; {MPS}",
    807: f"the MPS server is not ready for this user: another user's processes hold it; {MPS}",
    808: "the MPS server has as many clients as it takes",
    809: "the MPS server has as many connections as it takes",
    810: f"the MPS server ended this client, because of a fault in another one perhaps; {RESTART}",
    999: f"the device does not answer any more; its host must look at it (nvidia-smi), then {RESTART}",
}
"""By number (CUresult), as `cuda.h` of CUDA 13.0 counts."""


class CudaTrouble(RuntimeError):
    """Something that cannot be had from CUDA here. The text says why and names the way out."""


class NoDriver(CudaTrouble):
    """There is no CUDA driver library in this process's reach, or one without what is needed."""


class CallFailed(CudaTrouble):
    """A driver call was answered with an error. code: its CUresult."""

    def __init__(self, call: str, code: int, name: str) -> None:
        advice = ADVICE.get(code)
        super().__init__(f"{call} failed: {name or f'CUDA error {code}'}" + (f" ({advice})" if advice else ""))
        self.call, self.code = call, code
