"""The commands of the router: ``serve``, what an operator asks a running one for, and ``simulate``.

Everything but typer is imported inside the commands.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sllm_vllm.cli.output import (
    age,
    command_group,
    one_line,
    or_dash,
    print_done,
    print_json,
    print_section,
    print_table,
)
from sllm_vllm.cli.store import Json, log_to_stderr, with_options

if TYPE_CHECKING:
    from sllm_vllm.router.admin.client import AdminClient
    from sllm_vllm.router.config.problems import Problem
    from sllm_vllm.router.config.text import Document


Url = Annotated[
    str | None,
    typer.Option("--url", help="The router's address. Default: SLLM_URL, else this machine's router, else port 8000."),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--key-file",
        help="File with an admin key. Default: SLLM_ADMIN_KEY, else the router's own key in SLLM_NODE_DIR.",
    ),
]
ModelName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the model, from `sllm-vllm status`.")]


def add_router_commands(app: typer.Typer) -> None:
    """Register them at the top."""
    commands = (serve, status, requests, deploy, delete, story, explain, migrate, drain, undrain, reload, simulate)
    for command in commands:
        app.command()(command)
    app.add_typer(config_app)


config_app = command_group("config", "Check and describe the router's configuration.")


def _client(url: str | None, key_file: Path | None) -> AdminClient:
    from sllm_vllm.router.admin.client import AdminClient, find_url, read_admin_key

    found, was_said = find_url(url)
    return AdminClient(found, read_admin_key(key_file, is_elsewhere=was_said))


# --------------------------------------------------------------------------------------------------------- the process


def serve(config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The router's configuration file.")]) -> None:
    """Serve the models of CONFIG at one address.

    SIGTERM or SIGINT stops it; SIGHUP or `sllm-vllm reload` reloads CONFIG.
    """
    from sllm_vllm.router.daemon import serve as serve_router

    log_to_stderr()
    raise typer.Exit(serve_router(config))


@config_app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A configuration file of the router.")],
    as_json: Json = False,
) -> None:
    """Show every mistake in a configuration, with its line.

    Also checks directories, slots and keys on this machine. The exit code is 1 if `serve` would refuse the file.
    """
    from sllm_vllm.router.config.places import check_on_this_machine

    found = check_on_this_machine(file.expanduser())
    if as_json:
        problems = [_problem_record(problem) for problem in found.problems]
        print_json({"file": str(file), "is_valid": found.config is not None, "problems": problems})
    for problem in [] if as_json else found.problems:
        typer.echo(f"{file}: {'warning: ' if problem.is_warning else ''}{problem}")
    if found.config is None:
        raise typer.Exit(1)
    if not as_json:
        num_models = len(found.config.models)
        typer.echo(f"{file}: valid, {num_models} {'model' if num_models == 1 else 'models'}")


def _problem_record(problem: Problem) -> dict[str, object]:
    record = {"line": problem.line, "key": problem.key, "problem": problem.problem}
    return {**record, "severity": "warning" if problem.is_warning else "error"}


@config_app.command()
def schema() -> None:
    """Print every key of the router's configuration as a JSON schema."""
    from sllm_vllm.router.config.file import router_config_schema

    print_json(router_config_schema())


# -------------------------------------------------------------------------------------------------------------- status


def status(url: Url = None, key_file: KeyFile = None, as_json: Json = False) -> None:
    """Show models, replicas, nodes and how long the last starts took."""
    client = _client(url, key_file)
    facts = {**client.get("models"), **client.get("replicas"), **client.get("nodes")}
    if as_json:
        print_json(facts)
        return
    print_section("models", [_model_row(model) for model in facts["models"]], cut=("problem",))
    print_section("replicas", [_replica_row(replica) for replica in facts["replicas"]], cut=("model",))
    print_section("nodes", [_node_row(node) for node in facts["nodes"]])
    predictions = [(model["name"], model["prediction"]) for model in facts["models"] if model["prediction"]]
    print_section("last starts", [_start_row(name, prediction) for name, prediction in predictions], cut=("model",))


