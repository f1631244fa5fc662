"""What a GPU reaches: limits, extraction by stage, training steps, loader, loss, monitor, trace.

    python -m benchmarks.gpu all --out gpu-benchmarks     # all of the following, in eight minutes
    python -m benchmarks.gpu ceilings | extract | steps | loader | loss | monitor | trace

Images, features and masks are drawn; weights are random, or those of the installed
EfficientNet-Lite0. Nothing is downloaded. ``--device cpu --size small`` runs the same code without
a GPU; columns that only a GPU has are empty there. No GPU has run these benchmarks yet.
"""
