"""One process on a GPU, for `real_gpu.py`: told by JSON on its command line what to do, it prints one line of JSON.

Its slices are made by the same code as a replica's (`nbos_kernel.gpu.slices`).
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

PROBE = b"""
.version 7.0
.target sm_80
.address_size 64
.visible .entry probe(.param .u64 out, .param .u64 spin)
{
    .reg .pred %p<2>;
    .reg .u32 %r<4>;
    .reg .u64 %rd<8>;
    ld.param.u64 %rd1, [out];
    ld.param.u64 %rd2, [spin];
    mov.u64 %rd3, %globaltimer;
    add.u64 %rd4, %rd3, %rd2;
WAIT:
    mov.u64 %rd5, %globaltimer;
    setp.lt.u64 %p1, %rd5, %rd4;
    @%p1 bra WAIT;
    mov.u32 %r1, %smid;
    mov.u32 %r2, %ctaid.x;
    cvta.to.global.u64 %rd6, %rd1;
    mul.wide.u32 %rd7, %r2, 4;
    add.u64 %rd6, %rd6, %rd7;
    st.global.u32 [%rd6], %r1;
    ret;
}
\0"""
"""Each block waits `spin` nanoseconds, so that every SM gets some, and writes down the SM it ran on."""

SPIN = 200_000
BLOCKS_PER_SM = 40


class Probe:
    """Which SMs kernels on torch's current stream run on."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        torch.zeros(1, device="cuda")  # the primary context is current from here on
        self._driver = ctypes.CDLL("libcuda.so.1")
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._driver.cuModuleLoadData(ctypes.byref(module), PROBE))
        self._check(self._driver.cuModuleGetFunction(ctypes.byref(self._function), module, b"probe"))

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError(f"the CUDA driver answered {code}")

    def sms(self) -> list[int]:
        torch = self._torch
        blocks = BLOCKS_PER_SM * torch.cuda.get_device_properties(0).multi_processor_count
        out = torch.full((blocks,), -1, dtype=torch.int32, device="cuda")
        address, spin = ctypes.c_uint64(out.data_ptr()), ctypes.c_uint64(SPIN)
        arguments = (ctypes.c_void_p * 2)(
            ctypes.cast(ctypes.byref(address), ctypes.c_void_p), ctypes.cast(ctypes.byref(spin), ctypes.c_void_p)
        )
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        sizes = [ctypes.c_uint(n) for n in (blocks, 1, 1, 1, 1, 1, 0)]
        self._check(self._driver.cuLaunchKernel(self._function, *sizes, stream, arguments, None))
        torch.cuda.synchronize()
        return sorted(set(out.cpu().tolist()))


def gemm(torch: Any) -> Callable[[], Any]:
    a, b = (torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return lambda: a @ b


def attention(torch: Any) -> Callable[[], Any]:
    q, k, v = (torch.randn(8, 16, 2048, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)


def memory_bound(torch: Any) -> Callable[[], Any]:
    x, y = (torch.randn(1 << 27, device="cuda") for _ in range(2))
    return lambda: torch.add(x, y, out=x)


def network(torch: Any) -> Callable[[], Any]:
    """A training step of a small network: many short kernels."""
    nn = torch.nn
    net = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)).cuda()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    x, y = torch.randn(256, 512, device="cuda"), torch.randint(0, 10, (256,), device="cuda")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


WORK = {"gemm": gemm, "attention": attention, "memory-bound": memory_bound, "small network": network}


def per_call(torch: Any, call: Callable[[], Any], seconds: float) -> float:
    """Seconds of one call, the median of runs of about a tenth of `seconds`."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    count = max(1, int(seconds / 10 / max(time.perf_counter() - began, 1e-6)))
    runs = []
    end = time.perf_counter() + seconds
    while not runs or time.perf_counter() < end:
        began = time.perf_counter()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
        runs.append((time.perf_counter() - began) / count)
    return sorted(runs)[len(runs) // 2]


def use(torch: Any, slices: Any, tpcs: list[int] | None) -> None:
    """Torch's current stream is that of the slice; None: of the whole device."""
    torch.cuda.synchronize()
    if tpcs is None:
        torch.cuda.set_stream(torch.cuda.default_stream())
    else:
        torch.cuda.set_stream(torch.cuda.ExternalStream(slices.get(tpcs).stream, device=0))


CHUNK = 1 << 28


def chunk(torch: Any, seed: int) -> Any:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(0, 256, (CHUNK,), dtype=torch.uint8, device="cuda", generator=generator)


