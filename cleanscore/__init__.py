"""cleanscore from Python: load a network, sample it, evaluate images, find wrong labels. See docs/python.md.

The functions call the packages that the scripts call, so they do the same.
"""

from cleanscore.api import detect, evaluate, load, sample
from cleanscore.samples import Samples

__all__ = ["Samples", "detect", "evaluate", "load", "sample"]
