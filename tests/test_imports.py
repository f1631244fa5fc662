"""The architecture holds: who may import whom."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.imports import ROOT, imported_modules

STAGES = ("prepare", "extract", "train_gan", "train_decoder", "report")
SOURCES = sorted([*ROOT.glob("featurestore/*.py"), *ROOT.glob("stages/**/*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    imported = imported_modules(path)
    tops = {name.split(".")[0] for name in imported}
    assert not tops & {"pipeline"}
    if tops & {"featurestore"} or "stages" in tops:
        stages_imported = {
            name.split(".")[1] for name in imported if name.startswith("stages.")
        } & set(STAGES)
        assert not stages_imported, f"{module} imports a stage"
    if module.startswith("featurestore"):
        assert "stages" not in tops
        assert "torch" not in tops or module == "featurestore.dataset"
    if module.startswith("stages.models"):
        ours = {name for name in imported if name.split(".")[0] in ("featurestore", "stages")}
        assert all(name.startswith("stages.models") for name in ours)
        assert not tops & {"accelerate", "h5py", "pandas", "click"}


def test_files_stay_readable_in_one_sitting() -> None:
    for path in [*SOURCES, ROOT / "pipeline.py"]:
        assert len(path.read_text().splitlines()) <= 350, path


def test_parameters_are_checked_without_the_libraries_that_few_stages_need() -> None:
    """Every command checks them first; each of these takes a second to import."""
    code = (
        "import sys; from pathlib import Path; from stages.commands.options import check_params; from stages.common.config import read_params\n"
        "check_params(read_params(Path('stages/presets/quickstart.yaml')), 'it')\n"
        "print(*({'matplotlib', 'sklearn', 'timm', 'torch.distributed.fsdp', 'torchvision', 'umap'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == ""