def filled(torch: Any, gib: int) -> list[Any] | str:
    """So many GiB of tensors; or why there is no room for them here and in host memory."""
    room = min(torch.cuda.mem_get_info()[0], os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if room < 1.3 * (gib << 30):
        return f"{room / 2**30:.0f} GiB free, on the device or in host memory"
    tensors = [chunk(torch, i) for i in range((gib << 30) // CHUNK)]
    torch.cuda.synchronize()
    return tensors


def unchanged(torch: Any, tensors: list[Any]) -> bool:
    return all(tensor.is_cuda and torch.equal(tensor, chunk(torch, i)) for i, tensor in enumerate(tensors))


def hold(torch: Any, gib: int) -> dict[str, Any]:
    """Tensors that stay, while another process has this one checkpointed and restored: until a line comes."""
    tensors = filled(torch, gib)
    if isinstance(tensors, str):
        return {"skipped": tensors}
    print(json.dumps({"bytes": sum(tensor.nbytes for tensor in tensors)}), flush=True)
    sys.stdin.readline()
    return {"same": unchanged(torch, tensors)}


def give_back(torch: Any, gib: int) -> dict[str, Any]:
    """Tensors to pinned host memory and back, as `%nbos gpu release` and the next cell with a GPU do it."""
    from nbos_kernel.capture import parked
    from nbos_kernel.gpu import offload

    tensors = filled(torch, gib)
    if isinstance(tensors, str):
        return {"skipped": tensors}
    began = time.perf_counter()
    moved = offload.release(torch)
    out = time.perf_counter() - began
    left = torch.cuda.memory_reserved()
    began = time.perf_counter()
    parked.bring_home()
    torch.cuda.synchronize()
    back = time.perf_counter() - began
    same = unchanged(torch, tensors)
    return {"out": moved.bytes / out, "back": moved.bytes / back, "left": left, "same": same, "stayed": moved.left}


BURST, IDLE = 8, 0.02
"""Calls of a burst, and seconds between two."""


def burst(torch: Any, seconds: float) -> dict[str, Any]:
    """Bursts with pauses, each after a line that allows it: seconds from asking to the end (`gpu_stealing.py`)."""
    call = gemm(torch)
    per_call(torch, call, 0.2)
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()
    took = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        time.sleep(IDLE)
        began = time.perf_counter()
        print(json.dumps({"ask": True}), flush=True)
        sys.stdin.readline()
        for _ in range(BURST):
            call()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
        print(json.dumps({"over": True}), flush=True)
    return {"took": took}


def borrow(torch: Any, slices: Any) -> dict[str, Any]:
    """Steps of work until told to end; between two it goes where a line says, and says when it is there."""
    call = gemm(torch)
    per_call(torch, call, 0.2)
    print(json.dumps({"ready": True}), flush=True)
    steps, lines = 0, queue.SimpleQueue[str]()
    threading.Thread(target=lambda: [lines.put(line) for line in sys.stdin], daemon=True).start()
    while True:
        while not lines.empty():
            told = json.loads(lines.get())
            if "end" in told:
                return {"steps": steps}
            if "count" in told:
                steps = 0
            else:
                use(torch, slices, told["tpcs"])  # waits for what was launched
                print(json.dumps({"on": True}), flush=True)
        call()
        torch.cuda.synchronize()
        steps += 1


def main() -> None:
    import torch

    from nbos_kernel.gpu.driver import Driver
    from nbos_kernel.gpu.slices import Slices

    asked = json.loads(sys.argv[1])
    probe, driver = Probe(torch), Driver()
    slices = Slices(driver, 0)
    if asked["do"] == "describe":
        found: Any = {"tpcs": slices.tpcs, "name": torch.cuda.get_device_name(0), "cuda": driver.version()}
    elif asked["do"] == "sms":
        found = {}
        for name, tpcs in asked["slices"].items():
            use(torch, slices, tpcs)
            found[name] = probe.sms()
    elif asked["do"] == "give back":
        found = give_back(torch, asked["gib"])
    elif asked["do"] == "hold":
        found = hold(torch, asked["gib"])
    elif asked["do"] == "burst":
        use(torch, slices, asked["tpcs"])
        found = burst(torch, asked["seconds"])
    elif asked["do"] == "borrow":
        use(torch, slices, asked["tpcs"])
        found = borrow(torch, slices)
    elif asked["do"] == "sweep":
        found = {}
        for size in asked["sizes"]:
            use(torch, slices, list(range(size)))
            found[size] = per_call(torch, WORK[asked["work"]](torch), asked["seconds"])
    else:
        use(torch, slices, asked["tpcs"])
        call = WORK[asked["work"]](torch)
        per_call(torch, call, 0.2)
        wait = asked["at"] - time.time()  # so that two processes overlap
        time.sleep(max(0.0, wait))
        found = {"late": wait < 0, "rate": 1 / per_call(torch, call, asked["seconds"]), "sms": probe.sms()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
