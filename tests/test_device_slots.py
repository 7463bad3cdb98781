"""ddpm/runs/device_slots.py: jobs that share a machine, each with a slot of its own."""

import os
import subprocess
import sys
import threading

import pytest

from ddpm.runs import device_slots


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(device_slots.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(device_slots, "INTERVAL", 0.01)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)


def test_devices_are_filled_evenly_and_share_the_threads():
    devices = ["cuda:0", "cuda:1"]
    with (
        device_slots.taken(devices, 2, print) as a,
        device_slots.taken(devices, 2, print) as b,
        device_slots.taken(devices, 2, print) as c,
    ):
        assert [a.device, b.device, c.device] == ["cuda:0", "cuda:1", "cuda:0"]
        assert {a.threads, b.threads, c.threads} == {2}
    with device_slots.taken(devices, 2, print) as again:
        assert again.device == "cuda:0"


def test_who_finds_all_slots_taken_waits_for_one_and_says_so_once():
    said, got = [], threading.Event()

    def wait() -> None:
        with device_slots.taken(["cpu"], 1, said.append) as slot:
            assert slot.device == "cpu"
            got.set()

    with device_slots.taken(["cpu"], 1, print):
        other = threading.Thread(target=wait)
        other.start()
        assert not got.wait(0.3)
    assert got.wait(10)
    other.join()
    assert said == ["all 1 slots are taken: waiting for one"]


def test_the_slot_of_a_process_that_died_is_free(tmp_path):
    code = (
        "import sys, tempfile, time; from ddpm.runs import device_slots; tempfile.tempdir = sys.argv[1]\n"
        "with device_slots.taken(['cpu'], 1, print): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        said: list[str] = []
        threading.Timer(0.3, holder.kill).start()
        with device_slots.taken(["cpu"], 1, said.append):
            assert len(said) == 1
    finally:
        holder.kill()
        holder.wait()


def test_a_gpu_has_the_same_slots_whatever_number_a_process_sees_it_under(monkeypatch):
    said: list[str] = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with device_slots.taken(["cuda:0"], 1, print):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
        with device_slots.taken(["cuda:1", "cuda:0"], 1, said.append) as other:
            assert other.device == "cuda:0"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a/b,3")
        with device_slots.taken(["cuda:0"], 1, said.append):
            assert not said


def test_less_than_one_slot_is_refused():
    with pytest.raises(ValueError, match="slots = 0 must be at least 1"), device_slots.taken(["cpu"], 0, print):
        pass
