"""The architecture: which folder may import which, and how large a file may become."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from stages.common.sources import file_of, imported_modules
from tests.imports import ROOT

# A folder, or a module directly in stages/, imports only from the lines below its own.
DIRECTION = (
    ("pipeline",),
    ("commands",),
    ("prepare", "extract", "train_gan", "train_decoder", "report", "use", "studies", "estimate"),
    ("augment", "datasets", "reporting"),
    ("training",),
    ("gan",),
    ("segmentation",),
    ("data",),
    ("backbones", "models"),
    ("common",),
    ("featurestore",),
)
LEVEL = {name: level for level, names in enumerate(DIRECTION) for name in names}
SOURCES = sorted(
    [*ROOT.glob("featurestore/**/*.py"), *ROOT.glob("stages/**/*.py"), ROOT / "pipeline.py"]
)


def module_of(path: Path) -> str:
    """Dotted name of a source file; a package's own name for its ``__init__``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def folder_of(module: str) -> str:
    """The folder of a module, or the module itself where it is directly in stages/."""
    top, *inside = module.split(".")
    return inside[0] if top == "stages" and inside else top


def own_imports(path: Path) -> set[str]:
    """Modules of this project that a file imports; not the packages that contain the file."""
    module = module_of(path)
    return {
        name
        for name in imported_modules(path)
        if file_of(name) and name != "stages" and not f"{module}.".startswith(f"{name}.")
    }


def test_folders_import_in_one_direction() -> None:
    arrows = Counter(
        (folder_of(module_of(path)), folder_of(name))
        for path in SOURCES
        for name in own_imports(path)
        if module_of(path) != "stages" and folder_of(module_of(path)) != folder_of(name)
    )
    print("\n".join(f"{here:14} -> {there:14} {count}" for (here, there), count in arrows.items()))
    wrong = [f"{here} -> {there}" for here, there in arrows if LEVEL[here] >= LEVEL[there]]
    assert not wrong


def test_no_module_imports_itself_through_others() -> None:
    graph = {module_of(path): own_imports(path) for path in SOURCES}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(SOURCES)


def test_stages_holds_at_most_eight_modules() -> None:
    assert len(list(ROOT.glob("stages/*.py"))) <= 8


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_libraries_stay_where_they_belong(path: Path) -> None:
    module, tops = module_of(path), {name.split(".")[0] for name in imported_modules(path)}
    if module.startswith("featurestore"):
        assert "torch" not in tops or module == "featurestore.dataset"
    if module.startswith("stages.models"):
        assert not tops & {"accelerate", "h5py", "pandas", "click", "featurestore"}


def test_files_stay_readable_in_one_sitting() -> None:
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= 450, path


@pytest.mark.medium
def test_parameters_are_checked_without_the_libraries_that_few_stages_need() -> None:
    """Every command checks them first; each of these takes a second to import."""
    code = (
        "import sys; from pathlib import Path\n"
        "from stages.commands.options import load_params\n"
        "load_params(Path('params.yaml'))\n"
        "heavy = {'matplotlib', 'sklearn', 'timm', 'torchvision', 'umap'}\n"
        "heavy.add('torch.distributed.fsdp')\n"
        "print(*(heavy & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == ""
