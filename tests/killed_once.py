"""The command gunn, but of the processes that torchrun starts first the second kills itself after an epoch."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from gunn_ext.cli import main


def kill_after(metrics):
    while not metrics.exists() or not metrics.read_text():
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    metrics, *arguments = sys.argv[1:]
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        threading.Thread(target=kill_after, args=(Path(metrics),), daemon=True).start()
    sys.exit(main(arguments))
