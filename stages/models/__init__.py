"""Networks; these modules import only torch, torchvision and timm."""
