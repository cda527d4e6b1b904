"""Training callbacks: adversarial training, distillation, and what watches and keeps a training run."""
from .core import FitCallback, EachEpoch
from .adversarial import RobustCallback, AdversarialTraining, TRADES
from .distill import DistillationCallback, AKDCallback, RSLADCallback, ARDCallback, CKDCallback, AdaADCallback
from .ema import WeightAveraging
from .keep import KeepEpochs
from .monitor import RobustAccuracy, CatastrophicOverfitting, RobustOverfitting, NonFinite
from .resume import Resume
from .trajectory import RecordTrajectory

__all__ = ['FitCallback', 'EachEpoch', 'RobustCallback', 'AdversarialTraining', 'TRADES',
           'DistillationCallback', 'AKDCallback', 'RSLADCallback', 'ARDCallback', 'CKDCallback', 'AdaADCallback',
           'WeightAveraging', 'KeepEpochs', 'RobustAccuracy', 'CatastrophicOverfitting', 'RobustOverfitting',
           'NonFinite', 'Resume', 'RecordTrajectory']
