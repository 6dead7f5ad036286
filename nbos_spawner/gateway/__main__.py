"""`python -m nbos_spawner.gateway`: how JupyterHub starts the gateway."""

from .app import main

if __name__ == "__main__":
    main()
