"""A host's daemon: devices and slices, the queue for them, replicas and their bids, blobs.

Decisions without IO: `ledger`, `queue`, `fleet`, `limits`, `requests`, `transactions`. Shells: `bidding`, `commits`,
`folding`, `replicas`, `sessions`, `answers`, `publishing`. `daemon` puts them together, `app` is the command.
"""
