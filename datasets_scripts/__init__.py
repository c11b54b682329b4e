"""Datasets in the region-attribute schema; importing it makes its builders known to `load_dataset`."""

from .registration import register

register()
