"""Carry out a Dockerfile's steps without Docker: `tools/try_dockerfile.py FOLDER [--target STAGE]`; needs root and debootstrap.

Knows what this project's Dockerfile uses: FROM debian:SUITE-slim or an earlier stage, RUN, COPY, ENV, WORKDIR, USER, CMD. Each stage is a
folder below FOLDER, with Debian's smallest system in it, and its RUN lines are run in it by chroot. Tries the last one, and prints its
size. It is no container: processes, users and network are those of this machine.
"""
import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CERTIFICATES = Path("etc/ssl/certs/ca-certificates.crt")        # as the machine's own package registries may need it
MOUNTS = ("proc", "dev")


def instructions(path):
    """The words of a Dockerfile: (line, name, rest), with continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "\n", path.read_text(encoding="utf-8")))
    for line in filter(str.strip, text.splitlines()):
        name, _, rest = line.strip().partition(" ")
        yield name.upper(), rest.strip()


class Stage:
    """One FROM of the file."""

    def __init__(self, folder, suite=None, base=None):
        self.folder, self.suite = folder, suite or base.suite
        self.env = dict(base.env) if base else {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        self.workdir, self.user, self.command = (base.workdir, base.user, base.command) if base else ("/", "0", [])

    def inside(self, path):
        """Where a path of the image is here."""
        return self.folder / str(Path(self.workdir, path)).lstrip("/")

    def run(self, line):
        """Run a line by the image's sh, as the image's user."""
        for name in MOUNTS:
            subprocess.run(["mount", "--rbind", f"/{name}", self.folder / name], check=True)
            subprocess.run(["mount", "--make-rslave", self.folder / name], check=True)
        added = [Path("etc/resolv.conf")]
        if not (self.folder / CERTIFICATES).exists():
            added.append(CERTIFICATES)
        try:
            for name in added:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path("/") / name, self.folder / name)
            registries = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
            command = [shutil.which("chroot"), f"--userspec={self.user}:{self.user}", self.folder, "/bin/sh", "-c",
                       f"cd {shlex.quote(self.workdir)} && {line}"]
            done = subprocess.run(command, env={"DEBIAN_FRONTEND": "noninteractive", **registries, **self.env}, check=False)
        finally:
            for name in added:
                (self.folder / name).unlink(missing_ok=True)
            for name in reversed(MOUNTS):
                subprocess.run(["umount", "--lazy", "--recursive", self.folder / name], check=True)
        if done.returncode:
            sys.exit(f"try_dockerfile: exit code {done.returncode} of RUN {line}")


def bootstrap(suite, folder):
    """Debian's smallest system, copied from one that is made once."""
    base = folder.parent / f"debian-{suite}"
    if not base.exists():
        subprocess.run(["debootstrap", "--variant=minbase", suite, f"{base}.part"], check=True, stdout=subprocess.DEVNULL)
        Path(f"{base}.part").rename(base)
    subprocess.run(["cp", "-a", base, folder], check=True)


def begin(rest, stages, folder):
    """FROM: a new stage."""
    words = rest.split()
    name = words[2] if len(words) == 3 else "last"
    place = folder / f"stage-{name}"
    if place.exists():
        shutil.rmtree(place)
    if words[0] in stages:
        subprocess.run(["cp", "-a", stages[words[0]].folder, place], check=True)
        stages[name] = Stage(place, base=stages[words[0]])
    else:
        suite = re.fullmatch(r"debian:(\w+)-slim", words[0])[1]
        bootstrap(suite, place)
        stages[name] = Stage(place, suite)
    return stages[name]


def copy(stage, rest, stages):
    """COPY, out of the tree (what git knows, and what is new) or out of another stage."""
    found = re.fullmatch(r"(?:--from=(\w+) )?(\S+) (\S+)", rest)
    target = stage.inside(found[3])
    target.mkdir(parents=True, exist_ok=True)
    if found[1]:
        subprocess.run(["cp", "-a", f"{stages[found[1]].inside(found[2])}/.", target], check=True)
        return
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
                           check=True).stdout
    archive = subprocess.run(["tar", "--null", "--files-from=-", "-cf", "-"], cwd=ROOT, input=names, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-xf", "-", "-C", target], input=archive, check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the stages go; several hundred megabytes")
    parser.add_argument("--target", default="last", help="the last stage to make")
    options = parser.parse_args()
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        parser.error("needs root and debootstrap (apt-get install debootstrap)")
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    stages, stage = {}, None
    for name, rest in instructions(ROOT / "Dockerfile"):
        if name == "FROM":
            if stage is not None and stage is stages.get(options.target):
                break
            stage = begin(rest, stages, folder)
        elif name == "RUN":
            print(f"RUN {rest}", flush=True)
            stage.run(rest)
        elif name == "COPY":
            copy(stage, rest, stages)
        elif name == "ENV":
            stage.env.update(word.split("=", 1) for word in shlex.split(rest))
        elif name == "WORKDIR":
            stage.workdir = rest
            stage.inside(".").mkdir(parents=True, exist_ok=True)
        elif name == "USER":
            stage.user = rest
        elif name == "CMD":
            stage.command = json.loads(rest)
        else:
            sys.exit(f"try_dockerfile: {name} is not known here")
    size = subprocess.run(["du", "-sm", stage.folder], capture_output=True, text=True, check=True).stdout.split()[0]
    print(f"CMD {shlex.join(stage.command)}", flush=True)
    if stage.command[0] == "python":
        stage.run(shlex.join(stage.command))
        stage.run("test $(id -u) != 0 && ! command -v gcc cc")
        stage.run("python -m lapse run -s 2 lapse-mf -d $(python -m lapse data)/mf -r 2 -e 5")
    print(f"{stage.folder}: {size} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
