"""Places: disjoint, alike, and no more than the machine has."""

import os

import pytest
import torch

from common.errors import UserError
from pretrain.places import Place, find_places, hardware_of


@pytest.fixture
def machine(monkeypatch):
    """Makes this one a machine with so many GPUs, some of them visible, and these cores."""

    def make(num_gpus: int = 0, visible: str | None = None, cores: tuple[int, ...] = (0,)) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cores))
        monkeypatch.setattr("socket.gethostname", lambda: "node3")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return make


def names(places: list[Place]) -> list[str]:
    return [place.name for place in places]


def test_gpus_are_shared_out_in_order_and_what_is_left_over_is_told(machine, capsys) -> None:
    machine(num_gpus=8)
    places = find_places(3, needed=10)
    assert [place.gpus for place in places] == [(0, 1, 2), (3, 4, 5)]
    assert names(places) == ["node3, GPUs 0-2", "node3, GPUs 3-5"]
    assert {place.num_processes for place in places} == {3}
    assert capsys.readouterr().err == "GPUs 6-7 of node3 stay idle: a run takes 3 of 8\n"


def test_a_run_takes_all_gpus_unless_told_otherwise_and_no_more_places_are_made_than_needed(machine, capsys) -> None:
    machine(num_gpus=8)
    assert [place.gpus for place in find_places(None, needed=5)] == [tuple(range(8))]
    assert names(find_places(1, needed=2)) == ["node3, GPU 0", "node3, GPU 1"]
    assert capsys.readouterr().err == ""


def test_places_lie_on_the_gpus_that_are_visible_by_the_systems_numbers(machine) -> None:
    machine(num_gpus=4, visible="6, 1,2,4")
    assert [place.gpus for place in find_places(2, needed=9)] == [(6, 1), (2, 4)]
    machine(num_gpus=2, visible="5,3,9,1")  # CUDA passes over all from the first one that is not there
    assert [place.gpus for place in find_places(1, needed=9)] == [(5,), (3,)]


@pytest.mark.parametrize("visible", ["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "0,MIG-GPU-8932f937/1/2"])
def test_gpus_that_have_no_number_are_refused(machine, visible) -> None:
    machine(num_gpus=visible.count(",") + 1, visible=visible)
    with pytest.raises(UserError, match=r"^CUDA_VISIBLE_DEVICES=\S+: DeepSpeed's launcher takes .* numbers, like 0,1$"):
        find_places(1, needed=1)


@pytest.mark.parametrize(
    ("num_gpus", "said"),
    [
        (2, r"^gpus_per_run 8: node3 has 2 GPUs \(0-1\): give --gpus_per_run 2 or less, or a machine with more$"),
        (0, r"^gpus_per_run 8: node3 has no GPU, and 3 cores .*: give --gpus_per_run 3 or less, or .* with GPUs$"),
    ],
)
def test_a_machine_with_less_than_a_run_takes_is_refused_with_what_is_there(machine, num_gpus, said) -> None:
    machine(num_gpus=num_gpus, cores=(0, 1, 2))
    with pytest.raises(UserError, match=said):
        find_places(8, needed=4)


@pytest.mark.parametrize("num_cores", range(1, 10))
@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("needed", [1, 2, 5, 100])
def test_cores_make_as_many_places_as_can_be_all_alike_and_as_large_as_can_be(
    machine, num_cores, num_processes, needed
) -> None:
    cores = tuple(3 * number for number in range(num_cores))
    machine(cores=cores)
    if num_processes > num_cores:
        with pytest.raises(UserError):
            find_places(num_processes, needed)
        return
    places = find_places(num_processes, needed)
    taken = [core for place in places for core in place.cores]
    assert len(taken) == len(set(taken)), "disjoint"
    assert set(taken) <= set(cores)
    (size,) = {len(place.cores) for place in places}
    assert size >= num_processes
    most = max(number for number in range(1, needed + 1) if number == 1 or number * num_processes <= num_cores)
    assert len(places) == most
    assert (size + 1) * len(places) > num_cores, "no core is left that all could have had"
    assert {place.num_processes for place in places} == {num_processes}


def test_cores_are_named_for_people(machine) -> None:
    machine(cores=(0, 1, 2, 5))
    assert names(find_places(4, needed=1)) == ["node3, cores 0-2,5"]
    assert names(find_places(None, needed=4))[3] == "node3, core 5"


def test_hardware_is_the_same_for_all_places_of_a_search_whatever_else_runs(machine, monkeypatch) -> None:
    machine(num_gpus=4, visible="7,5,3,1")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"NVIDIA H{100 + 100 * (index > 3)}")
    assert {hardware_of(place) for place in find_places(2, needed=2)} == {"2 x NVIDIA H100"}
    machine(cores=tuple(range(9)))
    monkeypatch.setattr("pretrain.places.processor_name", lambda: "AMD EPYC 7763")
    assert {hardware_of(place) for place in find_places(2, needed=100)} == {"2 processes on 2 cores of AMD EPYC 7763"}
    assert {hardware_of(place) for place in find_places(1, needed=100)} == {"1 process on 1 core of AMD EPYC 7763"}
