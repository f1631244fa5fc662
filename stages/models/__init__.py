"""Networks; these modules import only torch and torchvision."""
