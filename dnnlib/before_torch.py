"""Choose the threads of this process. Every script imports this module first, because PyTorch reads the choice once."""

import os

from dnnlib import threads

threads.choose(os.environ)
