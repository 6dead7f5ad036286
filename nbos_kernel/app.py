"""Starting a replica: ipykernel's application with our kernel, outputs and options.

The process belongs to its daemon's host, not to the daemon: it goes on when the daemon ends or restarts.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

import zmq
from ipykernel.kernelapp import IPKernelApp, kernel_aliases
from traitlets import Dict, Type

from .iopub import FencedIOPubThread
from .kernel import NBOSKernel
from .warm import ahead

IOPUB_QUEUE = 100_000
"""Messages that may wait for a slow router before ZeroMQ drops any; ipykernel's 1000 loses output of long loops."""


class NBOSKernelApp(IPKernelApp):
    """One replica."""

    name = "nbos-kernel"
    aliases = Dict({**kernel_aliases, "nbos-socket": "NBOSKernel.nbos_socket"})
    classes: ClassVar[list[Any]] = [NBOSKernel, *IPKernelApp.classes[1:]]
    kernel_class = Type(NBOSKernel, klass="ipykernel.kernelbase.Kernel").tag(config=True)

    def initialize(self, argv: Any = None) -> None:
        # torch then looks for GPUs through NVML, so that asking in a CPU cell does not start CUDA without
        # devices for good.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        self.parent_handle = 1  # not ours to watch; and no word on a terminal that nobody reads
        super().initialize(argv)
        ahead.begun()

    def init_sockets(self) -> None:
        if self.config.NBOSKernel.get("nbos_socket") and self.transport == "tcp" and not self.curve_secretkey:
            self.log.critical(
                "%s holds no CurveZMQ keys: a replica without them would send everything in clear, and does not "
                "start; the daemon that wrote the file is too old, or the kernel's record in etcd is damaged",
                self.connection_file,
            )
            self.exit(1)
        super().init_sockets()
        self.stdin_socket.router_mandatory = 1  # a question to a router that is not connected yet is not dropped

    def init_poller(self) -> None:
        """No parent poller: a replica outlives the daemon that started it."""

    def init_iopub(self, context: Any) -> None:
        self.iopub_socket = context.socket(zmq.XPUB)
        self.iopub_socket.linger = 1000
        self.iopub_socket.sndhwm = IOPUB_QUEUE
        self._apply_curve_server_options(self.iopub_socket)
        self.iopub_port: Any = self._bind_socket(self.iopub_socket, self.iopub_port)
        self.configure_tornado_logger()
        self.iopub_thread = FencedIOPubThread(self.iopub_socket, pipe=True, session=self.session)
        self.iopub_thread.start()
        self.iopub_socket = self.iopub_thread.background_socket

    def init_io(self) -> None:
        self.outstream_class = "nbos_kernel.iopub.LazyOutStream"
        super().init_io()
