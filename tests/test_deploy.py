"""What lies in deploy/: each file is read by the tool or the schema it is for, and fits the command and the flow.

No container, cluster or GPU is started here. Linters that are programs of their own are run where they are installed.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import typer.core
import typer.main
import yaml
from distributed import LocalCluster
from prefect.cli.deploy._models import PrefectYamlModel, RawScheduleConfig
from prefect.client.schemas.objects import ConcurrencyLimitStrategy
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.server.events.schemas.automations import EventTrigger as ServerTrigger
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.utilities.importtools import import_object

from flows.command import app
from flows.segment import segment
from segcore.cluster import ClusterFile
from segcore.spec import parse_bytes

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
YAML = sorted([*DEPLOY.glob("**/*.yaml")])
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
KINDS = {"Deployment": ("spec",), "CronJob": ("spec", "jobTemplate", "spec")}
#: The folders that every way of deploying agrees on.
SCENES, OUT = "/data/scenes", "/data/out"


def tool(name: str) -> str:
    """A linter, beside this Python or on the path; skips the test where there is none."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def lint(*command: object) -> str:
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


# Every file


def test_every_yaml_file_loads_and_names_no_key_twice() -> None:
    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> Any:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: a key stands twice in {keys}"
        loader.flatten_mapping(node)
        return loader.construct_mapping(node, deep=True)

    Strict.add_constructor("tag:yaml.org,2002:map", mapping)
    assert len(YAML) > 15
    for path in YAML:
        assert list(yaml.load_all(path.read_text(), Strict)), path


SUBCOMMANDS = ("run", "plan", "check", "report", "status", "model", "demo", "prefect")


def commands() -> Iterator[tuple[Path, list[str]]]:
    """Every call of `segflow` in deploy/, as words: in lists of YAML, and in texts, past continued lines."""
    for path in sorted(DEPLOY.glob("**/*")):
        if not path.is_file():
            continue
        text = path.read_text()
        if path.suffix == ".yaml":
            for document in yaml.safe_load_all(text):
                for words in lists(document):
                    if words[:1] == ["segflow"] and words[1:2] and words[1] in SUBCOMMANDS:
                        yield path, [str(word) for word in words[1:]]
        text = re.sub(r"\\\n[#\s]*", " ", text)
        for found in re.finditer(
            r"(?:^|[\s`/])segflow ((?:run|plan|check|report|status|model|demo)\b[^\n`|&;)]*)", text
        ):
            yield path, found[1].split()


def lists(node: Any) -> Iterator[list[Any]]:
    if isinstance(node, list):
        yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from lists(inner)


def test_the_command_knows_every_option_that_is_used() -> None:
    command = typer.main.get_command(app)
    used = list(commands())
    assert {path.name for path, words in used if words[0] == "run"} >= {
        "segflow.service", "segflow.sbatch", "nightly.yaml", "Dockerfile", "Dockerfile.cuda", "README.md", "local.yaml"
    }  # fmt: skip
    for path, words in used:
        inner, rest = command, words
        while isinstance(inner, typer.core.TyperGroup):
            assert rest, f"{path}: `segflow {' '.join(words)}` lacks a command"
            assert rest[0] in inner.commands, f"{path}: there is no `segflow {' '.join(words)}`"
            inner, rest = inner.commands[rest[0]], rest[1:]
        known = {flag for option in inner.params for flag in [*option.opts, *option.secondary_opts]}
        options = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        assert options <= known, f"{path}: `segflow {words[0]}` has no {', '.join(sorted(options - known))}"


def test_no_secret_stands_in_a_file() -> None:
    for path in [path for path in DEPLOY.glob("**/*") if path.is_file()]:
        for line in path.read_text().splitlines():
            found = re.fullmatch(
                r"\s*(?:- )?(\w*(?:password|auth|token|api_key)\w*)\s*[:=]\s*(\S.*)", line, re.IGNORECASE
            )
            assert found is None or found[2].startswith("${") or found[2] == "false", f"{path}: {line}"
    assert ".env" in (DEPLOY / ".gitignore").read_text().split()


