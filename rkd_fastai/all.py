"""The public names for `from rkd_fastai.all import *`; they shadow no name of `fastai.vision.all`."""
from . import recipes
from .core import PixelModel
from .losses import soft_targets, ensemble_probs, ckd_loss, ard_loss, rslad_loss, akd_loss, trades_loss
from .losses import adaad_loss, mtard_loss, iad_loss, igdm_loss, saad_loss
from .attacks import Attack, PGD, FGSM, FFGSM, AutoAttack
from .models import cifar_resnet18, wide_resnet
from .data import (arrays_dls, digits_dls, fashion_sample_dls, fashion_mnist_dls, cifar10_dls, cifar100_dls,
                   tiny_imagenet_dls, PadCropFlip, Cutout, with_subset, with_bs, with_label_noise,
                   with_augmentation, read_synthetic, with_synthetic, pixel_data)
from .checkpoint import best_epoch
from .teachers import Teacher, load_teacher
from .callback import (AdversarialTraining, TRADES, AKDCallback, RSLADCallback, ARDCallback, CKDCallback, AdaADCallback,
                       WeightAveraging, KeepEpochs, RobustAccuracy, CatastrophicOverfitting, RobustOverfitting,
                       NonFinite, Resume, RecordTrajectory)
from .schedules import sgd_nesterov, ExpDecay, OneCycle, Steps
from .learner import rkd_learner
from .recipes import Recipe, all_recipes
from .evaluation import (robust_accuracy, Robustness, check_masking, plot_robustness_curve,
                         AdversarialInterpretation, export_robustbench, load_trajectory, plot_entropy,
                         plot_similarity, plot_right_class, plot_improvement, plot_easiest_hardest)
from .study import Study, read_rows

# The name `resnet18` belongs to torchvision: ours is called `cifar_resnet18` here.
__all__ = ['PixelModel', 'soft_targets', 'ensemble_probs', 'ckd_loss', 'ard_loss', 'rslad_loss', 'akd_loss',
           'trades_loss', 'adaad_loss', 'mtard_loss', 'iad_loss', 'igdm_loss', 'saad_loss', 'Attack', 'PGD',
           'FGSM', 'FFGSM', 'AutoAttack', 'cifar_resnet18', 'wide_resnet', 'arrays_dls', 'digits_dls',
           'fashion_sample_dls', 'fashion_mnist_dls', 'cifar10_dls', 'cifar100_dls', 'tiny_imagenet_dls',
           'PadCropFlip', 'Cutout', 'with_subset', 'with_bs', 'with_label_noise', 'with_augmentation',
           'read_synthetic', 'with_synthetic', 'pixel_data', 'best_epoch', 'Teacher', 'load_teacher',
           'AdversarialTraining', 'TRADES', 'AKDCallback', 'RSLADCallback', 'ARDCallback', 'CKDCallback',
           'AdaADCallback', 'WeightAveraging', 'KeepEpochs', 'RobustAccuracy', 'CatastrophicOverfitting',
           'RobustOverfitting', 'NonFinite', 'Resume', 'RecordTrajectory', 'sgd_nesterov', 'ExpDecay',
           'OneCycle', 'Steps', 'rkd_learner', 'Recipe', 'all_recipes', 'robust_accuracy', 'Robustness',
           'check_masking', 'plot_robustness_curve', 'AdversarialInterpretation', 'export_robustbench',
           'load_trajectory', 'plot_entropy', 'plot_similarity', 'plot_right_class', 'plot_improvement',
           'plot_easiest_hardest', 'Study', 'read_rows', 'recipes']
