"""The package as a whole: lazy names, a light import, the version, and the files that ship."""

import ast
import importlib
import importlib.metadata
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import crow_hf


ROOT = Path(crow_hf.__file__).parent
HEAVY = ("matplotlib", "peft", "datasets", "evaluate", "torch", "transformers")


def type_checking_imports():
    """Return the names imported under `if TYPE_CHECKING:`, with their modules."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return {alias.asname or alias.name: node.module for node in block.body for alias in node.names}


@pytest.mark.parametrize("module", ["crow_hf", "crow_hf.evaluation"])
def test_import_is_light(module):
    """Importing the package imports none of the heavy packages. A fresh process, because this one has them already."""
    script = f"import sys, {module}; sys.exit(','.join(name for name in {HEAVY} if name in sys.modules))"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.stderr.strip() == ""


@pytest.mark.parametrize(
    "imports",
    [
        "import crow_hf, transformers",
        pytest.param("import transformers, crow_hf", marks=pytest.mark.slow),
        pytest.param("import crow_hf, peft, evaluate, transformers", marks=pytest.mark.slow),
        pytest.param("import crow_hf, transformers.trainer", marks=pytest.mark.slow),
        pytest.param("import transformers; from crow_hf import purify", marks=pytest.mark.slow),
    ],
)
def test_models_are_registered_with_transformers(imports):
    """Fails if the Auto classes know the models only in some order of the imports."""
    script = f"{imports}; print(transformers.AutoConfig.for_model('coconut').model_type)"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.stdout.strip() == "coconut", process.stderr


def test_training_and_measuring_need_no_matplotlib():
    """Everything but the plots works without matplotlib, which is an extra."""
    script = (
        "import sys; sys.modules['matplotlib'] = None; import crow_hf; "
        "[getattr(crow_hf, name) for name in crow_hf.__all__]; import crow_hf.cli, crow_hf.arena.run"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_public_names_are_the_same_everywhere():
    """Fails if type checkers see a name that users cannot import, or the other way round."""
    assert set(crow_hf.__all__) == set(type_checking_imports())
    assert len(crow_hf.__all__) == len(set(crow_hf.__all__))
    assert set(crow_hf.__all__) == set(crow_hf._HOME_OF)
    assert set(crow_hf.__all__) <= set(dir(crow_hf))


@pytest.mark.parametrize("name", crow_hf.__all__)
def test_every_public_name_resolves_to_its_home(name):
    home = importlib.import_module(f"crow_hf.{type_checking_imports()[name]}")
    assert getattr(crow_hf, name) is getattr(home, name)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = crow_hf.no_such_name
    assert not hasattr(crow_hf, "torch")
    with pytest.raises(ImportError):
        exec("from crow_hf import no_such_name")


def test_star_import_works():
    namespace = {}
    exec("from crow_hf import *", namespace)
    assert set(crow_hf.__all__) <= namespace.keys()


def test_version_is_that_of_the_installed_package():
    assert crow_hf.__version__ == importlib.metadata.version("crow-hf")


def test_version_of_a_source_tree_is_unknown():
    """The package can be imported without being installed, and then does not claim a version."""
    script = (
        "import importlib.metadata as metadata\n"
        "installed = metadata.version\n"
        "def version(name):\n"
        "    if name == 'crow-hf':\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return installed(name)\n"
        "metadata.version = version\n"
        "import crow_hf\n"
        "print(crow_hf.__version__)"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.stdout.strip() == "0+unknown", process.stderr


def test_types_ship():
    assert (ROOT / "py.typed").is_file()


@pytest.mark.slow
def test_wheel_and_sdist_hold_everything(tmp_path):
    """Fails if the wheel or the sdist lacks a file that an editable install finds."""
    pytest.importorskip("setuptools")
    pytest.importorskip("build")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT.parent)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    metric = "crow_hf/evaluation/metrics/attack_success_rate/attack_success_rate.py"
    predictor = {f"crow_hf/models/default_entropy_predictor/{name}" for name in ("config.json", "model.safetensors")}
    files = [*ROOT.rglob("*.py"), *ROOT.rglob("*.jinja")]
    sources = {path.relative_to(ROOT.parent).as_posix() for path in files}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"crow_hf/py.typed", metric} | predictor | sources <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "examples"))]
    with tarfile.open(sdist) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    assert {"crow_hf/py.typed", metric, "pyproject.toml", "LICENSE"} | predictor | sources <= members
