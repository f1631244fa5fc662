"""Networks; these files import torch, torchvision and timm alone."""
