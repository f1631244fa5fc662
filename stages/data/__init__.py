"""Segmentation data sets, one file each; what every later stage knows of them is the manifest."""