# Prefect


def deployments() -> dict[str, dict[str, Any]]:
    document = yaml.safe_load((DEPLOY / "prefect.yaml").read_text())
    return {item["name"]: item for item in document["deployments"]}


def test_prefect_understands_the_deployments() -> None:
    model = PrefectYamlModel.model_validate(yaml.safe_load((DEPLOY / "prefect.yaml").read_text()))
    assert [item.name for item in model.deployments] == [
        "nightly", "on-demand", "one-scene", "nightly-docker", "nightly-kubernetes"
    ]  # fmt: skip
    known = set(PrefectYamlModel.model_fields) | {"prefect-version", "definitions"}
    assert set(yaml.safe_load((DEPLOY / "prefect.yaml").read_text())) <= known
    for item in model.deployments:
        raw = deployments()[str(item.name)]
        assert set(raw) <= set(type(item).model_fields), "Prefect ignores keys that it does not know"
        assert item.description
        assert "segflow" in (item.tags or [])
        limit = item.concurrency_limit
        assert limit is not None and not isinstance(limit, int)  # noqa: PT018
        assert limit.collision_strategy in {strategy.value for strategy in ConcurrencyLimitStrategy}
        if str(item.name).startswith("nightly"):
            assert (limit.limit, limit.collision_strategy) == (1, "CANCEL_NEW")
            (schedule,) = item.schedules or ()
            assert isinstance(schedule, RawScheduleConfig)
            assert CronSchedule(cron=str(schedule.cron), timezone=schedule.timezone).cron == "0 2 * * *"
        else:
            assert not item.schedules
        assert item.work_pool is not None
        assert int(item.work_pool.job_variables["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) >= 30
    assert len({item.work_pool.name for item in model.deployments if item.work_pool}) == 3


@pytest.mark.parametrize("name", deployments())
def test_the_flow_takes_the_parameters_of_every_deployment(name: str) -> None:
    given = deployments()[name]["parameters"]
    assert set(given) <= set(inspect.signature(segment.fn).parameters)
    whole = {"scenes": ["a.tif"]} | given
    assert segment.validate_parameters(whole).items() >= whole.items()
    assert parse_bytes(given["memory"]) > 0


def test_the_working_directory_is_where_the_flow_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pull step itself, with this checkout in place of /srv/segflow."""
    monkeypatch.chdir(tmp_path)
    (step,) = yaml.safe_load((DEPLOY / "prefect.yaml").read_text())["pull"]
    ((name, arguments),) = step.items()
    assert arguments["directory"] == "/srv/segflow"
    outputs = import_object(name)(directory=str(ROOT))
    assert outputs["directory"] == str(Path.cwd()) == str(ROOT)
    for item in deployments().values():
        file, _, flow = item["entrypoint"].partition(":")
        assert Path(file).exists()
        assert flow == segment.fn.__name__


def automation(name: str) -> tuple[AutomationCore, dict[str, Any]]:
    raw = yaml.safe_load((DEPLOY / "automations" / name).read_text())
    model = AutomationCore.model_validate(raw)
    assert set(raw) <= set(AutomationCore.model_fields)
    assert set(raw["trigger"]) <= set(EventTrigger.model_fields)
    return model, raw


def event(name: str, resource: str, flow: str = "segflow") -> ReceivedEvent:
    related = [
        {"prefect.resource.id": "prefect.flow.1", "prefect.resource.role": "flow", "prefect.resource.name": flow}
    ]
    return ReceivedEvent.model_validate(
        {"event": name, "resource": {"prefect.resource.id": resource}, "related": related,
         "occurred": datetime.now(UTC), "id": "01912f2c-0000-7000-8000-000000000000", "received": datetime.now(UTC)}
    )  # fmt: skip


def test_an_automation_tells_of_every_product() -> None:
    model, raw = automation("product-finished.yaml")
    (action,) = model.actions
    assert isinstance(action, SendNotification)
    trigger = ServerTrigger.model_validate(raw["trigger"])
    finished = event("segflow.product.finished", "segflow.product.a")
    assert trigger.covers(finished)
    assert trigger.expects(finished.event)
    assert not trigger.covers(event("segflow.product.finished", "prefect.flow-run.1"))
    assert not trigger.expects("segflow.scene.failed")


def test_an_automation_closes_runs_whose_process_was_killed() -> None:
    model, raw = automation("killed-runs.yaml")
    (action,) = model.actions
    assert isinstance(action, ChangeFlowRunState)
    assert action.state.value == "CRASHED"
    assert isinstance(model.trigger, EventTrigger)
    assert model.trigger.posture == Posture.Proactive
    slowest = max(int(item["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
                  for item in deployments().values())  # fmt: skip
    assert model.trigger.within.total_seconds() >= 3 * slowest
    trigger = ServerTrigger.model_validate(raw["trigger"])
    beat = event("prefect.flow-run.heartbeat", "prefect.flow-run.1")
    assert trigger.covers(beat)
    assert trigger.starts_after(beat.event)
    for last in ("heartbeat", "Completed", "Failed", "Cancelled", "Crashed"):
        assert trigger.expects(f"prefect.flow-run.{last}"), last
    assert not trigger.expects("prefect.flow-run.Cancelling"), "whoever dies while it cancels is noticed, too"
    assert not trigger.covers(event("prefect.flow-run.heartbeat", "prefect.flow-run.1", "another flow"))
    assert segment.name == raw["trigger"]["match_related"]["prefect.resource.name"]


@pytest.mark.slow
def test_a_real_server_takes_deployments_and_automations(tmp_path: Path) -> None:
    script = """
        import json, os, subprocess, sys
        from pathlib import Path
        import yaml
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.actions import WorkPoolCreate
        from prefect.events.schemas.automations import AutomationCore
        from prefect.settings import PREFECT_API_URL
        from prefect.testing.utilities import prefect_test_harness
        root, deploy = Path(sys.argv[1]), Path(sys.argv[1]) / "deploy"
        with prefect_test_harness(server_startup_timeout=180), get_client(sync_client=True) as client:
            for name in ("segflow", "segflow-docker", "segflow-kubernetes"):
                client.create_work_pool(WorkPoolCreate(name=name, type="process"))
            subprocess.run([sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file",
                            "deploy/prefect.yaml"], check=True, cwd=root, stdout=sys.stderr,
                           env=os.environ | {"PREFECT_API_URL": PREFECT_API_URL.value()})
            for path in (deploy / "automations").iterdir():
                client.create_automation(AutomationCore.model_validate(yaml.safe_load(path.read_text())))
            found = client.read_deployments()
            print(json.dumps({
                "deployments": {d.name: [
                    d.entrypoint, d.global_concurrency_limit.limit, d.concurrency_options.collision_strategy.value,
                    [[s.schedule.cron, s.schedule.timezone, s.active] for s in d.schedules], d.parameters,
                    d.pull_steps[0], d.work_pool_name] for d in found},
            }))
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(ROOT)], capture_output=True, text=True, timeout=300,
        check=False,
        env=clean | {"PREFECT_HOME": str(tmp_path), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-4000:]
    found = json.loads(ended.stdout.strip().splitlines()[-1])["deployments"]
    assert set(found) == set(deployments())
    for name, (entrypoint, limit, strategy, schedules, parameters, pull, pool) in found.items():
        wanted = deployments()[name]
        assert entrypoint == wanted["entrypoint"]
        assert {"limit": limit, "collision_strategy": strategy} == wanted["concurrency_limit"]
        assert schedules == ([["0 2 * * *", "Europe/Berlin", True]] if name.startswith("nightly") else [])
        assert parameters == wanted["parameters"]
        assert pull == {"prefect.deployments.steps.set_working_directory": {"directory": "/srv/segflow"}}
        assert pool == wanted["work_pool"]["name"]


# Docker


def instructions(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, without comments and with continued lines joined."""
    text = re.sub(r"(?m)^\s*#.*\n", "", path.read_text())
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


DOCKERFILES = [DEPLOY / "docker" / name for name in ("Dockerfile", "Dockerfile.cuda")]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_pinned_small_and_unprivileged(path: Path) -> None:
    steps = instructions(path)
    assert {word for word, _ in steps} <= {
        "ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "LABEL", "USER", "STOPSIGNAL", "ENTRYPOINT", "CMD"
    }  # fmt: skip
    arguments = dict(rest.partition("=")[::2] for word, rest in steps if word == "ARG")
    bases = [rest.split()[0].replace("${PYTHON}", arguments["PYTHON"]) for word, rest in steps if word == "FROM"]
    assert len(bases) == 2
    assert all(re.fullmatch(r"python:3\.1[1-9]\.\d+-slim-\w+", base) for base in bases), bases
    last = max(i for i, (word, _) in enumerate(steps) if word == "FROM")
    final = steps[last:]
    assert not any("pip " in rest or "build-essential" in rest for _, rest in final), (
        "nothing is built in the last stage"
    )
    (user,) = [rest for word, rest in final if word == "USER"]
    assert int(user.partition(":")[0]) > 0
    written = {word: rest for word, rest in final if word in ("ENTRYPOINT", "CMD")}
    assert json.loads(written["ENTRYPOINT"]) == ["/usr/bin/tini", "--"], "the exec form, so that SIGTERM arrives"
    assert json.loads(written["CMD"])[0] == "segflow"
    assert "tini" in " ".join(rest for word, rest in final if word == "RUN")
    installs = [
        call for word, rest in steps if word == "RUN" for call in re.split("&&|;", rest) if "pip install" in call
    ]
    for call in installs:
        assert "--constraint constraints.txt" in call or re.search(r"--no-deps \"[\w-]+==\$\{\w+\}\"", call), call
    labels = " ".join(rest for word, rest in final if word == "LABEL")
    for name in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{name}=" in labels


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_an_image_copies_is_there_and_not_ignored(path: Path) -> None:
    kept = {
        line[1:] for line in path.with_name(f"{path.name}.dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    sources = {
        source.rstrip("/")
        for word, rest in instructions(path)
        if word == "COPY" and "--from=" not in rest
        for source in rest.split()[:-1]
    }
    assert sources == kept
    for source in sources:
        assert (ROOT / source).exists()
    assert {"segcore", "flows", "pyproject.toml", "constraints.txt"} <= sources


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    lint(tool("hadolint"), path)


# Compose


def test_every_service_is_whole() -> None:
    """The parts of the Compose specification that are used, key by key, and what they refer to."""
    known = {
        "image", "restart", "read_only", "tmpfs", "cap_drop", "security_opt", "networks", "stop_grace_period",
        "environment", "volumes", "healthcheck", "build", "command", "ports", "depends_on", "profiles", "working_dir",
        "deploy",
    }  # fmt: skip
    assert {key for key in COMPOSE if not key.startswith("x-")} == {"name", "services", "networks", "volumes"}
    for name, service in COMPOSE["services"].items():
        assert set(service) <= known, name
        assert service["restart"] == ("no" if name == "setup" else "unless-stopped")
        assert re.fullmatch(r"\d+s", service["stop_grace_period"])
        assert int(service["stop_grace_period"][:-1]) > 10, "longer than segflow needs to drain"
        assert re.fullmatch(r"segflow:cpu|postgres:\d+\.\d+-\w+", service["image"])
        assert set(service["networks"]) <= set(COMPOSE["networks"])
        if name not in ("setup", "dask"):
            check = service["healthcheck"]
            assert set(check) <= {"test", "interval", "timeout", "retries", "start_period"}
            assert check["test"][0] in ("CMD", "CMD-SHELL")
        for other, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            assert "healthcheck" in COMPOSE["services"][other]
        for volume in service.get("volumes", ()):
            source, target = re.sub(r"\$\{\w+:\?[^}]*\}", "$", volume).split(":")[:2]
            assert source == "$" or source in COMPOSE["volumes"] or (DEPLOY / source).exists(), volume
            assert target.startswith("/")
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), "what is published is for this machine"
        assert all(isinstance(value, str) for value in service.get("environment", {}).values()), name
    build = COMPOSE["services"]["server"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).exists()
    for name in ("scheduler", "dask"):
        assert COMPOSE["services"][name]["networks"] == ["inside"], "dask runs whatever it is sent"
        assert "ports" not in COMPOSE["services"][name]
    assert COMPOSE["networks"]["inside"]["internal"] is True
    for name in ("worker", "dask"):
        targets = {volume.rpartition("}:")[2] for volume in COMPOSE["services"][name]["volumes"]}
        assert targets == {f"{SCENES}:ro", OUT}, "the same paths wherever tiles are labelled"


def test_the_example_names_every_variable_of_compose() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", text))
    named = set(re.findall(r"(?m)^(\w+)=", (DEPLOY / "env.example").read_text()))
    assert used == named
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert {"POSTGRES_PASSWORD", "PREFECT_AUTH", "SCENES", "OUT"} == required


# Kubernetes


def manifests() -> list[tuple[Path, dict[str, Any]]]:
    base = DEPLOY / "kubernetes" / "base"
    names = yaml.safe_load((base / "kustomization.yaml").read_text())["resources"]
    assert {path.name for path in base.iterdir()} == {*names, "kustomization.yaml"}
    return [(base / name, document) for name in names for document in yaml.safe_load_all((base / name).read_text())]


def pods() -> dict[str, dict[str, Any]]:
    found = {}
    for _, document in manifests():
        if document["kind"] in KINDS:
            spec = document
            for key in KINDS[document["kind"]]:
                spec = spec[key]
            found[document["metadata"]["name"]] = spec["template"]
    return found


@pytest.mark.parametrize("name", pods())
def test_pods_are_unprivileged_bounded_and_refer_to_what_is_there(name: str) -> None:
    template = pods()[name]
    pod = template["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["terminationGracePeriodSeconds"] > 10
    assert pod["automountServiceAccountToken"] is False
    claims = {d["metadata"]["name"] for _, d in manifests() if d["kind"] == "PersistentVolumeClaim"}
    maps = {d["metadata"]["name"] for _, d in manifests() if d["kind"] == "ConfigMap"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for volume in volumes.values():
        assert "emptyDir" in volume or volume["persistentVolumeClaim"]["claimName"] in claims
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
        }  # fmt: skip
        assert container["image"] == "segflow"
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
        assert "command" not in container, "the entry point hands signals on"
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) == set(volumes)
        assert mounts["scratch"] == "/tmp"
        assert mounts.get("scenes", SCENES) == SCENES
        assert mounts.get("products", OUT) == OUT
        for source in container["envFrom"]:
            assert source.get("configMapRef", {}).get("name") in maps or source["secretRef"]["optional"]


def test_what_selects_finds_its_pods() -> None:
    labels = [template["metadata"]["labels"] for template in pods().values()]
    for path, document in manifests():
        spec = document.get("spec", {})
        selector = (
            spec.get("selector", {}) if document["kind"] in ("Deployment", "Service") else spec.get("podSelector")
        )
        if selector:
            wanted = selector.get("matchLabels", selector)
            found = [own for own in labels if own.items() >= wanted.items()]
            assert len(found) == (4 if document["kind"] == "NetworkPolicy" else 1), path
        if document["kind"] == "Service":
            ports = {port["name"] for port in pods()[document["metadata"]["name"]]["spec"]["containers"][0]["ports"]}
            assert {port["targetPort"] for port in spec["ports"]} <= ports
    (worker,) = pods()["dask-worker"]["spec"]["containers"]
    assert "tcp://dask-scheduler:8786" in worker["args"]


def test_the_nightly_job_is_alone_and_ends() -> None:
    ((_, job),) = [found for found in manifests() if found[1]["kind"] == "CronJob"]
    spec = job["spec"]["jobTemplate"]["spec"]
    assert job["spec"]["concurrencyPolicy"] == "Forbid"
    assert job["spec"]["timeZone"] == "Europe/Berlin"
    (container,) = spec["template"]["spec"]["containers"]
    ignored, ended = spec["podFailurePolicy"]["rules"]
    assert ignored["action"] == "Ignore", "first, since an evicted pod ends with 75, too"
    assert ended["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [1, 2, 75]}
    ((_, settings),) = [found for found in manifests() if found[1]["kind"] == "ConfigMap"]
    data = settings["data"]
    assert all(isinstance(value, str) for value in data.values())
    assert set(re.findall(r"\$\((\w+)\)", " ".join(container["args"]))) <= set(data)
    assert spec["activeDeadlineSeconds"] > int(data["SEGFLOW_STOP_AFTER"].rstrip("h")) * 3600
    limit = container["resources"]["limits"]["memory"].replace("Gi", "GiB")
    assert parse_bytes(limit) >= 1.5 * parse_bytes(data["SEGFLOW_MEMORY"])


def test_kustomize_builds_base_and_overlay(tmp_path: Path) -> None:
    kubectl = tool("kubectl")
    for folder in ("base", "overlays/gpu"):
        built = list(yaml.safe_load_all(lint(kubectl, "kustomize", DEPLOY / "kubernetes" / folder)))
        assert len(built) == len(manifests())
        assert all(d["kind"] == "Namespace" or d["metadata"]["namespace"] == "segflow" for d in built)
        named = {d["metadata"]["name"]: d for d in built if d["kind"] in KINDS}
        worker = named["dask-worker"]["spec"]["template"]["spec"]["containers"][0]
        job = named["nightly"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
        for container in (worker, job):
            assert container["image"] == ("segflow:cpu" if folder == "base" else "segflow:cuda")
            assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (folder != "base")
            assert container["resources"]["limits"]["memory"] == "6Gi"


def test_manifests_keep_the_schemas_of_kubernetes() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for path, document in manifests():
        try:
            validate.validate(document, validate.latest_version(), strict=True)
        except validate.ValidationError as error:
            pytest.fail(f"{path}: {error}")


# Clusters


@pytest.mark.parametrize("path", [*DEPLOY.glob("clusters/*.yaml"), DEPLOY / "slurm/cluster.yaml"], ids=lambda p: p.stem)
def test_segflow_reads_every_cluster_file(path: Path) -> None:
    described = ClusterFile.read(str(path))
    if described.kind == "local":
        assert set(described.options) <= set(inspect.signature(LocalCluster.__init__).parameters)
    if described.kind in ("slurm", "pbs"):
        assert described.maximum is not None
        assert parse_bytes(described.options["memory"]) > 0
        lifetime = described.options["worker_extra_args"]
        assert "--lifetime" in lifetime
        hours, minutes, _ = map(int, described.options["walltime"].split(":"))
        left, stagger = (
            int(lifetime[lifetime.index(word) + 1].rstrip("m")) for word in ("--lifetime", "--lifetime-stagger")
        )
        assert left + stagger <= 60 * hours + minutes, "workers leave before the batch system ends them"


@pytest.mark.parametrize("kind", ["slurm", "pbs"])
def test_batch_systems_take_the_options(kind: str) -> None:
    jobqueue = pytest.importorskip("dask_jobqueue")
    path = DEPLOY / ("slurm/cluster.yaml" if kind == "slurm" else "clusters/pbs.yaml")
    with getattr(jobqueue, f"{kind.upper()}Cluster")(**ClusterFile.read(str(path)).options) as cluster:
        assert "--lifetime 225m" in cluster.job_script()


# Slurm

SBATCH = DEPLOY / "slurm" / "segflow.sbatch"


def test_bash_and_shellcheck_find_nothing() -> None:
    lint("bash", "-n", SBATCH)
    lint(tool("shellcheck"), SBATCH)


@contextlib.contextmanager
def slurm_job(folder: Path, does: str, restarts: str = "0") -> Iterator[subprocess.Popen[bytes]]:
    """The script itself in bash, with programs that stand for segflow (`does`) and Slurm; nothing outlives it."""
    for name, body in (("segflow", does), ("scontrol", f'echo "$@" > {folder}/requeued')):
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    given = {"SCENES": "a.tif", "MODEL": "m", "OUT": str(folder), "SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": restarts}
    environment = os.environ | given | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    job = subprocess.Popen(["bash", str(SBATCH)], env=environment, cwd=folder, start_new_session=True)
    try:
        yield job
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(75, "0", True), (75, "50", False), (0, "0", False), (1, "0", False), (2, "0", False)],
)
def test_a_slurm_job_comes_back_only_where_it_was_stopped(
    tmp_path: Path, code: int, restarts: str, requeued: bool
) -> None:
    with slurm_job(tmp_path, f"exit {code}", restarts) as job:
        assert job.wait(30) == (0 if requeued else code)
    assert (tmp_path / "requeued").exists() == requeued


def test_a_slurm_job_hands_sigterm_on_and_waits_until_segflow_has_drained(tmp_path: Path) -> None:
    drains = f"trap 'sleep 1; touch {tmp_path}/drained; exit 75' TERM; touch {tmp_path}/up; while :; do sleep 0.1; done"
    with slurm_job(tmp_path, drains) as job:
        until = time.monotonic() + 30
        while not (tmp_path / "up").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        assert job.wait(30) == 0
    assert (tmp_path / "drained").exists()
    assert (tmp_path / "requeued").read_text().split() == ["requeue", "17"]


def test_slurm_ends_the_job_later_than_segflow_drains() -> None:
    asked = dict(re.findall(r"(?m)^#SBATCH --([\w-]+)(?:=(\S+))?$", SBATCH.read_text()))
    assert re.fullmatch(r"B:TERM@\d+", asked["signal"])
    assert int(asked["signal"].partition("@")[2]) > 60
    assert "requeue" in asked
    memory = re.search(r"MEMORY:-(\w+)\}", SBATCH.read_text())
    assert memory is not None
    assert parse_bytes(asked["mem"].replace("G", "GiB")) >= 1.5 * parse_bytes(memory[1])


# systemd


def unit(name: str) -> dict[str, list[str]]:
    lines = re.sub(r"\\\n\s*", " ", (DEPLOY / "systemd" / name).read_text()).splitlines()
    found: dict[str, list[str]] = {}
    for key, sign, value in (line.partition("=") for line in lines if not line.startswith("#")):
        if sign:
            found.setdefault(key, []).append(value)
    return found


def test_the_service_knows_what_the_exit_codes_mean() -> None:
    service, timer = unit("segflow.service"), unit("segflow.timer")
    assert service["SuccessExitStatus"] == ["75"]
    assert service["Restart"] == ["on-abnormal"], "1 and 2 would end so again; Type=oneshot takes no `always`"
    assert int(service["TimeoutStopSec"][0]) > 10
    assert timer["Persistent"] == ["true"]
    (command,) = service["ExecStart"]
    defined = dict(
        line.split("=", 1) for line in (DEPLOY / "systemd/segflow.env").read_text().splitlines() if "=" in line
    )
    assert set(re.findall(r"\$\{(\w+)\}", command)) == set(defined)
    assert defined["SEGFLOW_OUT"] in service["ReadWritePaths"]
    assert parse_bytes(service["MemoryMax"][0] + "iB") >= 1.5 * parse_bytes(defined["SEGFLOW_MEMORY"])


def test_systemd_verifies_the_units(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    for name in ("segflow.service", "segflow.timer"):
        text = (DEPLOY / "systemd" / name).read_text()
        (tmp_path / name).write_text(text.replace("/opt/segflow/bin/segflow", shutil.which("true") or "/bin/true"))
    said = lint(analyze, "verify", tmp_path / "segflow.service", tmp_path / "segflow.timer")
    assert "segflow" not in said, said
    assert "Normalized form: *-*-* 02:00:00" in lint(analyze, "calendar", unit("segflow.timer")["OnCalendar"][0])


# The page


def test_the_page_tells_of_every_folder_and_names_files_that_are_there() -> None:
    text = (DEPLOY / "README.md").read_text()
    for path in DEPLOY.iterdir():
        if not path.name.startswith(".") and path.name != "README.md":
            assert path.name in text, f"deploy/README.md does not tell of {path.name}"
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (DEPLOY / target).exists(), target
