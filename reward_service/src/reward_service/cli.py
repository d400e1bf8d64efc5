"""`reward-service`: init, keys, serve, audit, calibrate, demo. A failure is one line, exit code 2."""

from __future__ import annotations

import argparse
import collections
import errno
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from reward_service import auth
from reward_service.audit import AUDIT_FILE, AuditBroken, read_records, verify
from reward_service.auth import KeyRecord, Scope
from reward_service.errors import StartError, denied
from reward_service.home import prepare_home, prepare_replica
from reward_service.settings import Settings, load_settings, load_settings_of

_DAY_S = 86_400.0
_SIGPIPE = 141  # what a shell says of a program that this signal ended
_SERVE_OPTIONS = ("host", "port", "metrics_port", "tls_certificate", "tls_key", "tls_client_ca")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["demo"]:  # its options are its own
        sys.exit(_demo(arguments[1:]))
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
        sys.stdout.flush()
    except StartError as error:
        _fail(error)
    except BrokenPipeError:  # `... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is flushed at the exit
        sys.exit(_SIGPIPE)
    except PermissionError as error:
        if error.filename is None:
            raise
        _fail(denied(error))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _fail(f"{error.strerror}; make room on the disk, then run the same command again")


def _fail(why: object) -> NoReturn:
    print(f"error: {why}", file=sys.stderr)
    sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="reward-service", description="The private reward service.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    init = commands.add_parser(
        "init", help="prepare the folder REWARD_SERVICE_HOME, or all that `docker compose up` needs"
    )
    instead = init.add_mutually_exclusive_group()
    instead.add_argument(
        "--shares", type=Path, metavar="FOLDER", help="make a replica: pepper, keys and settings of FOLDER"
    )
    instead.add_argument(
        "--compose",
        choices=("cpu", "gpu", "replicas"),
        help="write .env, docker/secrets and docker/state of the project instead",
    )
    init.add_argument(
        "--project", type=Path, default=Path("."), metavar="FOLDER", help="with --compose (default: here)"
    )
    init.set_defaults(command=_init)

    serve = commands.add_parser("serve", help="serve until SIGTERM")
    serve.add_argument("--host", help="address to bind (default 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to bind; 0 takes a free one (default 8080)")
    serve.add_argument(
        "--metrics-port",
        type=int,
        help="port on the loopback for GET /metrics (default: none; 0 takes a free one)",
    )
    serve.add_argument("--tls-certificate", metavar="PEM", help="serve HTTPS with this certificate chain")
    serve.add_argument("--tls-key", metavar="PEM", help="its private key (default: in the same file)")
    serve.add_argument("--tls-client-ca", metavar="PEM", help="every client needs a certificate of these")
    serve.set_defaults(command=_serve)

    keys = commands.add_parser("keys", help="API keys").add_subparsers(required=True, metavar="ACTION")
    create = keys.add_parser("create", help="make a key; it is printed once, alone, on stdout")
    create.add_argument("--name", required=True, help="whom the key is for")
    create.add_argument(
        "--scopes", required=True, type=_scopes, help=f"comma-separated, of {', '.join(Scope)}"
    )
    create.add_argument("--expires-days", type=_days, help="days from now (default: never)")
    create.add_argument("--budget", type=_count, metavar="ITEMS", help="arms it may have scored in its life")
    create.add_argument("--rate", type=_count, metavar="ITEMS", help="arms it may have scored in a minute")
    create.set_defaults(command=_create_key)
    keys.add_parser("list", help="all keys, without their secrets").set_defaults(command=_list_keys)
    rotate = keys.add_parser("rotate", help="make a key that takes the place of another; it is printed alone")
    rotate.add_argument("id", metavar="ID", help="as `keys list` shows it")
    rotate.add_argument(
        "--grace-hours", type=_hours, default=24.0, help="how long the old one still opens (default 24)"
    )
    rotate.set_defaults(command=_rotate_key)
    revoke = keys.add_parser("revoke", help="close a key for good")
    revoke.add_argument("id", metavar="ID", help="as `keys list` shows it")
    revoke.set_defaults(command=_revoke_key)

    audit = commands.add_parser("audit", help="who was told what").add_subparsers(
        required=True, metavar="ACTION"
    )
    check = audit.add_parser("verify", help="read all of it; exit code 2 if it is not what was written")
    check.add_argument(
        "--expect",
        type=_line,
        metavar="SEQ:MAC",
        help="a line noted earlier, as verify prints it; must be there",
    )
    check.set_defaults(command=_verify_audit)
    show = audit.add_parser(
        "show", help="the last records as JSON lines; verify tells whether they are genuine"
    )
    show.add_argument("--last", type=_count, default=20, metavar="N", help="how many (default 20)")
    show.add_argument("--key", metavar="ID", help="only those of this key")
    show.set_defaults(command=_show_audit)

    top = commands.add_parser("top", help="what the service does now (keys create --scopes metrics:read)")
    top.add_argument("--metrics-port", type=int, required=True, help="as given to serve")
    top.add_argument("--key-file", type=Path, required=True, help="file with a key that may read metrics")
    top.add_argument("--every", type=_seconds, default=2.0, metavar="S", help="seconds between looks")
    top.add_argument("--once", action="store_true", help="one look, with totals")
    top.set_defaults(command=_top)

    calibrate = commands.add_parser(
        "calibrate", help="what the scores say of labelled rollouts: an HTML and a JSON report"
    )
    calibrate.add_argument(
        "file", type=Path, metavar="FILE", help="rollouts, as `looper rollouts` writes them"
    )
    calibrate.add_argument(
        "--out", type=Path, default=Path("calibration"), metavar="FOLDER", help="(default: calibration)"
    )
    calibrate.add_argument(
        "--allow-test", action="store_true", help="take questions of a test split, for which nothing is tuned"
    )
    calibrate.add_argument(
        "--service-arms", action="store_true", help="the trajectories are the service's arms (--arms service)"
    )
    calibrate.add_argument("--resamples", type=_count, default=1000, metavar="N", help="(default 1000)")
    calibrate.set_defaults(command=_calibrate)

    commands.add_parser("demo", help="two questions through all arms on a loaded model (demo --help)")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    return load_settings({name: getattr(options, name, None) for name in _SERVE_OPTIONS})