def requests(url: Url = None, key_file: KeyFile = None, as_json: Json = False) -> None:
    """Show unfinished requests, oldest first."""
    found = _client(url, key_file).get("requests")
    if as_json:
        print_json(found)
    else:
        print_section("requests", [_request_row(request) for request in found["requests"]], cut=("model",))


def _request_row(request: Mapping[str, Any]) -> dict[str, object]:
    where = {"replica": or_dash(request["replica"]), "moving to": or_dash(request["target"])}
    return {"request": request["id"], "model": request["model"], **where, "age": age(request["age_s"])}


def _model_row(model: Mapping[str, Any]) -> dict[str, object]:
    replicas = " ".join(f"{num} {state}" for state, num in model["replicas"].items() if num)
    back_off = model["back_off"]
    failed = "" if back_off is None else f"{back_off['num_failures']} failures in a row: {back_off['reason']}"
    counts = {"ongoing": model["ongoing"], "waiting": model["waiting"]}
    return {"model": model["name"], "replicas": replicas or "-", **counts, "problem": failed}


def _replica_row(replica: Mapping[str, Any]) -> dict[str, object]:
    report, ready_in_s = replica["report"], replica["ready_in_s"]
    start = report["start"] if report is not None else None
    phase = f" ({start['phase']})" if start is not None and ready_in_s is not None else ""
    return {
        "replica": replica["id"],
        "model": replica["model"],
        "node": replica["node"],
        "state": replica["state"] + phase,
        "for": age(replica["in_state_s"]),
        "ready in": "-" if ready_in_s is None else age(ready_in_s),
        "ongoing": replica["ongoing"],
    }


def _node_row(node: Mapping[str, Any]) -> dict[str, object]:
    slots = f"{node['num_slots'] - node['num_free']} of {node['num_slots']} used"
    loads = age(node["load_s"]) if node["load_s"] else "-"
    wait_s = node.get("warm_in_s", 0.0)
    soon = f"warm in {age(wait_s)}" if wait_s >= 1 else "warm"
    warm = "drained: none" if node["is_drained"] else soon if node["is_warm"] else "cold"
    return {"node": node["id"], "slots": slots, "loads for": loads, "starts": warm}


def _start_row(model: str, prediction: Mapping[str, Any]) -> dict[str, object]:
    kind = f"{prediction['kind']} {prediction['tier']} {'warm' if prediction['is_warm'] else 'cold'}"
    return {
        "model": model,
        "replica": prediction["replica"],
        "plan": kind,
        "ago": age(prediction["ago_s"]),
        "predicted": _seconds(prediction["expected_s"]),
        "took": _seconds(prediction["actual_s"]),
    }


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


# -------------------------------------------------------------------------------------------------------------- orders


def deploy(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE|-", help="YAML or JSON file with one model, or with a list under `models`; -: standard input."
        ),
    ],
    url: Url = None,
    key_file: KeyFile = None,
    *,
    as_json: Json = False,
) -> None:
    """Add or change models of a running router. Its configuration file is not changed.

    A file with `models` may have `defaults` for them, which take precedence over those of the router's configuration.
    """
    models = _read_models(file)
    client = _client(url, key_file)
    done: list[dict[str, Any]] = []
    for model in models:
        done.append(client.post("models", body=model))
        if not as_json:
            typer.echo(f"{done[-1]['done']}: {done[-1]['name']}")
            _warn(done[-1]["warnings"])
    if as_json:
        print_json(done)


def _read_models(file: str) -> list[dict[str, Any]]:
    """As the router reads them from its own file, `defaults` merged, and paths relative to the file."""
    from sllm_vllm.router.config.file import check_document
    from sllm_vllm.router.config.problems import InvalidConfig, Problem, below

    path = Path(file).expanduser()
    is_one = False
    try:
        document = _document_of(path, file)
        is_one = isinstance(document.values, dict) and "models" not in document.values
        if is_one:
            document = document.within(("models", 0), {"models": [document.values]})
        found = check_document(document, directory=Path.cwd() if file == "-" else path.absolute().parent)
        if found.config is None:
            raise InvalidConfig(found.problems)
        if not found.config.models:
            raise InvalidConfig([Problem(("models",), "there is no model in it")])
    except InvalidConfig as error:
        raise InvalidConfig(below(error.problems, ("models", 0)) if is_one else error.problems, file) from None
    return [model.model_dump(mode="json", exclude_unset=True) for model in found.config.models]


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)


