"""The manifest for Kubernetes, run here as its pods would be; the Dockerfile, read by the tool that carries it out without Docker."""
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launched import DEADLINE
from tools import try_dockerfile

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def manifest():
    with (ROOT / "docs/kubernetes.yaml").open() as file:
        return list(yaml.safe_load_all(file))


def pods(manifest):
    """(pod specification, completion index) of every pod that the jobs start."""
    for job in manifest:
        if job["kind"] == "Job":
            for index in range(job["spec"].get("completions", 1)):
                yield job["spec"]["template"]["spec"], index


def variables(container, index, **over):
    """The environment of a container, as the kubelet expands it: $(NAME) of what stands before."""
    made = {}
    for entry in container["env"]:
        value = entry.get("value")
        if value is None:
            assert "job-completion-index" in entry["valueFrom"]["fieldRef"]["fieldPath"]
            value = str(index)
        made[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda found: made[found[1]], value)
    return made | {name: value for name, value in over.items() if name in made}


def test_manifest_is_one_job(manifest):
    """What is said twice is said alike, and nothing runs as root or with more rights than it needs."""
    nodes, = (job["spec"] for job in manifest if job["metadata"]["name"] == "lapse-nodes")
    service, = (item for item in manifest if item["kind"] == "Service")
    labels = next(job for job in manifest if job["metadata"]["name"] == "lapse-scheduler" and job["kind"] == "Job")
    assert service["spec"]["selector"] == labels["spec"]["template"]["metadata"]["labels"]
    assert nodes["completions"] == nodes["parallelism"]
    for pod, index in pods(manifest):
        told = variables(pod["containers"][0], index)
        assert told["DMLC_NUM_SERVER"] == str(nodes["completions"]) and told["DMLC_PS_ROOT_URI"] == service["metadata"]["name"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        assert [mount["name"] for mount in pod["containers"][0]["volumeMounts"]] == ["key"]        # not those of the others


def test_manifest_runs(manifest, tmp_path, port):
    """Init containers and containers as processes: folders for the volumes, an address of this host for the service's name."""
    keys = tmp_path / "keys"
    base = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8"}
    commands = tmp_path / "bin"         # as in an environment in which lapse is installed
    commands.mkdir()
    for name, line in {"python": f'exec "{sys.executable}" "$@"', "lapse-mf": f'exec "{sys.executable}" -m lapse mf "$@"'}.items():
        (commands / name).write_text(f"#!/bin/sh\n{line}\n")
        (commands / name).chmod(0o755)
    base["PATH"] = f"{commands}:{base['PATH']}"
    subprocess.run([sys.executable, "-m", "lapse", "keys", "-s", "2", keys], check=True, env=base, stdout=subprocess.DEVNULL, timeout=60)
    for file in keys.iterdir():
        file.chmod(0o440)               # as fsGroup makes them, which a member refuses
    processes = []
    try:
        for number, (pod, index) in enumerate(pods(manifest)):
            own = tmp_path / f"key-{number}"
            own.mkdir()
            init, container = pod["initContainers"][0], pod["containers"][0]
            bring = variables(init, index, DMLC_PS_ROOT_URI="127.0.0.1", FROM=str(keys), TO=str(own))
            subprocess.run(init["command"], env=base | bring, check=True, timeout=60)
            assert stat.S_IMODE((own / "own.key").stat().st_mode) == 0o400
            told = variables(container, index, DMLC_PS_ROOT_URI="127.0.0.1", DMLC_PS_ROOT_PORT=str(port))
            told["LAPSE_KEYS"] = told["LAPSE_KEYS"].replace("/key", str(own), 1)
            processes.append(subprocess.Popen(container["command"], env=base | told, cwd=tmp_path, stdout=subprocess.PIPE,
                                              stderr=subprocess.STDOUT, text=True))
        outputs = [process.communicate(timeout=DEADLINE)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0, 0], outputs
        assert "OK (2 nodes x 1 workers, 10 epochs" in "".join(outputs)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def test_dockerfile_is_of_known_steps():
    """All of its instructions are known to the tool that tries it; the images run as a user who is not root."""
    found = list(try_dockerfile.instructions(ROOT / "Dockerfile"))
    assert {name for name, _ in found} <= {"FROM", "RUN", "COPY", "ENV", "WORKDIR", "USER", "CMD"}
    stages = [rest.split()[2] for name, rest in found if name == "FROM" and " AS " in rest]
    for name, rest in found:
        if name == "COPY" and rest.startswith("--from="):
            assert re.match(r"--from=(\w+) ", rest)[1] in stages
    users = [rest for name, rest in found if name in ("USER", "FROM")]
    assert users[-1] == "1000"
    assert not [rest for _, rest in found if "-march" in rest]
