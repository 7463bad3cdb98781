"""Nothing asks for the network: no test (tests/offline sees to it), nor the package when it is imported or trains."""

import os
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis.strategies import ip_addresses
from offline.sitecustomize import is_here
from test_imports import OURS, REPOSITORY

ELSEWHERE = "192.0.2.1"  # reserved for documentation: it is nowhere
NAME = f"a.{ELSEWHERE}"
ASKING = {
    "connect": lambda: socket.socket().connect((ELSEWHERE, 9)),
    "connect_ex": lambda: socket.socket().connect_ex((ELSEWHERE, 9)),
    "connect over IPv6": lambda: socket.socket(socket.AF_INET6).connect((f"2001:db8::{ELSEWHERE}", 9)),
    "sendto": lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"", (ELSEWHERE, 9)),
    "sendmsg": lambda: socket.socket(type=socket.SOCK_DGRAM).sendmsg([b""], [], 0, (ELSEWHERE, 9)),
    "create_connection": lambda: socket.create_connection((ELSEWHERE, 9)),
    "getaddrinfo": lambda: socket.getaddrinfo(NAME, 9),
    "getaddrinfo of bytes": lambda: socket.getaddrinfo(NAME.encode(), 9),
    "gethostbyname": lambda: socket.gethostbyname(NAME),
    "gethostbyname_ex": lambda: socket.gethostbyname_ex(NAME),
    "gethostbyaddr": lambda: socket.gethostbyaddr(ELSEWHERE),
}
WITHOUT_SOCKETS = """
import importlib, sys

asked, names, words = [], sys.argv[1].split(), sys.argv[2:]

def forbid(event, arguments):
    if event.startswith("socket.") and event != "socket.gethostname":  # that one is in status.json, and asks nobody
        asked.append(event)
        raise RuntimeError(f"no sockets here, but {event}{arguments}")

sys.addaudithook(forbid)

def typed(*words):
    sys.argv = list(words)
    try:
        getattr(cli, words[0])()
    except SystemExit as end:
        assert not end.code, words

try:
    for name in names:
        importlib.import_module(name)
    from ddpm import cli
    for command in ("train", "sample", "edit", "evaluate", "schedule"):
        typed(command, "--cfg", "job")
    typed("train", *words)
finally:
    print("asked:", asked)
"""


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
def test_who_asks_for_another_machine_is_told_so(ask):
    with pytest.raises(RuntimeError, match=r"^no network in tests, but socket\.\w+ asks for .*(192\.0\.2\.1|c000:201)"):
        ask()


def test_processes_that_tests_start_are_told_so_too():
    code = f"import socket; socket.socket().connect(({ELSEWHERE!r}, 9))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert f"RuntimeError: no network in tests, but socket.connect asks for {ELSEWHERE}" in run.stderr


@given(ip_addresses())
def test_an_address_is_here_if_it_is_a_loopback_one(address):
    assert is_here(str(address)) == address.is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", b"127.0.0.2"])
def test_this_machine_may_be_asked(host):
    with socket.create_server(("127.0.0.1" if host == "localhost" else host, 0)) as server:
        with socket.create_connection((host, server.getsockname()[1]), timeout=9) as client:
            client.sendall(b"x")
        with server.accept()[0] as connection:
            assert connection.recv(1) == b"x"


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no unix sockets here")
def test_unix_sockets_may_be_asked(tmp_path):
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(os.path.relpath(tmp_path / "s"))  # such a path has at most 107 bytes
        server.listen()
        client.connect(os.path.relpath(tmp_path / "s"))


def without_sockets(names: list[str], *words: str, path: str = "") -> subprocess.CompletedProcess:
    """Import modules, compose every command's configuration and train with these words where no socket can be made."""
    command = [sys.executable, "-c", WITHOUT_SOCKETS, " ".join(names), *words]
    environment = os.environ | {"PYTHONPATH": path}  # without tests/offline, which would raise first and note nothing
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_package_is_imported_composes_and_trains_without_a_socket(tmp_path):
    tiny = [
        "model.channels=8", "model.channel_mults=[1]", "model.groups=4", "model.blocks=1", "schedule.T=10",
        "model.attention_resolutions=[]", "model.middle_attention=false", "sampler.steps=2", "trainer.steps=1",
        "trainer.batch_size=8", "trainer.seconds=null", "trainer.warmup=0", "trainer.previews=0", "recognition=false",
        "device=cpu",
    ]  # fmt: skip
    run = without_sockets([name for name in OURS if not name.endswith("__main__")], *tiny, f"runs={tmp_path}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("asked: []\n")
    assert run.stdout.count("_target_: ddpm.samplers.") >= 2, "configurations are printed"
    assert list(tmp_path.glob("default/*/checkpoints/1/model.safetensors")), "and the run is there"


@pytest.mark.slow
def test_a_module_that_asks_is_found_even_if_it_forgives(tmp_path):
    asks = "import socket\ntry:\n    socket.{}()\nexcept Exception:\n    pass\n"
    for name in ("socket", "getfqdn"):
        (tmp_path / f"calls_{name}.py").write_text(asks.format(name))
    run = without_sockets(["calls_socket", "calls_getfqdn"], "--cfg", "job", path=str(tmp_path))
    assert run.stdout.endswith("asked: ['socket.__new__', 'socket.gethostbyaddr']\n"), run.stderr
