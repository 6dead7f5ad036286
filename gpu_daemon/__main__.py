"""`python -m gpu_daemon`"""

from gpu_daemon.app import main

main()
