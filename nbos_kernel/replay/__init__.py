"""Cells marked with `%%replay`: kept as text, and run again by a replica that takes over without their variables."""
