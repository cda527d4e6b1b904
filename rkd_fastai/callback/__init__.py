"""The training callbacks, one idea per module."""
from . import adversarial, averaging, core, distill, finite, monitor, resume, trajectory
from .core import *
from .adversarial import *
from .distill import *
from .averaging import *
from .monitor import *
from .resume import *
from .finite import *
from .trajectory import *

__all__ = [n for m in (core, adversarial, distill, averaging, monitor, resume, finite, trajectory) for n in m.__all__]
