"""`reward-service top`, on metrics written by hand and on the real listener."""

from pathlib import Path

import pytest

from reward_service import auth
from reward_service.auth import KeyRing
from reward_service.cli import main
from reward_service.home import prepare_home
from reward_service.metrics import Metrics, MetricsListener
from reward_service.top import lines, read

TEXT = """\
# TYPE service_requests_total counter
service_requests_total{{route="/v1/score",status="200"}} {ok}
service_requests_total{{route="/v1/score",status="429"}} {limited}
# TYPE service_request_seconds histogram
service_request_seconds_bucket{{route="/v1/score",le="0.1"}} {fast}
service_request_seconds_bucket{{route="/v1/score",le="1.0"}} {all}
service_request_seconds_bucket{{route="/v1/score",le="+Inf"}} {all}
# TYPE service_ready gauge
service_ready {ready}
# TYPE process_cpu_seconds_total counter
process_cpu_seconds_total {cpu}
"""


def look(taken, **numbers):
    return read(TEXT.format(**{"ready": 1, "limited": 0, "cpu": 0} | numbers), taken)


def test_rates_and_quantiles_are_of_the_time_between_two_looks():
    before = look(10.0, ok=100, fast=90, all=100, cpu=5.0)
    now = look(14.0, ok=120, limited=8, fast=104, all=128, cpu=7.0)
    head, _, _, route, replies = lines(now, before)
    assert head.startswith("ready ")
    assert "CPU 50%" in head
    assert route.split() == ["/v1/score", "7.00", "<0.1", "<1", "<1"]
    assert replies.split() == ["replies/s", "200", "5.00", "429", "2.00"]


def test_a_restarted_service_counts_from_zero():
    before, now = look(0.0, ok=100, fast=0, all=100), look(2.0, ok=4, fast=0, all=4)
    assert "/v1/score                         2.00" in list(lines(now, before))[3]


def test_a_service_that_is_not_ready_is_seen_at_once():
    assert next(lines(look(0.0, ok=0, fast=0, all=0, ready=0), None)).startswith("NOT READY")


@pytest.fixture
def listener(tmp_path):
    home = tmp_path / "home"
    prepare_home(home)
    key = auth.create_key(home, "watcher", [auth.Scope.METRICS_READ])
    (tmp_path / "watcher.key").write_text(key)
    metrics = Metrics()
    metrics.answered("/v1/score", 200, 0.02, None)
    metrics.checked(True, 0.0)
    listening = MetricsListener(0, KeyRing(home))
    listening.start(metrics)
    yield listening
    listening.close()


def port_of(listener) -> str:
    return listener.url.split(":")[2].split("/")[0]


def test_the_real_listener_is_read(listener, tmp_path, capsys):
    main(["top", "--metrics-port", port_of(listener), "--key-file", str(tmp_path / "watcher.key"), "--once"])
    shown = capsys.readouterr().out
    assert shown.startswith("ready ")
    assert "\n/v1/score" in shown
    assert "<0.025" in shown


@pytest.mark.parametrize(("key", "expected"), [("wrong", "metrics:read"), (None, "cannot read the key")])
def test_what_is_wrong_is_one_line(listener, tmp_path: Path, capsys, key, expected):
    file = tmp_path / "other.key"
    if key is not None:
        file.write_text(key)
    with pytest.raises(SystemExit) as ended:
        main(["top", "--metrics-port", port_of(listener), "--key-file", str(file), "--once"])
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert expected in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("content", ["", "zwölf", "one\ntwo\n"])
def test_a_file_without_one_key_in_it_is_named(listener, tmp_path, capsys, content):
    (tmp_path / "k").write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["top", "--metrics-port", port_of(listener), "--key-file", str(tmp_path / "k"), "--once"])
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path / 'k'}: cannot read the key; give a file with one key in it\n"
    )
