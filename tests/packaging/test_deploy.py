"""What is in deploy/ parses, keeps its own promises, and names nothing that is not there."""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, ProcessCollector

from autoscaler.config import ScalerConfig
from kv_transfer.arena_upkeep import Census
from kv_transfer.store import StoreStats
from kv_transfer.store_totals import StoreTotals
from router.config import RouterConfig
from tandem.cluster_config import load_cluster_config, read_section
from tandem.domain import WorkerLoad
from tandem.engine.base import KvTotals
from tandem.errors import ConfigError
from tandem.telemetry import PredictionCollector, RemoteKvMetrics, RouterMetrics, ScalerMetrics, StoreCollector, WorkerCollector
from tests.dashboard import Query, dashboard, panels, queries
from tests.layers import ROOT

DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted((DEPLOY / "docker").glob("Dockerfile.*[!e]"))
INSTRUCTIONS = {"FROM", "RUN", "ARG", "ENV", "COPY", "WORKDIR", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def parsed(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text())
    return values


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Each instruction of a Dockerfile and its arguments; comments left out, continued lines joined."""
    text = "\n".join(line for line in dockerfile.read_text().splitlines() if not line.startswith("#"))
    lines = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip()]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def exposed() -> set[str]:
    """The name of every series that processes of ours expose; vLLM's are checked against a real engine, by the integration test."""
    registry = CollectorRegistry()
    RouterMetrics(registry)
    ScalerMetrics(registry)
    RemoteKvMetrics(registry)
    ProcessCollector(registry=registry)
    registry.register(PredictionCollector(tuple))
    registry.register(WorkerCollector(WorkerLoad, KvTotals, int, int))
    sizes = asdict(StoreStats(used_bytes=0, capacity_bytes=0, blocks=0)) | asdict(Census(granted_slots=0, leased_blocks=0, leaked_slots=0))
    tier = dict.fromkeys(("used_bytes", "capacity_bytes", "blocks", "up", "promoted_blocks", "demoted_blocks", "corrupt_blocks"), 0)
    registry.register(StoreCollector(lambda: sizes, lambda: asdict(StoreTotals()), lambda: {"disk": tier}))
    return {f"{family.name}{suffix}" for family in registry.collect() for suffix in SUFFIXES[family.type]}


# The cluster's TOML files.


@pytest.mark.parametrize("path", sorted((DEPLOY / "config").iterdir()), ids=lambda path: path.name)
def test_an_example_configuration_is_one(path: Path) -> None:
    keys = {"TANDEM_KEY_SEARCH": "sk-1", "TANDEM_KEY_BATCH": "sk-2", "TANDEM_KEY_OPS": "sk-3"}  # which one of them names
    config = load_cluster_config(path, {}, environ=keys)
    read_section(RouterConfig, config.router, "router.").validate()
    read_section(ScalerConfig, config.scaler, "scaler.").validate()


def test_the_example_of_two_models_has_one_that_goes_to_zero() -> None:
    steady, sleeper = load_cluster_config(DEPLOY / "config" / "two-models.toml", {}, environ={}).models
    assert (steady.min_prefill, steady.min_decode) == (None, None)
    assert (sleeper.min_prefill, sleeper.min_decode) == (0, 0)


def test_a_key_that_does_not_exist_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text((DEPLOY / "config" / "one-model.toml").read_text().replace("max_prefill", "most_prefill"))
    with pytest.raises(ConfigError, match="most_prefill"):
        load_cluster_config(path, {}, environ={})


# Prometheus and Grafana.


def test_prometheus_asks_the_router_what_there_is() -> None:
    (job,) = parsed("prometheus/prometheus.yml")["scrape_configs"]
    assert [found["url"] for found in job["http_sd_configs"]] == ["http://127.0.0.1:8480/sd"]
    assert "static_configs" not in job


def test_grafana_is_given_the_data_source_and_the_dashboard() -> None:
    (source,) = parsed("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    (provider,) = parsed("grafana/provisioning/dashboards/tandem.yml")["providers"]
    assert source["url"] == "${PROMETHEUS_URL}"
    mounts = parsed("compose/compose.yaml")["services"]["grafana"]["volumes"]
    assert f"../grafana/tandem.json:{provider['options']['path']}/tandem.json:ro" in mounts


def test_no_two_panels_have_the_same_id_or_place() -> None:
    everything = dashboard()["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    cells = [(x, y) for panel in everything for x in _span(panel, "x", "w") for y in _span(panel, "y", "h")]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def _span(panel: dict[str, Any], start: str, length: str) -> range:
    place = panel["gridPos"]
    return range(place[start], place[start] + place[length])


def test_every_panel_has_a_unit_and_a_description() -> None:
    assert [panel["title"] for panel in panels() if not panel["description"] or not panel["fieldConfig"]["defaults"]["unit"]] == []


def test_every_panel_asks_the_data_source_that_is_chosen() -> None:
    sources = [item["datasource"] for panel in panels() for item in (panel, *panel["targets"])]
    assert [source for source in sources if source != {"type": "prometheus", "uid": "${datasource}"}] == []
    assert [item["name"] for item in dashboard()["templating"]["list"]] == ["datasource", "cluster", "model"]


def test_the_dashboard_needs_no_plugin() -> None:
    assert {panel["type"] for panel in panels()} <= {"timeseries", "stat"}


@pytest.mark.parametrize("query", queries(), ids=lambda query: query.panel)
def test_a_query_asks_for_series_that_are_exposed(query: Query) -> None:
    assert query.metrics
    assert {name for name in query.metrics - exposed() - {"up"} if not name.startswith("vllm:")} == set()


@pytest.mark.parametrize("query", queries(), ids=lambda query: query.panel)
def test_a_legend_names_labels_that_the_query_keeps(query: Query) -> None:
    assert query.legend_labels <= query.labels


def test_a_series_that_nobody_exposes_would_be_seen() -> None:
    query = Query(panel="", text='sum(rate(tandem_router_nothing_total{cluster="a"}[1m]))', legend="")
    assert query.metrics - exposed() == {"tandem_router_nothing_total"}


# Containers.


def test_compose_runs_the_four_parts_each_with_a_health_check() -> None:
    services = parsed("compose/compose.yaml")["services"]
    assert set(services) == {"redis", "tandem", "prometheus", "grafana"}
    assert [name for name, service in services.items() if not service["healthcheck"]["test"]] == []


def test_compose_publishes_on_loopback_only() -> None:
    services = parsed("compose/compose.yaml")["services"]
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert ports
    assert [port for port in ports if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)] == []


def test_compose_waits_for_services_that_it_has() -> None:
    services = parsed("compose/compose.yaml")["services"]
    awaited = {name for service in services.values() for name in service.get("depends_on", ())}
    assert awaited <= set(services)


def test_compose_mounts_files_that_exist() -> None:
    compose = parsed("compose/compose.yaml")
    sources = {volume.split(":")[0] for service in compose["services"].values() for volume in service.get("volumes", ())}
    assert [name for name in sources - set(compose["volumes"]) if not (DEPLOY / "compose" / name).exists()] == []
    build = compose["services"]["tandem"]["build"]
    assert (DEPLOY / "compose" / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()


def test_compose_starts_redis_as_the_platform_itself_would() -> None:
    command = parsed("compose/compose.yaml")["services"]["redis"]["command"]
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"


def test_compose_changes_the_address_that_prometheus_has() -> None:
    (command,) = parsed("compose/compose.yaml")["services"]["prometheus"]["command"]
    match = re.search(r"sed 's\|([^|]+)\|([^|]+)\|'", command)
    assert match is not None
    assert match[1] in (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    assert match[2].split(":")[0] in parsed("compose/compose.yaml")["services"]


def test_there_is_a_dockerfile_for_each_list_of_requirements() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_has_known_instructions_and_ends_as_another_user_than_root(dockerfile: Path) -> None:
    found = instructions(dockerfile)
    assert {word for word, _ in found} <= INSTRUCTIONS
    assert found[0][0] == "FROM"
    assert [rest for word, rest in found if word == "USER"][-1] == "tandem"
    assert any(word == "HEALTHCHECK" and "/health" in rest for word, rest in found)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_copies_what_is_there_and_let_through(dockerfile: Path) -> None:
    copied = [name for word, rest in instructions(dockerfile) if word == "COPY" for name in shlex.split(rest)[:-1]]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    let_through = {line[1:] for line in (dockerfile.parent / f"{dockerfile.name}.dockerignore").read_text().splitlines() if line[0] == "!"}
    assert {name.split("/")[0] for name in copied} == let_through


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_holds_every_package(dockerfile: Path) -> None:
    copied = {name for word, rest in instructions(dockerfile) if word == "COPY" for name in shlex.split(rest)[:-1]}
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"} <= copied


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_installs_the_pins_and_nothing_they_do_not_name(dockerfile: Path) -> None:
    installs = [rest for word, rest in instructions(dockerfile) if word == "RUN" and "pip install" in rest]
    assert len(installs) == 2
    assert [rest for rest in installs if "--no-deps" not in rest] == []
    assert f"requirements/{dockerfile.suffix[1:]}.txt" in installs[0]


# Ray.

# Ray's own steps before `ray up` does anything, in a process of their own: Ray's modules warn while they are imported.
RAY_CHECK = """
import sys, yaml
from ray.autoscaler._private.util import prepare_config, validate_config
validate_config(prepare_config(yaml.safe_load(open(sys.argv[1]))))
"""


def ray_check(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", RAY_CHECK, str(path)], capture_output=True, text=True)


def test_ray_takes_the_cluster_file() -> None:
    result = ray_check(DEPLOY / "ray" / "cluster.yaml")
    assert result.returncode == 0, result.stderr[-2000:]


def test_ray_refuses_a_key_that_it_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text((DEPLOY / "ray" / "cluster.yaml").read_text().replace("file_mounts:", "files:"))
    assert "'files' was unexpected" in ray_check(path).stderr


# systemd.

UNIT = DEPLOY / "systemd" / "tandem.service"


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not on this machine")
    result = verify_unit(tmp_path, UNIT.read_text())
    assert (result.returncode, result.stderr) == (0, "")


def test_systemd_would_see_a_setting_that_it_does_not_know(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not on this machine")
    assert "Unknown" in verify_unit(tmp_path, UNIT.read_text().replace("ProtectSystem=", "ProtectSytem=")).stderr


def verify_unit(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """What systemd says to the unit, with a program that exists here and no page that must."""
    text = text.replace("/opt/tandem/.venv/bin/tandem", "/bin/true")
    unit = folder / "tandem.service"
    unit.write_text("".join(line for line in text.splitlines(keepends=True) if not line.startswith("Documentation=")))
    return subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)


def test_the_service_stops_as_ctrl_c_does_and_not_as_root() -> None:
    lines = UNIT.read_text().splitlines()
    assert {"User=tandem", "KillSignal=SIGTERM", "KillMode=mixed", "Restart=on-failure", "RuntimeDirectory=tandem"} <= set(lines)


def test_the_guides_name_files_that_exist() -> None:
    named = {
        (guide.name, link)
        for guide in (DEPLOY / "README.md", DEPLOY / "OPERATE.md")
        for link in re.findall(r"`((?:deploy|requirements)/[\w./-]+\w)`", guide.read_text())
    }
    assert named
    assert [pair for pair in named if not (ROOT / pair[1]).exists()] == []
