"""Attacks in pixel space, in plain PyTorch: PGD and its relatives, and AutoAttack."""
from .pgd import Attack, PGD, FGSM, FFGSM
from .autoattack import AutoAttack

__all__ = ['Attack', 'PGD', 'FGSM', 'FFGSM', 'AutoAttack']
