"""What every NBOS process agrees on: records, keys, the etcd client, election, state log, placement policy.

Imports nothing of ours, no Jupyter, no Docker, no GPU library. This file stays empty of imports on purpose:
`nbos_cluster.wire` must be importable inside a user's replica, where only the standard library is sure to be
there.
"""
