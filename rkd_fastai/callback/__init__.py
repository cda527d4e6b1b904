"""The training callbacks, one idea per module."""
from . import adversarial, averaging, core, distill, finite, monitor, resume
from .core import *
from .adversarial import *
from .distill import *
from .averaging import *
from .monitor import *
from .resume import *
from .finite import *

__all__ = core.__all__ + adversarial.__all__ + distill.__all__ + averaging.__all__ + monitor.__all__ + resume.__all__ + finite.__all__
