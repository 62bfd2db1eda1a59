"""What a package index gets: the name, the version, the description, and what is in it."""

from __future__ import annotations

import email
import importlib
import os
import re
import subprocess
import sys
import zipfile
from email.message import Message
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import ma_client
import modelaverage
from modelaverage import errors
from ps_server.__main__ import main as ps_server_main
from ps_worker.__main__ import main as ps_worker_main
from ps_worker.launch import main as ma_launch_main
from tests.distribution import ROOT, build, copy_of_the_tree, source_files

NAME = "torch-model-average"
TAKEN = "modelaverage"  # belongs to another project on the package index
PACKAGES = {"ma_client", "modelaverage", "ps_server", "ps_worker"}
RELATIVE_LINK = re.compile(r"\]\((?![a-z]+:|#)[^)]*\)")


class Built:
    """Both distributions of the tree as it is."""

    def __init__(self, folder: Path) -> None:
        tree = copy_of_the_tree(folder / "tree")
        self.sdist, self.wheel = build(tree, folder)
        with zipfile.ZipFile(self.wheel) as wheel:
            self.wheel_files = set(wheel.namelist())
            info = f"{NAME.replace('-', '_')}-{modelaverage.__version__}.dist-info"
            self.metadata: Message = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
            self.entry_points = wheel.read(f"{info}/entry_points.txt").decode()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("built"))


def texts() -> dict[str, str]:
    """The project's files that people read, by path."""
    found = {}
    for path in source_files():
        try:
            found[path.as_posix()] = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return found


# The name.


def installs_what_is_taken(text: str) -> bool:
    command = rf"\b(?:pip3?|pipx|uv|conda|poetry|pdm) (?:pip )?(?:install|add)\b[^\n]*?[\s'\"]{TAKEN}(?![\w/.-])"
    extra = rf"(?<![\w/.-]){TAKEN}\[[a-z,]+\](?!\s*=)"
    return re.search(f"{command}|{extra}", text) is not None


@pytest.mark.parametrize(
    "text",
    ["pip install {}", "pip install '{}[watch]'", 'pip install -U "{}"', "uv add {}", "uv pip install {}", "{}[torch]"],
)
def test_advice_to_install_the_taken_name_is_recognized(text: str) -> None:
    assert installs_what_is_taken(text.format(TAKEN))
    assert not installs_what_is_taken(text.format(NAME))


def test_nobody_is_told_to_install_the_name_that_is_taken() -> None:
    assert [path for path, text in texts().items() if installs_what_is_taken(text)] == []


def test_what_people_are_told_to_install_is_this_distribution(built: Built) -> None:
    extras = set(built.metadata.get_all("Provides-Extra", []))
    told = {
        (path, extra)
        for path, text in texts().items()
        for names in re.findall(rf"{NAME}\[([a-z,]+)\]", text)
        for extra in names.split(",")
    }
    assert {path for path, _ in told} > {"docs/observability.md", "ma_client/__init__.py", "ps_server/console/watch.py"}
    assert {(path, extra) for path, extra in told if extra not in extras} == set()


# The version.


@pytest.mark.parametrize("package", [ma_client, modelaverage])
def test_what_is_imported_has_the_version_of_the_distribution(package: ModuleType, built: Built) -> None:
    assert package.__version__ == built.metadata["Version"]


@pytest.mark.parametrize(
    ("main", "program"),
    [
        (ps_server_main, "ps-server"),
        (ps_worker_main, "ps-worker"),
        (ma_launch_main, "ma-launch"),
        (None, "conformance"),
    ],
    ids=["ps-server", "ps-worker", "ma-launch", "conformance"],
)
def test_every_command_says_its_version(
    main: object, program: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ps_worker.launch.end_at_once_on_signals", lambda: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")
    if main is None:
        main = importlib.import_module("modelaverage.conformance.__main__").main
        program = "python -m modelaverage.conformance"
    assert callable(main)
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{program} {modelaverage.__version__}\n"


def test_the_changelog_has_the_version(built: Built) -> None:
    version = str(built.metadata["Version"])
    sections = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sections[0].startswith("Unreleased" if ".dev" in version else version)


# The public names.


def test_every_exception_is_exported() -> None:
    faults = {name for name in errors.__all__ if name.endswith("Error")}
    assert faults >= {fault.exception.__name__ for fault in errors.FAULTS.values()}
    assert faults | {"Reason"} <= set(ma_client.__all__)


def test_every_export_is_there() -> None:
    for name in ma_client.__all__:
        assert getattr(ma_client, name) is not None
        assert name in dir(ma_client)


def test_the_reference_has_every_export_and_nothing_else() -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: ma_client\.(\w+)$", page, re.MULTILINE)) == ma_client.__all__
    assert page.count(":::") == len(ma_client.__all__)


def test_without_torch_the_optimizer_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import ma_client; print(ma_client.ParameterServerSession.__name__)\n"
    )
    code += "from ma_client import ModelAverageOptimizer"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert done.stdout == "ParameterServerSession\n"
    assert done.stderr.splitlines()[-1].startswith("ImportError: ModelAverageOptimizer needs torch (")
    assert done.stderr.endswith(f"pip install '{NAME}[torch]'\n")


