"""Workers of a data loader at the end of a process that fails."""

import subprocess
import sys

# After an error in the main process; each worker is dead, and the signal of its death delivered, before the next is
# killed: PyTorch's handler of that signal raises.
SCRIPT = """
import multiprocessing.process, time
from apt_diffusion.training.loading import make_loader

kill = multiprocessing.process.BaseProcess.kill

def kill_and_wait(self):
    kill(self)
    time.sleep(0.3)

multiprocessing.process.BaseProcess.kill = kill_and_wait

class Slow:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index:
            time.sleep(600)
        return index

batches = iter(make_loader(Slow(), [[index] for index in range(8)], list, num_workers=3))
print(next(batches), flush=True)
raise ValueError("the end")
"""


def test_all_workers_end_with_a_process_that_fails():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == "[0]\n"
    assert "ValueError: the end" in done.stderr and "is killed by signal" not in done.stderr
