"""Which ports replicas, routers and the servers of one machine choose from, where nobody says otherwise."""

PORT_RANGE = (15000, 32000)
"""Below Linux's ephemeral ports, so that no outgoing connection takes a dead server's port before it is back."""
