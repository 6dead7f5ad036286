"""What a daemon tells Prometheus (docs/metrics.md): counted as it happens, read when it is asked, served to who may."""
