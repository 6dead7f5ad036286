"""Tests on the compose cluster: real Engines, real etcd, real networks that are cut."""
