"""`python -m nbos_kernel --nbos-socket PATH -f CONNECTION_FILE`: what a gpu_daemon starts as a replica."""

from .app import NBOSKernelApp

if __name__ == "__main__":
    NBOSKernelApp.launch_instance()