# The contents.


def test_the_wheel_has_the_packages_and_the_commands_and_nothing_else(built: Built) -> None:
    assert built.metadata["Name"] == NAME
    assert {path.partition("/")[0] for path in built.wheel_files} - PACKAGES == {
        f"{NAME.replace('-', '_')}-{built.metadata['Version']}.dist-info"
    }
    assert {f"{package}/py.typed" for package in PACKAGES} <= built.wheel_files
    assert "modelaverage/v1/parameter_server.proto" in built.wheel_files
    for command in ("ps-server = ps_server.__main__:main", "ps-worker = ps_worker.__main__:main"):
        assert command in built.entry_points
    assert "ma-launch = ps_worker.launch:main" in built.entry_points


def test_every_module_is_in_the_wheel(built: Built) -> None:
    ours = {path for path in source_files() if path.suffix == ".py"}
    expected = {
        path.as_posix().removeprefix("proto/")
        for path in ours
        if path.as_posix().removeprefix("proto/").partition("/")[0] in PACKAGES
    }
    assert expected <= built.wheel_files


def test_every_file_of_the_page_is_in_the_wheel(built: Built) -> None:
    page = {path.as_posix() for path in source_files() if path.is_relative_to("ps_server/page/static")}
    assert "ps_server/page/static/index.html" in page
    assert page <= built.wheel_files


def test_the_source_distribution_has_all_that_the_tests_need(built: Built) -> None:
    missing = {path.as_posix() for path in source_files()} - {path.as_posix() for path in source_files(built.sdist)}
    assert missing == set()


def test_versions_of_python_are_named_one_by_one(built: Built) -> None:
    named = [
        match[1]
        for classifier in built.metadata.get_all("Classifier", [])
        if (match := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", classifier))
    ]
    assert f">={named[0]}" == built.metadata["Requires-Python"]
    assert named == [f"3.{minor}" for minor in range(10, 10 + len(named))]
    assert f"Python {named[0]} to {named[-1]}" in (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")


# The description.


def test_the_description_has_no_link_that_leads_nowhere(built: Built) -> None:
    assert built.metadata["Description-Content-Type"] == "text/markdown"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert RELATIVE_LINK.search(readme)
    description = str(built.metadata.get_payload())
    assert RELATIVE_LINK.findall(description) == []
    for block in re.findall(r"^```.*?^```$", readme, re.MULTILINE | re.DOTALL):
        assert block in description
    for path in re.findall(r"`((?:docs|docker|examples)/[\w./-]+)`", description):
        assert (ROOT / path).exists()


def test_with_a_repository_the_description_links_there(tmp_path: Path) -> None:
    tree = copy_of_the_tree(tmp_path / "tree")
    project = (tree / "pyproject.toml").read_text(encoding="utf-8")
    address = "https://example.org/somebody/torch-model-average"
    urls = f'[project.urls]\nRepository = "{address}"\n\n[project.optional-dependencies]'
    (tree / "pyproject.toml").write_text(project.replace("[project.optional-dependencies]", urls), encoding="utf-8")
    code = "from setuptools import build_meta; print(build_meta.prepare_metadata_for_build_wheel('.'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, timeout=60, check=True
    )
    metadata = email.message_from_string((tree / done.stdout.splitlines()[-1] / "METADATA").read_text(encoding="utf-8"))
    description = str(metadata.get_payload())
    assert RELATIVE_LINK.findall(description) == []
    links = re.findall(rf"\]\({re.escape(address)}/blob/HEAD/([^)#]*)", description)
    assert {"docs/cluster.md", "docker/README.md"} <= set(links)
    assert [link for link in links if not (ROOT / link).exists()] == []


# The site.


@pytest.mark.skipif(find_spec("mkdocstrings") is None, reason="mkdocs is not installed: the extra `docs`")
def test_the_site_has_every_page_and_no_broken_link(tmp_path: Path) -> None:
    tree = copy_of_the_tree(tmp_path / "tree")
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)],
        cwd=tree,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (site / "docs" / "reference" / "index.html").read_text(encoding="utf-8")
    for name in ma_client.__all__:
        assert re.search(rf'id="(ma_client|modelaverage)\.[\w.]*\b{name}"', reference), name
    # A docstring's sections and a method's own words.
    for text in ("local steps between two meetings at the barrier", "One round now", "There is no center yet"):
        assert text in reference
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / "docs" / page.stem / "index.html").exists()
    assert (site / "index.html").exists()
    for path in site.rglob("*.html"):
        assert "```" not in path.read_text(encoding="utf-8"), f"{path} has a block of code that was not recognized"


def test_a_site_is_not_part_of_the_project() -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (folder,) = re.findall(r"^site_dir: (\S+)$", settings, re.MULTILINE)
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert f"{folder.partition('/')[0]}/" in ignored


def test_the_images_get_all_that_building_reads() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"}
    assert {
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "setup.py",
        "proto",
        "ma_client",
        "ps_server",
        "ps_worker",
    } <= kept
