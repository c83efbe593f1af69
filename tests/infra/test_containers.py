"""The Dockerfile and the compose file, read without a Docker engine."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from compose_spec import PyCompose

from flows import cli
from pipeline.config import JobConfig

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
DOCKERFILE = INFRA / "Dockerfile"
FILES = ["compose.yaml", "compose.gpu.yaml"]
VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)(?::([-?])([^}]*))?\}")


def compose(name: str, values: dict[str, str] | None = None) -> dict[str, Any]:
    """A compose file with its variables replaced: by values, else by their defaults."""

    def value(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        return (values or {}).get(name, rest if kind == "-" else f"some-{name.lower()}")

    return dict(yaml.safe_load(VARIABLE.sub(value, (INFRA / name).read_text())))


def secrets() -> dict[str, str]:
    """What infra/secrets.sh prints."""
    printed = subprocess.run([INFRA / "secrets.sh"], capture_output=True, text=True, timeout=20, check=True).stdout
    return dict(line.split("=", 1) for line in printed.splitlines() if not line.startswith("#"))


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines()]


def test_hadolint_has_nothing_to_say() -> None:
    command = [Path(sys.executable).with_name("hadolint"), DOCKERFILE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_what_is_copied_is_there_and_sent_to_the_engine() -> None:
    copied = {
        name
        for kind, text in instructions()
        if kind == "COPY" and not text.startswith("--from")
        for name in shlex.split(text)[:-1]
    }
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    assert copied >= {"pyproject.toml", "constraints.txt", *packages}
    sent = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    assert sent[1] == "*", "everything is left out but what is named"
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in sent, name


def test_the_image_is_small_and_has_no_rights_and_no_secret() -> None:
    bases = [text.split()[0] for kind, text in instructions() if kind == "FROM"]
    assert set(bases) == {"python:${PYTHON}", "build-${VARIANT}"}
    defaults = [text for kind, text in instructions() if kind == "ARG"]
    assert [text for text in defaults if re.fullmatch(r"PYTHON=3\.\d+\.\d+-slim-bookworm", text)]
    last = max(number for number, (kind, _) in enumerate(instructions()) if kind == "FROM")
    users = [text for kind, text in instructions()[last:] if kind == "USER"]
    assert users == ["10001:10001"]
    assert [kind for kind, _ in instructions()[last:]].count("HEALTHCHECK") == 1
    named = " ".join(text for kind, text in instructions() if kind in ("ENV", "ARG"))
    assert not re.search("TOKEN|SECRET|PASSWORD|ACCESS_KEY", named)


def test_dependencies_come_from_the_tested_set() -> None:
    installs = [text for kind, text in instructions() if kind == "RUN" and "pip install" in text]
    assert len(installs) == 2
    assert "-c constraints.txt" in installs[0]
    assert "--no-deps" in installs[1]
    # What the sed line of the CPU variant makes of the constraints.
    assert re.search(r"^torch==[\d.]+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pip_resolves_what_the_image_installs(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=120)
    command = [tmp_path / "venv" / "bin" / "python", "-m", "pip", "install", "--dry-run", "-q", "--report", "-"]
    done = subprocess.run(
        [*command, "-c", "constraints.txt", "."], cwd=ROOT, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = yaml.safe_load(done.stdout)
    wanted = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in report["install"]}
    pins = dict(
        line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert {name: wanted[name].partition("+")[0] for name in ("torch", "ray", "prefect")} == {
        name: pins[name] for name in ("torch", "ray", "prefect")
    }


@pytest.mark.parametrize("name", FILES)
def test_compose_files_hold_to_the_specification(name: str) -> None:
    document = compose(name, {"RAY_WORKER_GPUS": "all"} if name == "compose.gpu.yaml" else None)
    PyCompose.from_yaml(yaml.safe_dump(document, sort_keys=False))
    document["services"]["ray-worker"]["comand"] = ["a typing error"]
    with pytest.raises(ValueError, match="comand"):
        PyCompose.from_yaml(yaml.safe_dump(document, sort_keys=False))


def test_all_that_compose_names_is_there() -> None:
    document = compose("compose.yaml")
    assert document["x-fixative"]["build"]["dockerfile"] == "infra/Dockerfile"
    assert (INFRA / document["x-fixative"]["build"]["context"] / "infra" / "Dockerfile").is_file()
    used = set()
    for service in document["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (INFRA / source).exists() or source == "./job.yaml", source
            else:
                used.add(source)
        assert service.get("depends_on", {}).keys() <= document["services"].keys()
    assert used == document["volumes"].keys()
    JobConfig.model_validate(yaml.safe_load((INFRA / "job.example.yaml").read_text()))


def test_pages_are_on_the_loopback_address_only() -> None:
    ports = {name: service.get("ports", []) for name, service in compose("compose.yaml")["services"].items()}
    assert {name for name, published in ports.items() if published} == {
        "ray-head", "prefect-server", "s3", "prometheus", "grafana"
    }  # fmt: skip
    assert all(port.startswith("127.0.0.1:") for published in ports.values() for port in published)


def test_services_are_pinned_watched_and_come_back() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name, service in compose("compose.yaml")["services"].items():
        image, _, tag = service["image"].partition(":")
        assert re.match(r"v?\d+\.\d+", tag), name
        if image == "fixative":
            assert tag == f"{version}-cpu"
        else:
            assert service["healthcheck"]["test"][0] == "CMD", name
        assert service["restart"] == "unless-stopped"
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_secrets_are_asked_for_and_printed_at_random() -> None:
    text = (INFRA / "compose.yaml").read_text()
    asked = {name for name, kind, _ in VARIABLE.findall(text) if kind == "?"}
    first, second = secrets(), secrets()
    assert asked <= first.keys()
    random = asked - {"S3_ACCESS_KEY"}
    assert all(first[name] != second[name] and len(first[name]) >= 48 for name in random)
    for name, service in compose("compose.yaml", first)["services"].items():
        spoken = yaml.safe_dump({key: part for key, part in service.items() if key != "environment"})
        assert not any(first[secret] in spoken for secret in random), name
    # Names that a default makes known in both files.
    assert first.keys() - asked <= {name for name, *_ in VARIABLE.findall(text)}


def test_commands_know_the_options_that_infra_gives_them() -> None:
    given = [INFRA / "compose.yaml", *(INFRA / "k8s").rglob("*.yaml")]
    calls = [call for path in given for call in re.findall(r"fixative (serve|protect) ([^\n&`]*)", path.read_text())]
    assert {name for name, _ in calls} == {"serve", "protect"}
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for name, rest in calls:
        known = {"--help", *(option for parameter in commands[name].params for option in parameter.opts)}
        assert set(re.findall(r"--[\w-]+", rest)) <= known, f"{name} {rest}"
