from stages.config import Config
class CompareConfig(Config):
    variants: list[str]
    seeds: list[int]
class ReportConfig(Config):
    headline_classes: list[str]
    pictures: int
    umap_points: int
    umap_neighbors: int
    umap_min_dist: float
    grid_samples: int
    grid_channels: int
    seed: int