def _init(options: argparse.Namespace) -> None:
    if options.compose is not None:
        from reward_service.compose import Profile, prepare_project

        prepare_project(options.project, Profile(options.compose))
        print(f"{options.project / '.env'} and what it needs are ready; next: docker compose up --detach")
        return
    home = _settings(options).home
    if options.shares is not None:
        if load_settings_of(options.shares).state_url is None:
            raise StartError(
                f"{options.shares / 'settings.toml'}: replicas share a database; set state_url there first"
            )
        prepare_replica(home, options.shares.absolute())
        print(f"{home} is ready for a replica of {options.shares}")
        return
    prepare_home(home)
    print(f"{home} is ready; next: {auth.CREATE_COMMAND}")


def _serve(options: argparse.Namespace) -> None:
    settings = _settings(options)
    from reward_service.serve import serve

    serve(settings)


def _create_key(options: argparse.Namespace) -> None:
    home = _settings(options).home
    prepare_home(home)
    expires = None if options.expires_days is None else time.time() + options.expires_days * _DAY_S
    print(
        auth.create_key(
            home, options.name, options.scopes, expires=expires, budget=options.budget, rate=options.rate
        )
    )


def _list_keys(options: argparse.Namespace) -> None:
    now = time.time()
    for record in auth.read_keys(_settings(options).home).keys:
        print(f"{record.id}  {_state(record, now):<24}  {','.join(record.scopes):<30}  {record.name}")


def _rotate_key(options: argparse.Namespace) -> None:
    print(auth.rotate_key(_settings(options).home, options.id, options.grace_hours * 3600))


def _revoke_key(options: argparse.Namespace) -> None:
    auth.revoke_key(_settings(options).home, options.id)
    print(f"{options.id} is revoked")


def _verify_audit(options: argparse.Namespace) -> None:
    home = _settings(options).home
    try:
        head = verify(home, options.expect)
    except AuditBroken as error:
        raise StartError(f"{home / AUDIT_FILE}: {error}") from None
    print(f"{head.seq} lines, unbroken; the last is {head.seq}:{head.mac}")


def _show_audit(options: argparse.Namespace) -> None:
    records = read_records(_settings(options).home)
    wanted = (record for record in records if options.key in (None, record.get("key_id")))
    for record in collections.deque(wanted, maxlen=options.last):
        print(json.dumps(record))


def _top(options: argparse.Namespace) -> None:
    from reward_service import top

    try:
        top.run(options.metrics_port, options.key_file, options.every, options.once)
    except KeyboardInterrupt:
        return


def _calibrate(options: argparse.Namespace) -> None:
    from reward_service.calibration.command import calibrate

    print(
        calibrate(
            options.file,
            options.out,
            _settings(options),
            allow_test=options.allow_test,
            service_arms=options.service_arms,
            resamples=options.resamples,
        )
    )


def _demo(arguments: list[str]) -> int:
    from regime_w import demo

    return demo.main(arguments)


def _state(record: KeyRecord, now: float) -> str:
    if record.revoked is not None:
        return f"revoked {_date(record.revoked)}"
    if record.expires is not None:
        return f"{'expired' if record.expires <= now else 'active until'} {_date(record.expires)}"
    return "active"


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def _scopes(text: str) -> frozenset[Scope]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in set(Scope)]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown scope {unknown[0]!r}; choose from {', '.join(Scope)}")
    return frozenset(Scope(name) for name in names)


def _line(text: str) -> tuple[int, str]:
    match = re.fullmatch(r"([0-9]{1,18}):([0-9a-f]{64})", text)
    if match is None:
        raise argparse.ArgumentTypeError("give SEQ:MAC as `audit verify` prints it")
    return int(match[1]), match[2]


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError("give a whole number above 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds <= _DAY_S:
        raise argparse.ArgumentTypeError("give a number of seconds above 0")
    return seconds


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = -1.0
    if not 0.0 <= hours <= 8_760.0:
        raise argparse.ArgumentTypeError("give a number of hours, 0 or more")
    return hours


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = 0.0
    if not 0.0 < days <= 36_500.0:
        raise argparse.ArgumentTypeError("give a number of days above 0")
    return days


if __name__ == "__main__":
    main()