def _document_of(path: Path, file: str) -> Document:
    from sllm_vllm.router.config.file import FILE_NBYTES_MAX, decode_text, parse_document, read_text

    if file == "-":
        text = decode_text(sys.stdin.buffer.read(FILE_NBYTES_MAX + 1), FILE_NBYTES_MAX)
    else:
        text = read_text(path, FILE_NBYTES_MAX)
    return parse_document(text, is_json=path.suffix == ".json")


def delete(name: ModelName, url: Url = None, key_file: KeyFile = None, *, as_json: Json = False) -> None:
    """Stop serving a model. Running requests are finished, waiting ones are refused.

    It stays deleted after a restart, until it is deployed or its entry in the configuration file is changed.
    """
    reply = _client(url, key_file).delete("models", name)
    print_done(reply, f"deleted: {reply['deleted']}", as_json=as_json)


def drain(
    target: Annotated[str, typer.Argument(metavar="ID", help="ID of a replica or a node.")],
    url: Url = None,
    key_file: KeyFile = None,
    *,
    as_json: Json = False,
) -> None:
    """Drain a replica, or all replicas of a node.

    A drained replica gets no new requests and ends after its last one. A drained node starts no replicas until
    `sllm-vllm undrain`, or until the router is restarted.
    """
    from sllm_vllm.router.admin.client import AdminError

    client = _client(url, key_file)
    try:
        reply = client.post("replicas", target, "drain")
        told = f"{reply['state']}: {reply['replica']} ({reply['ongoing']} requests)"
    except AdminError as error:
        if error.code != "replica_not_found":
            raise
        try:
            reply = client.post("nodes", target, "drain")
        except AdminError as second:
            raise (error if second.code == "node_not_found" else second) from None
        told = f"drained: {reply['node']} takes no starts; ending: {', '.join(reply['replicas']) or 'nothing'}"
    print_done(reply, told, as_json=as_json)


