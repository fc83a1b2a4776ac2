"""The site of the documentation: `make docs` makes it without a warning, and it is whole."""
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lapse
import lapse.testing

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "build/site"


@pytest.fixture(scope="module")
def site():
    """The pages of the site, {path: text}."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    make = functools.partial(subprocess.run, cwd=ROOT, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
                             check=False)
    environment = make(["make", f"PYTHON={sys.executable}", "build/stamps/lapse", "build/stamps/environment-docs"])   # pip may warn
    assert environment.returncode == 0, environment.stdout
    done = make(["make", f"PYTHON={sys.executable}", "docs"])
    assert done.returncode == 0 and "WARNING" not in done.stdout, done.stdout
    return {path.relative_to(SITE).as_posix(): path.read_text(encoding="utf-8") for path in SITE.rglob("*.html")}


def test_every_page_is_there(site):
    pages = [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/README.md"), *ROOT.glob("docs/*.md")]
    assert {path.relative_to(ROOT).with_suffix(".html").as_posix() for path in pages} <= set(site)
    assert 'url=README.html"' in site["index.html"]


def test_links_within_the_site(site):
    """Also those that the theme makes."""
    links = 0
    for name, text in site.items():
        for target in re.findall(r'(?:href|src)="([^"#?]+)', text):
            if not re.match(r"https?:|mailto:|data:", target):
                assert (SITE / name).parent.joinpath(target).exists(), f"{name} links to {target}"
                links += 1
    assert links > 100


def test_nothing_comes_from_another_server(site):
    for name, text in site.items():
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", text):
            assert not re.search(r'(?:src|href)="(?:https?:)?//', tag), f"{name}: {tag}"
    for path in [*SITE.rglob("*.css"), *SITE.rglob("*.js")]:
        assert not re.search(r"@import\s+[\"']http|url\([\"']?(?:https?:)?//", path.read_text(encoding="utf-8")), path


def test_the_reference_has_the_docstrings(site):
    reference = re.sub(r"<[^>]+>", "", site["docs/reference.html"])
    for module in (lapse, lapse.testing):
        for name in set(module.__all__) - {"__version__"}:
            assert f'id="{module.__name__}.{name}"' in site["docs/reference.html"], name
    assert 'id="lapse.Worker.pull_sample"' in site["docs/reference.html"]
    assert "Relocate keys to this node." in reference and "Bit i of `changed` counts a push" in reference


def test_mistakes_fail(tmp_path, site):
    """A page that is not there, a section that is not there, an unknown name, a page that nobody gets to."""
    (tmp_path / "lapse").symlink_to(ROOT / "lapse")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/README.md"), *ROOT.glob("bindings/*.py"),
                 *(ROOT / name for name in ("LICENSE", "NOTICE", "CITATION.cff"))]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    (tmp_path / "docs/env.md").write_text("# Environment variables\n\n## The job\n\n[a](nosuch.md) [b](api.md#nosuch) "
                                          "{py:func}`lapse.nosuch`\n")
    (tmp_path / "docs/lost.md").write_text("# Lost\n")
    done = subprocess.run([ROOT / "build/docs/bin/python", "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "--conf-dir",
                           tmp_path / "docs", tmp_path, tmp_path / "site"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=300, check=False)
    assert done.returncode != 0
    warnings = [line for line in done.stdout.splitlines() if "WARNING" in line]
    assert len(warnings) == 4, done.stdout
    for line, place in zip(sorted(warnings), ("docs/env.md", "docs/env.md", "docs/env.md", "docs/lost.md")):
        assert place in line, done.stdout
