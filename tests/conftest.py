# SPDX-License-Identifier: MIT
import os
import sys
from pathlib import Path

# One thread, here and in the processes that tests start: their tensors are small, and where the
# machine is busy two threads wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))
