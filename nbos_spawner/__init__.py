"""What NBOS adds to JupyterHub: the spawner with its options form, the limits, the gateway service, a proxy
launcher."""
