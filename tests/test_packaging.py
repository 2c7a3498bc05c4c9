"""What an installation must hold: the C++ library, the command, and no folder that hides somebody else's package."""

import ctypes
import importlib.metadata
import importlib.resources
import importlib.util
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = "libfastppo_native.so"


def test_native_library_loads_and_has_the_abi_the_package_expects():
    from fastppo_kernels import native

    library = ctypes.CDLL(str(importlib.resources.files("fastppo_kernels") / LIBRARY))
    assert library.fastppo_abi_version() == native.ABI_VERSION


def test_library_needs_neither_python_nor_torch():
    """One build serves every version of both, as the wheel's `py3-none` tag promises."""
    library = Path(str(importlib.resources.files("fastppo_kernels") / LIBRARY)).read_bytes()
    for foreign in (b"libpython", b"libtorch", b"libc10"):
        assert foreign not in library, foreign


def test_kernels_folder_is_no_package():
    """transformers imports Hugging Face's `kernels`; an __init__.py in our folder of that name would hide it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("name", ["torch", "triton", "transformers"])
def test_no_folder_beside_the_packages_hides_a_dependency(name: str):
    for parent in (ROOT, ROOT / "kernels", ROOT / "tests"):
        assert not (parent / name).exists()
        assert not (parent / f"{name}.py").exists()


def test_hugging_face_kernels_is_not_shadowed():
    """Asked from the repository root, where a namespace package could be made of our `kernels/`."""
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    origin = run.stdout.strip()
    assert origin == "None" or Path(origin).is_relative_to(sysconfig.get_path("purelib")), origin


def test_the_command_is_declared():
    scripts = importlib.metadata.entry_points(group="console_scripts", name="fastppo")
    assert {script.value for script in scripts} == {"fastppo.__main__:main"}


def test_python_m_fastppo_is_the_command():
    assert importlib.util.find_spec("fastppo.__main__") is not None


@pytest.mark.slow
def test_wheel_holds_the_two_packages_the_library_and_nothing_else(tmp_path: Path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "-py3-none-" in wheel.name
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fastppo", "fastppo_kernels"}
    assert f"fastppo_kernels/{LIBRARY}" in names
    for package, folder in (("fastppo", ROOT / "fastppo"), ("fastppo_kernels", ROOT / "kernels" / "fastppo_kernels")):
        files = (*folder.rglob("*.py"), *folder.rglob("*.json"))  # the shapes of the benchmark are JSON
        sources = {f"{package}/{file.relative_to(folder).as_posix()}" for file in files}
        assert sources <= set(names), f"missing: {sorted(sources - set(names))}"