def migrate(
    request: Annotated[str, typer.Argument(metavar="REQUEST", help="ID of the request, from `sllm-vllm requests`.")],
    to: Annotated[str | None, typer.Option(help="Target replica. Default: the one with the fewest requests.")] = None,
    url: Url = None,
    *,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Move a running request to another replica. Its client does not notice."""
    reply = _client(url, key_file).post("requests", request, "migrate", body=None if to is None else {"to": to})
    print_done(reply, f"moving to {reply['target']}; to see the result: sllm-vllm story {request}", as_json=as_json)


def undrain(
    node: Annotated[str, typer.Argument(metavar="NODE", help="ID of the node, from `sllm-vllm status`.")],
    url: Url = None,
    key_file: KeyFile = None,
    *,
    as_json: Json = False,
) -> None:
    """Let replicas start on a drained node again."""
    reply = _client(url, key_file).post("nodes", node, "undrain")
    print_done(reply, f"undrained: {reply['node']} takes starts again", as_json=as_json)


def reload(url: Url = None, key_file: KeyFile = None, *, as_json: Json = False) -> None:
    """Reload the router's configuration file."""
    reply = _client(url, key_file).post("reload")
    print_done(reply, f"reloaded: {reply['changed']}", as_json=as_json)
    if not as_json:
        _warn(reply["warnings"])


# ---------------------------------------------------------------------------------------------------------------- why


def story(
    target: Annotated[str, typer.Argument(metavar="ID", help="A request, replica, model or node.")],
    url: Url = None,
    key_file: KeyFile = None,
    *,
    as_json: Json = False,
) -> None:
    """Show the last events about a request, replica, model or node."""
    found = _client(url, key_file).get("story", target)
    if as_json:
        print_json(found)
        return
    for event in found["events"]:
        typer.echo(f"{age(event['ago_s']):>8} ago  {event['kind']:<16}  {_fields(event['fields'])}")


def _fields(fields: Mapping[str, Any]) -> str:
    """What an event says, in one line, without what it does not say."""
    flat: dict[str, object] = {}
    for key, value in fields.items():
        flat |= value if isinstance(value, dict) else {key: value}
    said = [f"{key}={value}" for key, value in flat.items() if value not in (None, "", [], {})]
    return one_line(" ".join(said))


def explain(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model, from `sllm-vllm status`.")],
    url: Url = None,
    key_file: KeyFile = None,
    *,
    as_json: Json = False,
) -> None:
    """Show what would happen to a request for MODEL now, and why.

    Also shows how one more replica could start, and how the last prediction compares with the actual start.
    """
    found = _client(url, key_file).get("explain", name)
    if as_json:
        print_json(found)
        return
    request = found["request"]
    words = (request["what"], request["replica"], request["why"])
    expected = request["expected_s"]
    after = "" if expected is None else f" (in {expected:.2f} s)"
    typer.echo(f"a request now: {'  '.join(word for word in words if word)}{after}")
    print_section("plans for one more replica, seconds", [_plan_row(plan) for plan in found["plans"]])
    for prediction in found["under_way"]:
        _print_prediction("under way", prediction)
    if found["last"] is not None:
        _print_prediction("last start", found["last"])


def _plan_row(plan: Mapping[str, Any]) -> dict[str, object]:
    terms = {term: f"{seconds:.2f}" for term, seconds in plan["terms"].items()}
    stops = " ".join(plan["victims"]) or "-"
    where = {"": "*" if plan["is_best"] else "", "plan": plan["kind"], "node": plan["node"], "from": plan["tier"]}
    return {**where, **terms, "total": _seconds(plan["total_s"]), "stops": stops}


def _print_prediction(title: str, prediction: Mapping[str, Any]) -> None:
    typer.echo(f"\n{title}: {prediction['replica']} on {prediction['node']}, decided {age(prediction['ago_s'])} ago")
    print_table("seconds", _term_rows(prediction))


def _term_rows(prediction: Mapping[str, Any]) -> Sequence[Mapping[str, object]]:
    """Prediction against what happened."""
    total = {"term": "total", "expected_s": prediction["expected_s"], "actual_s": prediction["actual_s"]}
    return [_term_row(term) for term in (*prediction["terms"], total)]


def _term_row(term: Mapping[str, Any]) -> dict[str, object]:
    expected, actual = term["expected_s"], term["actual_s"]
    figures = {"predicted": f"{expected:.2f}", "took": or_dash(None if actual is None else f"{actual:.2f}")}
    return {"term": term["term"], **figures, "off by": "-" if actual is None else f"{actual - expected:+.2f}"}


# ---------------------------------------------------------------------------------------------------------- simulating


@dataclass(kw_only=True)
class SimulateOptions:
    """What ``simulate`` takes."""

    preset: Annotated[str, typer.Option(help="Cluster to simulate.")] = "paper"
    policies: Annotated[
        list[str] | None,
        typer.Option("--policy", help="Policy to simulate. Repeatable. Default: all that suit the cluster."),
    ] = None
    seeds: Annotated[int, typer.Option(min=1, max=10_000, help="Runs of each policy, each with its own seed.")] = 3
    requests: Annotated[int, typer.Option(min=1, max=10_000_000, help="Requests in each run.")] = 1000
    rate: Annotated[float | None, typer.Option(min=1e-6, help="Requests per second. Default: the preset's.")] = None
    trace: Annotated[Path | None, typer.Option(help="CSV file of requests to replay instead of random ones.")] = None
    as_json: Json = False
    png: Annotated[Path | None, typer.Option(help="PNG file for a plot of the distributions of waits.")] = None
    validate: Annotated[bool, typer.Option("--validate", help="Check every invariant after every event.")] = False
    decisions: Annotated[bool, typer.Option("--decisions", help="Instead, measure how long decisions take.")] = False


@with_options(SimulateOptions)
def simulate(options: SimulateOptions) -> None:
    """Simulate the router and other policies on a cluster.

    Runs the router's own core and compares how long requests wait.
    """
    from sllm_vllm.cli.simulate import Options, run_simulation

    given = {**vars(options), "json": options.as_json, "policies": tuple(options.policies or ())}
    del given["as_json"]
    raise typer.Exit(run_simulation(Options(**given)))
