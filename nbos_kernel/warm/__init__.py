"""Processes that have imported what a replica needs before anybody asks for one.

`python -m nbos_kernel.warm FD MODULE…` is a *warm parent*: it imports, and forks a *spare* whenever its daemon asks
(FD: its end of a SOCK_SEQPACKET pair). `--spare` makes the process itself the one spare, where forking is not safe. A
spare waits on a socket of its own until it is told which replica to be, and then is that replica until its end.

Guarantees: neither runs a user's code or holds a user's data before that; a spare becomes one replica, once; both end
when their daemon is gone, replicas do not. What the messages are: docs/protocol.md, section "Warm parents".
"""
