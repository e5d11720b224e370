"""What lies in deploy/ is well-formed and says what docs/deploy.md promises. Run by `make check`; asks no cluster."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

from jaxrank import cli

DEPLOY = Path(__file__).parent.parent / "deploy"
LINES = "{extends: default, rules: {line-length: {max: 120}, braces: {max-spaces-inside: 0}}}"


def lint() -> None:
    """The linters of Docker files and of YAML; they print what they find."""
    folder = Path(sys.executable).parent
    subprocess.run([folder / "hadolint", DEPLOY / "Dockerfile"], check=True)
    subprocess.run([folder / "yamllint", "--strict", "-d", LINES, DEPLOY], check=True)


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The templates of pods in a document."""
    if document["kind"] == "RayService":
        cluster = document["spec"]["rayClusterConfig"]
        return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    return [document["spec"]["template"]] if document["kind"] == "Deployment" else []


def check_schema(document: dict[str, Any]) -> None:
    """Kubernetes' own schemas, unknown fields refused; of a RayService, whose schema is KubeRay's, the pods in it."""
    if document["kind"] == "RayService":
        for i, template in enumerate(pods(document)):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod-{i}"}, "spec": template["spec"]}
            kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    else:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def check_pod(spec: dict[str, Any]) -> None:
    """Nobody is root, nothing is written but in volumes, memory is bounded; keys come from the secret."""
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    held = container["securityContext"]
    assert held["readOnlyRootFilesystem"]
    assert not held["allowPrivilegeEscalation"]
    assert held["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert {"/etc/jaxrank", "/cache", "/tmp"} <= set(mounts)
    (keys,) = [volume for volume in spec["volumes"] if volume["name"] == mounts["/etc/jaxrank"]]
    assert keys["secret"]["defaultMode"] == 0o440, "jaxrank complains of keys that everybody can read"


def check_server(spec: dict[str, Any]) -> None:
    """The command line is one that jaxrank takes, probes ask what they should, and the end has its time."""
    (container,) = spec["containers"]
    flags: argparse.Namespace = cli.parse(["serve", *container["args"]])
    assert flags.api_key_file == "/etc/jaxrank/keys"
    port = {port["name"]: port["containerPort"] for port in container["ports"]}["http"]
    assert port == flags.port
    asked = {name: container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert asked["livenessProbe"] == {"path": "/health", "port": "http"}
    assert asked["readinessProbe"] == asked["startupProbe"] == {"path": "/ready", "port": "http"}
    wait = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] >= wait + flags.shutdown_grace + 10
    chips = container["resources"]["limits"].keys() & {"nvidia.com/gpu", "google.com/tpu"}
    assert len(chips) == 1


def main() -> None:
    lint()
    count = 0
    for file in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text()):
            check_schema(document)
            for template in pods(document):
                check_pod(template["spec"])
                if document["kind"] == "Deployment":
                    check_server(template["spec"])
            count += 1
    assert count >= 7
    print(f"deploy: {count} Kubernetes documents, and a Dockerfile, are well-formed")


if __name__ == "__main__":
    main()
