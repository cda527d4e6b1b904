"""DataLoaders in pixel space: published data sets, arrays of your own, and variations of DataLoaders that are there."""
from .transforms import PadCropFlip, Cutout
from .arrays import ResidentDL, arrays_dls
from .benchmarks import (fashion_vocab, digits_dls, fashion_sample_dls, fashion_mnist_dls, cifar10_dls,
                         cifar100_dls, tiny_imagenet_dls)
from .images import pixel_data
from .loaders import (with_subset, with_bs, with_label_noise, with_batch_tfms, with_augmentation,
                      read_synthetic, with_synthetic)

__all__ = ['PadCropFlip', 'Cutout', 'ResidentDL', 'arrays_dls', 'fashion_vocab', 'digits_dls',
           'fashion_sample_dls', 'fashion_mnist_dls', 'cifar10_dls', 'cifar100_dls', 'tiny_imagenet_dls',
           'with_subset', 'with_bs', 'with_label_noise', 'with_batch_tfms', 'with_augmentation',
           'read_synthetic', 'with_synthetic', 'pixel_data']
