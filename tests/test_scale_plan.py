"""`benchmarks/scale_plan.py`: collectives are counted right, memory is a device's part of the weights."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import fsdp_devices
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scale_plan
from collectives import collective_bytes

# A loop of 5 steps, each of which gathers 512 numbers, and a sum of 128 behind it: as XLA compiles it for 4
# devices, without what computes. Then a branch, and a loop that ends by a condition.
PROGRAM = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8,16]{1,0})->f32[128]{0}}, num_partitions=4

%add.1 (x.1: f32[], y.1: f32[]) -> f32[] {
  ROOT %sum.1 = f32[] add(%x.1, %y.1), metadata={op_name="psum"}
}

%body.2_spmd (param: (s32[], f32[128])) -> (s32[], f32[128]) {
  %param = (s32[], f32[128]{0}) parameter(0)
  %get.17 = f32[128]{0} get-tuple-element(%param), index=1
  %all_gather.3 = f32[512]{0} all-gather(%get.17), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %tuple.8 = (s32[], f32[128]{0}) tuple(%wrapped_add, %reduce_add_fusion)
}

%condition.3_spmd (param.1: (s32[], f32[128])) -> pred[] {
  ROOT %compare = pred[] fusion(%param.1), kind=kLoop, calls=%wrapped_compare_computation
}

%wrapped_compare_computation (param_0.3: (s32[], f32[128])) -> pred[] {
  ROOT %lt.3 = pred[] compare(%param_0.3, %param_0.3), direction=LT
}

%taken.4 (param.2: f32[128]) -> (bf16[6], s32[2]) {
  ROOT %swapped = (bf16[6]{0}, s32[2]{0}) all-to-all(%a, %b), channel_id=3, replica_groups={{0,1},{2,3}}
}

%not_taken.5 (param.3: f32[128]) -> (bf16[6], s32[2]) {
  ROOT %as_it_is = (bf16[6]{0}, s32[2]{0}) tuple(%a, %b)
}

ENTRY %main.6_spmd (param.4: f32[8,16]) -> f32[128] {
  %param.4 = f32[8,16]{1,0} parameter(0), sharding={devices=[4,1]<=[4]}, metadata={op_name="x"}
  %while.9 = (s32[], f32[128]{0}) while(%tuple.6), condition=%condition.3_spmd, body=%body.2_spmd, TRIPS
  %branch = (bf16[6]{0}, s32[2]{0}) conditional(%i, %p, %p), branch_computations={%taken.4, %not_taken.5}
  ROOT %psum.7 = f32[128]{0} all-reduce(%get.13), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add.1
}
"""
KNOWN = PROGRAM.replace("TRIPS", 'backend_config={"known_trip_count":{"n":"5"}}')
UNKNOWN = PROGRAM.replace("TRIPS", "metadata={}")


def test_a_collective_counts_as_often_as_its_loop_runs():
    rest = {"all-reduce": 128 * 4, "all-to-all": 6 * 2 + 2 * 4}
    assert collective_bytes(KNOWN) == {"all-gather": 5 * 512 * 4, **rest}
    assert collective_bytes(UNKNOWN, most_trips=2) == {"all-gather": 2 * 512 * 4, **rest}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (UNKNOWN, "how often a loop runs"),
        (KNOWN.replace("all-reduce(", "all-reduce-start("), "in two halves"),
    ],
)
def test_what_the_text_does_not_tell_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        collective_bytes(text)


def on_eight_devices(*command):
    """The JSON that a script prints."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.nightly
def test_programs_of_the_small_form_take_their_part_of_the_weights():
    rows = on_eight_devices(scale_plan.__file__, "--small", "--one", "FSDP", "8", "1")
    vector = 4 * sum(map(math.prod, scale_plan.SMALL.shapes.values()))
    layers = vector - 4 * math.prod(scale_plan.SMALL.shapes["words"])
    tokens = 2 * 4 * 8 * scale_plan.SMALL.length
    by_name = {row["program"]: row for row in rows}
    assert by_name["gradient"]["argument_bytes"] == vector // 8 + tokens
    assert by_name["hessian"]["argument_bytes"] == 2 * vector // 8 + tokens
    kept = by_name["step, 128 vectors kept"]["argument_bytes"]
    assert kept == pytest.approx((128 + 3) * vector / 8, rel=1e-3)
    for row in rows:  # a step leaves two vectors
        assert row["result_bytes"] == pytest.approx(vector / 8 * (1 + ("step" in row["program"])), rel=0.01)
    # The layers forward, and again backward.
    assert by_name["gradient"]["collective_bytes"]["all-gather"] >= 2 * layers


@pytest.mark.nightly
def test_a_network_that_is_divided_over_all_devices_has_the_same_curvature():
    """Against one device; and vectors lie as the weights do."""
    found = on_eight_devices(fsdp_devices.__file__)
    assert found["FSDP"]["T"] == pytest.approx(found["one device"]["T"], rel=1e-4)
    assert found["FSDP"]["divided alike"]
