"""Data sets as plain arrays: digits (embedded), MNIST, CIFAR-10 and CIFAR-100 (from their official files)."""

from jaxlimit.data.cifar import load_cifar10 as load_cifar10
from jaxlimit.data.cifar import load_cifar100 as load_cifar100
from jaxlimit.data.dataset import CIFAR10_NORMALIZATION as CIFAR10_NORMALIZATION
from jaxlimit.data.dataset import CIFAR100_NORMALIZATION as CIFAR100_NORMALIZATION
from jaxlimit.data.dataset import MNIST_NORMALIZATION as MNIST_NORMALIZATION
from jaxlimit.data.dataset import Dataset as Dataset
from jaxlimit.data.dataset import Normalization as Normalization
from jaxlimit.data.dataset import flatten_channel_first as flatten_channel_first
from jaxlimit.data.dataset import normalize as normalize
from jaxlimit.data.digits import load_digits as load_digits
from jaxlimit.data.files import data_folder as data_folder
from jaxlimit.data.mnist import load_mnist as load_mnist
