"""The gateway: a JupyterHub service that makes, places, heals and removes kernels, and shows the dashboard.

It is not on the path of a cell. More than one may run: all they decide becomes one etcd transaction each.
"""
