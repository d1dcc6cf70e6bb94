"""The emulator itself: kernels with one fault each (tests/emulator/broken*.cu), every one of which it must report."""

import numpy as np
import pytest
from emulator import build, cases, schedules

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

SCHEDULES = ("forward", "reverse", "greedy", "greedy_reverse", "random")


@pytest.fixture(scope="module")
def broken():
    return build.load(build.built("broken") / "emulated_broken.so")


FAULTS = {
    "no_barrier": r"(racecheck: .* loads|initcheck: .* loads) element \d+ of shared array 0.* in broken.cu:\d+",
    "no_barrier_before_store": r"racecheck: .* element \d+ of shared array 0, which .* (loaded|stored to) with no",
    "same_output_twice": (
        r"racecheck: .* stores to element \d+ of out, which thread \(\d+, 0, 0\) stored to with no "
        r"barrier"
    ),
    "blocks_share_an_output": "racecheck: .* stores to element .* of out, which another block stored to",
    "load_past_shared": (
        "memcheck: .* loads 4 bytes outside every array, at byte 256 of the 256 of shared array 0, in broken.cu:"
    ),
    "load_past_input": "memcheck: .* loads 4 bytes outside every array, .*at byte 512 of the 512 of in",
    "store_past_output": "memcheck: .* stores 4 bytes outside every array, .*at byte 512 of the 512 of out",
    "store_to_input": "memcheck: .* stores to the input in",
    "misaligned": r"memcheck: .* uses address .*, which is not aligned to the type there, in broken.cu:\d+",
    "null_pointer": r"memcheck: .* stores 4 bytes outside every array, in broken.cu:\d+",
    "load_unwritten_shared": (
        "initcheck: thread .0, 0, 0. .* loads element 0 of shared array 0, which nobody has stored to"
    ),
    "load_unwritten_output": "initcheck: .* loads element .* of out, which nobody has stored to",
    "atomic_past_output": (
        "memcheck: .* stores 4 bytes outside every array, .*at byte 512 of the 512 of out, in broken.cu:"
    ),
    "atomic_on_unwritten_output": "initcheck: .* loads element 0 of out, which nobody has stored to, in broken.cu:",
    "atomic_beside_store": (
        r"racecheck: .* stores to element \d+ of out, which thread \(\d+, 0, 0\) stored to with no "
        r"barrier"
    ),
    "load_beside_atomic": (
        r"racecheck: .* (loads|stores to) element 0 of shared array 0, which .* with no barrier "
        r"between"
    ),
    "two_barriers": r"synccheck: .* is at the barrier in broken.cu:\d+, others are at the barrier in broken.cu:\d+",
    "return_before_barrier": r"synccheck: .* (returned while others wait|threads of the block have returned)",
    "too_much_shared": "memcheck: .* more than 48 KiB of static shared memory",
    "too_many_threads": "launch failed: 9",
    "too_many_rows": "launch failed: 9",
    "no_blocks": "launch failed: 9",
    "no_syncwarp": r"(racecheck|initcheck): .* loads element \d+ of shared array 0, which",
    "no_syncwarp_before_store": (
        r"racecheck: .* element \d+ of shared array 0, which .* (loaded|stored to) with no "
        r"barrier"
    ),
    "syncwarp_in_one_warp": r"racecheck: .* element \d+ of shared array 0, which .* (loaded|stored to) with no barrier",
    "syncwarp_between_warps": r"(racecheck|initcheck): .* loads element \d+ of shared array 0, which",
    "shuffle_for_syncwarp": (
        r"racecheck: .* loads element \d+ of shared array 0, which thread .* stored to with no "
        r"barrier"
    ),
    "divergent_shuffle": (
        r"synccheck: .* is at shuffle_xor in broken.cu:\d+, others of its warp are at shuffle_xor in "
        r"broken.cu:"
    ),
    "shuffle_with_two_masks": "synccheck: .* is at shuffle_xor in .*, others of its warp are at shuffle_xor in",
    "shuffle_mask_too_large": "memcheck: .* shuffles with lane mask 32",
    "shuffle_after_return": (
        "synccheck: .* (threads of its warp have returned|returned while others of its warp wait at shuffle_xor)"
    ),
    "shuffle_or_barrier": "synccheck: .* others of its warp are at (shuffle_xor|the barrier) in broken.cu",
    "shuffle_in_part_of_a_warp": "synccheck: .* at shuffle_xor in .*, but its warp has 16 threads",
    "load_matrix_from_global": "memcheck: .* loads a matrix row outside shared memory",
    "copy_seen_by_others_without_barrier": r"(racecheck|initcheck): .* loads element \d+ of shared array 0, which",
    "copy_waited_for_by_another": r"racecheck: .* into which a copy started by thread .* in broken.cu:\d+ is under way",
    "load_under_way": (
        r"racecheck: .* loads element \d+ of shared array 0, into which a copy .* is under way, in "
        r"broken.cu"
    ),
    "store_under_way": (
        r"racecheck: .* stores to element \d+ of shared array 0, into which a copy .* is under way, in "
        r"broken.cu"
    ),
    "copy_twice_into_one_place": (
        r"racecheck: .* stores to element \d+ of shared array 0, into which a copy .* is under "
        r"way"
    ),
    "return_with_copies_under_way": r"synccheck: .* returned before the copy it started in broken.cu:\d+ had landed",
    "copy_to_misaligned": "memcheck: .* copies to an address that is not 16-byte aligned",
    "copy_from_misaligned": "memcheck: .* copies from an address that is not 16-byte aligned",
    "copy_of_20_bytes": "memcheck: .* copies 20 bytes of 16",
    "copy_of_minus_1_bytes": "memcheck: .* copies -1 bytes of 16",
    "copy_past_shared": "memcheck: .* stores 16 bytes outside every array, at byte 1024 of the 1024 of shared array 0",
    "copy_past_input": "memcheck: .* copies from outside every array",
    "copy_of_nothing_from_nowhere": "memcheck: .* copies from outside every array",
    "copy_to_global": "memcheck: .* copies to outside shared memory",
    "copy_from_shared": "memcheck: .* copies from shared memory",
    "past_dynamic_shared": "memcheck: .* outside every array, at byte 256 of the 256 of dynamic shared memory",
    "no_dynamic_shared": "memcheck: .* declares dynamic shared memory, launched without any",
    "misaligned_vector": r"memcheck: .* not aligned to the type there, in broken.cu:\d+",
    "misaligned_shared_vector": r"memcheck: .* not aligned to the type there, in broken.cu:\d+",
    "more_than_48_KiB_not_asked_for": "launch failed: 1$",
    "more_than_asked_for": "launch failed: 1$",
    "more_than_there_is": "launch failed: 1$",
    "no_grid_barrier": (
        "racecheck: .* (loads|stores to) element .* of out, which another block stored to|initcheck: .* of out"
    ),
    "no_grid_barrier_before_store": (
        "racecheck: .* (loads|stores to) element .* of out, which another block (loaded|stored to)"
    ),
    "block_leaves_grid": (
        r"synccheck: block \(0, 0, 0\) waits at the grid's barrier in broken.cu:\d+, which 1 blocks ended "
        r"without"
    ),
    "threads_leave_grid": "synccheck: .* (returned while others wait at|threads of the block have returned)",
    "grid_or_block_barrier": (
        "synccheck: .* is at the (grid's )?barrier in .*, others are at the (grid's )?barrier in broken.cu"
    ),
    "two_grid_barriers": (
        r"synccheck: .* is at the grid's barrier in broken.cu:\d+, others are at the grid's barrier in "
        r"broken.cu:"
    ),
    "grid_barrier_or_shuffle": "synccheck: .* others of its warp are at (shuffle_xor|the grid's barrier) in broken.cu",
    "grid_not_together": "synccheck: .* is at the grid's barrier in broken.cu:.*, but the launch is not cooperative",
    "more_blocks_than_fit": "launch failed: 720$",
    "static_and_dynamic_more_than_there_is": "memcheck: .* has more shared memory, static and dynamic, than 227 KiB",
}
SOUND = ("sound", "sound_shuffle", "sound_syncwarp", "sound_copy", "sound_intrinsics", "sound_grid")

# Of a product in tiles.
TILE_FAULTS = {
    "no_wait": (
        r"racecheck: .* loads element \d+ of dynamic shared memory, into which a copy started by .* is "
        r"under way"
    ),
    "wait_one_too_few": (
        r"racecheck: .* loads element \d+ of dynamic shared memory, into which a copy started by .* is "
        r"under way"
    ),
    "wait_without_commit": (
        r"racecheck: .* loads element \d+ of dynamic shared memory, into which a copy .* is under "
        r"way"
    ),
    "no_barrier_after_wait": r"(racecheck|initcheck): .* element \d+ of dynamic shared memory, (into )?which",
    "prefetch_before_barrier": (
        r"racecheck: .* stores to element \d+ of dynamic shared memory, which .* loaded with no "
        r"barrier"
    ),
    "prefetch_past_the_end": r"synccheck: .* returned before the copy it started in broken_tile.cu:\d+ had landed",
    "rows_unchecked": "memcheck: .* copies from outside every array, in broken_tile.cu",
    "columns_unchecked": "memcheck: .* copies from outside every array, in broken_tile.cu",
    "stage_never_filled": r"(racecheck|initcheck): .* loads element \d+ of dynamic shared memory, (into )?which",
    "divergent_load_matrix": "synccheck: .* is at load_matrix_x4 in .*, others of its warp are at load_matrix_x4 in",
    "misaligned_row": "memcheck: .* loads a matrix row that is not 16-byte aligned, in broken_tile.cu",
    "past_the_last_stage": "memcheck: .* loads 16 bytes outside every array",
    "too_little_shared": "memcheck: .* at byte 65520 of the 65520 of dynamic shared memory, in broken_tile.cu",
    "large_shared_not_asked_for": "launch failed: 1$",
}


# The same by Hopper's instructions.
HOPPER_FAULTS = {
    "no_wait": (
        "(race|init)check: .* multiplies .* (is under way|for which thread .* has not waited|nobody has copied to)"
    ),
    "wrong_parity": (
        "check: .* multiplies .* (is under way|nobody has copied to)|all threads of .* at barrier_wait in broken_hopper"
    ),
    "one_thread_waits": (
        "check: .* multiplies .* (is under way|for which thread .* has not waited|nobody has copied to)"
    ),
    "expects_too_little": "synccheck: .* brings a barrier 16 bytes more than expected, in broken_hopper.cu",
    "expects_too_much": r"synccheck: all threads of .* at barrier_wait in .* \(phase 0 lacks 0 arrivals and 16 bytes\)",
    "expects_first_only": (
        "check: .* (16384 bytes more than expected|multiplies .* is under way|lands when its barrier's phase has been)"
    ),
    "expects_twice": "synccheck: .* arrives at a barrier once more than it was initialised for, in broken_hopper.cu",
    "one_arrival_too_many": r"synccheck: all threads of .* \(phase 0 lacks 1 arrivals and 0 bytes\)",
    "never_expects": r"synccheck: all threads of .* \(phase 0 lacks 1 arrivals and -32768 bytes\)",
    "stage_never_filled": "initcheck: .* multiplies byte .* of dynamic shared memory, which nobody has copied to",
    "no_barrier_before_refill": r"racecheck: .* copies a tile to byte \d+ of .*; warp \d has (not )?waited for that",
    "refill_before_wait": (
        r"racecheck: .* copies a tile to byte \d+ of .*; warp \d has not waited for that, in "
        r"broken_hopper.cu"
    ),
    "wait_one_too_few": (
        r"racecheck: .* copies a tile to byte \d+ of .*; warp \d has not waited for that, in "
        r"broken_hopper.cu"
    ),
    "no_barrier_after_init": (
        "(initcheck: .* a barrier that nobody has initialised|racecheck: .* element 0 of shared array 0, which)"
    ),
    "no_init": "initcheck: .* for a barrier that nobody has initialised, in broken_hopper.cu",
    "init_again": "memcheck: .* initialises a barrier again",
    "no_init_fence": "racecheck: .* copies a tile for a barrier with no barrier_init_fence since its barrier_init",
    "init_fence_by_another": (
        "racecheck: .* copies a tile for a barrier with no barrier_init_fence since its barrier_init"
    ),
    "no_fence": "synccheck: .* is at multiply_add_64xNx16 in .* with no warpgroup_fence since its last group",
    "no_commit": r"racecheck: .* copies a tile to byte \d+ of .*; warp \d has not waited for that, in broken_hopper.cu",
    "no_final_wait": "racecheck: .* has not waited for that",
    "one_warp_waits": (
        r"racecheck: .* copies a tile to byte \d+ of .*; warp [123] has not waited for that, in "
        r"broken_hopper.cu"
    ),
    "divergent_lane": (
        "synccheck: .* is at multiply_add_64xNx16 in .*, others of its warp are at multiply_add_64xNx16 in"
    ),
    "warp_skips_one": (
        "synccheck: .* multiply_add_64xNx16 in .*, with other operands or elsewhere than others of its warpgroup"
    ),
    "warp_commits_sooner": "synccheck: .* commits a group of other multiplications than others of its warpgroup",
    "descriptors_differ_in_warp": "synccheck: .* with other descriptors than others of its warp",
    "descriptors_differ_in_warpgroup": "synccheck: .*, with other operands or elsewhere than others of its warpgroup",
    "seven_warps": "synccheck: .* is at warpgroup_fence in .*, but its warpgroup has 3 warps",
    "other_layout": "memcheck: .* multiplies by a matrix descriptor of another layout than the 128-byte swizzle",
    "past_the_stages": "memcheck: .* multiplies byte 114688 of dynamic shared memory, which has 98304",
    "misaligned_tile": "memcheck: .* copies a tile to an address that is not 1024-byte aligned",
    "tile_past_shared": "memcheck: .* copies a tile of 16384 bytes to byte 82944 of the 98304 of dynamic shared memory",
    "tile_to_static_shared": (
        "memcheck: .* copies a tile of 16384 bytes to byte .* of the 98304 of dynamic shared memory"
    ),
    "little_aligned_stages": (
        "memcheck: .* copies a tile to dynamic shared memory that is declared aligned to 128 bytes"
    ),
    "tile_over_barrier": "memcheck: .* copies a tile over a barrier",
    "barrier_overwritten": (
        "(memcheck: .* for a barrier that has been overwritten|racecheck: .* stores to element 1 of shared array 0)"
    ),
    "map_not_encoded": "memcheck: .* copies a tile by a map that was not encoded",
    "map_of_narrow_box": "memcheck: .* copies a tile by a map whose box has no rows of 128 bytes",
    "map_of_low_box": r"synccheck: all threads of .* \(phase 0 lacks 0 arrivals and 8192 bytes\)",
    "map_of_more_rows": "memcheck: .* loads 128 bytes outside every array, .* of a, in broken_hopper.cu",
    "map_of_more_columns": r"memcheck: .* loads \d+ bytes outside every array, .* of a, in broken_hopper.cu",
    "map_of_misaligned_array": "launch failed: 1$",
    "map_of_odd_stride": "launch failed: 1$",
    "map_of_high_box": "launch failed: 1$",
    "old_driver": "launch failed: 801$",
    "stores_to_stage": (
        "racecheck: .* multiplies .*, which thread .* stored to with no fence towards the asynchronous proxy"
    ),
    "stores_before_copy": "racecheck: .* copies a tile to .*, which thread .* stored to with no fence",
    "loads_stage_without_wait": (
        r"racecheck: .* loads byte \d+ of .*, into which the copy started by thread \(0, 0, "
        r"0\)"
    ),
    "loads_beside_refill": (
        "racecheck: .* (is under way|landed without its waiting for that|loaded with no barrier between)"
    ),
    "registers_touched": "racecheck: .* uses registers otherwise while a multiplication adds to them",
    "results_without_barrier": r"racecheck: .* stores to byte \d+ of .*; warp \d has (not )?waited for that",
    "results_before_wait": (
        r"racecheck: .* (stores to byte \d+ of .*; warp \d has (not )?waited for that|uses registers "
        r"otherwise)"
    ),
    "prefetch_past_the_end": "racecheck: .* stores to byte .* into which the copy .* (is under way|has landed without)",
    "copy_at_the_end": "synccheck: block .* ended before anyone had waited for the copy started in broken_hopper.cu",
    "one_of_two_copies_expected": (
        "synccheck: block .* ended before anyone had waited for the copy started in broken_hopper.cu"
    ),
    "one_of_two_copies_expected_and_waited_for": (
        "synccheck: (.* lands when its barrier's phase has been completed|all threads of)"
    ),
    "multiplication_at_the_end": (
        "synccheck: .* returned before it had waited for the multiplication in broken_hopper.cu"
    ),
}
HOPPER_WRONG = ("descriptor_step", "wrong_stride", "wrong_transposition", "wrong_leading transposed")


ALL_ORDERS = [(schedule, when) for schedule in SCHEDULES for when in ("lazy", "eager")]


@pytest.mark.parametrize(("schedule", "when"), ALL_ORDERS)
def test_the_emulator_finds_every_fault(broken, schedule, when):
    assert set(broken.names()) == {*SOUND, *FAULTS, "source_overwritten"}
    schedules.set_order(broken, (schedule, when))
    x = np.arange(128, dtype=np.float32)
    for name, text in FAULTS.items():
        with pytest.raises(RuntimeError, match=text):
            broken.run(name, x, np.full(128, np.nan, np.float32))
    for name in SOUND:
        out = np.full(128, np.nan, np.float32)
        broken.run(name, x, out)
        np.testing.assert_array_equal(out, x.reshape(2, 64)[:, ::-1].ravel(), name)


def test_a_copy_whose_source_changes_gives_other_bits_early_than_late(broken):
    x = np.arange(128, dtype=np.float32)
    outs = {}
    for when in ("lazy", "eager"):
        schedules.set_order(broken, ("forward", when))
        outs[when] = np.full(128, np.nan, np.float32)
        broken.run("source_overwritten", x, outs[when])
    np.testing.assert_array_equal(outs["eager"], x)
    np.testing.assert_array_equal(outs["lazy"], np.where(np.arange(128) % 4, x, -1))


def tile_product(broken, name, M=70, N=72, K=330, run="run_tile"):
    """(result, what numpy says)"""
    t = cases.F16 if "f16" in name.split() else cases.BF16
    data = cases.Data(t, "tile")
    K = K // 8 * 8
    (a, a64), (b, b64) = data.normal(M, K), data.normal(*((K, N) if "transposed" in name else (N, K)))
    out = data.out(M, N)
    getattr(broken, run)(name, a, b, out)
    return out, a64 @ (b64 if "transposed" in name else b64.T)


@pytest.mark.parametrize(("schedule", "when"), ALL_ORDERS)
def test_the_emulator_finds_every_fault_of_a_pipeline(broken, schedule, when):
    sound = [name for name in broken.tile_names() if name.startswith("sound")]
    assert set(broken.tile_names()) == {*sound, *TILE_FAULTS, "no_swizzle"}
    schedules.set_order(broken, (schedule, when))
    for name, text in TILE_FAULTS.items():
        with pytest.raises(RuntimeError, match=text):
            tile_product(broken, name)
    assert len(sound) == 4
    for name in sound:
        got, want = tile_product(broken, name)
        np.testing.assert_allclose(got, want, atol=1e-5 * abs(want).max(), err_msg=name)


@pytest.mark.parametrize(("schedule", "when"), ALL_ORDERS)
def test_the_emulator_finds_every_fault_of_a_hopper_pipeline(broken, schedule, when):
    sound = [name for name in broken.hopper_names() if name.startswith("sound")]
    assert set(broken.hopper_names()) == {*sound, *HOPPER_FAULTS, *HOPPER_WRONG}
    schedules.set_order(broken, (schedule, when))
    M, N, K = size = 150, 136, 330

    def product(name):
        return tile_product(broken, name, *size, run="run_hopper")

    for name, text in HOPPER_FAULTS.items():
        with pytest.raises(RuntimeError, match=text):
            product(name)
    assert len(sound) == 6
    for name in sound:
        broken.clear_counts()
        got, want = product(name)
        np.testing.assert_allclose(got, want, atol=1e-5 * abs(want).max(), err_msg=name)
        stages = -(-M // 128) * -(-N // 128) * -(-K // 64)
        counts = broken.counts()
        assert counts.tile_copies == stages * (3 if "transposed" in name else 2)
        assert counts.warpgroup_multiply_add == stages * 2 * 4
    for name in HOPPER_WRONG:
        got, want = product(name)
        assert not np.allclose(got, want, atol=1e-2 * abs(want).max()), name


def test_bank_conflicts_are_counted(broken):
    """A swizzle that is forgotten gives the right product, eight times as slowly."""
    for name in (*(n for n in broken.tile_names() if n.startswith("sound")), "no_swizzle"):
        schedules.set_order(broken, schedules.FIRST)
        got, want = tile_product(broken, name)
        np.testing.assert_allclose(got, want, atol=1e-5 * abs(want).max(), err_msg=name)
        counts = broken.counts()
        assert counts.load_matrix > 0
        assert counts.bank_conflicts == (4 * 7 * counts.load_matrix if name == "no_swizzle" else 0), name


# Of clusters' shared memory, of tiles copied to several blocks, and of dependent launches.
NO_BARRIER = "with no barrier between, in broken_cluster.cu"
UNFINISHED = "with no wait_for_earlier_launches before, in broken_cluster.cu"
WRONG_BYTES = (
    "synccheck: (.* bytes more than expected|.* phase has been completed without it|.* anyone had waited for the copy)"
)
TOO_EARLY = "(racecheck: .*, into which the copy started|initcheck: .*, which nobody has (stored|copied) to)"
GROUP_FAULTS = {
    "no_barrier": "racecheck: .* loads shared memory of block . of its cluster, which may not have started",
    "no_last_barrier": (
        r"racecheck: .* loads shared memory of block . of its cluster(, which has ended| in .* keeps that from ending)"
    ),
    "no_last_barrier_after_store": (
        r"racecheck: .* stores to shared memory of block . of its cluster(, which has ended| in .* keeps that from)"
    ),
    "block_barrier": "racecheck: .* loads shared memory of block . of its cluster, which may not have started",
    "access_between_halves": f"racecheck: .* (loaded|stored to) {NO_BARRIER}",
    "store_after_load": f"racecheck: .* element .*, which another block (loaded|stored to) {NO_BARRIER}",
    "store_seen_without_barrier": "(racecheck: .* another block|initcheck: .* loads element .* nobody has stored to)",
    "both_store": f"racecheck: .* stores to element .*, which another block stored to {NO_BARRIER}",
    "block_skips_barrier": (
        "(synccheck: all threads of block .* wait, 64 at cluster_wait|racecheck: .* which may not have started)"
    ),
    "no_wait": "racecheck: .* loads shared memory of block . of its cluster, which may not have started",
    "no_arrival": "synccheck: .* waits for the cluster's barrier before it has arrived there",
    "two_arrivals": "synccheck: .* arrives at the cluster's barrier again before it has waited",
    "divergent_arrival": "(synccheck|racecheck): .* (cluster_arrive|may not have started)",
    "rank_past_cluster": "memcheck: .* asks for an address in block 2 of a cluster of 2",
    "static_shared": "memcheck: .* asks for an address in another block outside dynamic shared memory",
    "past_shared": "memcheck: .* loads 4 bytes outside the dynamic shared memory of a block",
    "misaligned": "memcheck: .* loads an address in another block that is not 4-byte aligned",
    "misaligned_four": "memcheck: .* loads an address in another block that is not 16-byte aligned",
    "never_stored": "initcheck: .* loads element .* of dynamic shared memory, which nobody has stored to",
    "not_whole_clusters": "launch failed: 912$",
    "no_cluster": "memcheck: .* asks for an address in block 1 of a cluster of 1",
    "tile_expects_own_only": f"({WRONG_BYTES}|{TOO_EARLY})",
    "tile_expects_too_much": r"synccheck: all threads of .* \(phase 0 lacks 0 arrivals and 16 bytes\)",
    "tile_no_barrier_after_init": (
        "(racecheck: .* copies a tile to shared memory of .*, which may not have started"
        "|initcheck: .* for a barrier that nobody has initialised)"
    ),
    "tile_block_barrier_after_init": "racecheck: .* copies a tile to shared memory of .*, which may not have started",
    "tile_no_init_fence": "racecheck: .* with no barrier_init_fence",
    "tile_no_init": "initcheck: .* for a barrier that nobody has initialised",
    "tile_third_block": "memcheck: .* copies a tile to blocks 7 of a cluster of 2",
    "tile_no_block": "memcheck: .* copies a tile to blocks 0 of a cluster of 2",
    "tile_no_wait": TOO_EARLY,
    "tile_to_shared_loaded_before": "(initcheck: .* nobody has stored to|racecheck: .* loaded with no barrier)",
    "tile_to_shared_stored_before": "racecheck: .* stored to with no fence towards the asynchronous proxy",
    "one_thread_waits": f"racecheck: .* (loads|stores) 4 bytes that a launch before this one stores, {UNFINISHED}",
    "loads_before_wait": f"racecheck: .* loads 4 bytes that a launch before this one stores, {UNFINISHED}",
    "stores_before_wait": f"racecheck: .* stores 4 bytes that a launch before this one stores, {UNFINISHED}",
    "stores_what_is_read": f"racecheck: .* stores 4 bytes that a launch before this one (loads|stores), {UNFINISHED}",
    "between_waits_late": f"racecheck: .* loads 4 bytes that a launch before this one stores, {UNFINISHED}",
    "between_never_waits": "racecheck: .* loads 4 bytes .*, whose end the launch between has not waited for",
    "between_ends_without_wait": "racecheck: .* loads 4 bytes .*, whose end the launch between has not waited for",
    "first_never_waits": "racecheck: .* loads 4 bytes of in with no wait_for_earlier_launches before",
}
RING_FAULTS = {
    "arrives_before_wait": r"racecheck: .* copies a tile to .* reads; warp \d has (not )?waited for that",
    "arrives_at_own_only": r"synccheck: all threads of .* \(phase 0 lacks 4 arrivals and 0 bytes\)",
    "one_warp_arrives": r"racecheck: .* copies a tile to .* reads; warp \d has (not )?waited for that",
    "never_waits_for_readers": r"racecheck: .* copies a tile to .*( reads; warp \d has (not )?waited| the copy)",
    "no_last_barrier": r"racecheck: .* arrives at a barrier in shared memory of block .*(which has ended|from ending)",
    "expects_half": f"({WRONG_BYTES}|{TOO_EARLY})",
}


@pytest.mark.parametrize(("schedule", "when"), ALL_ORDERS)
def test_the_emulator_finds_every_fault_between_blocks_and_launches(broken, schedule, when):
    sound = [name for name in broken.group_names() if name.startswith("sound")]
    assert set(broken.group_names()) == {*sound, *GROUP_FAULTS}
    schedules.set_order(broken, (schedule, when))
    x = np.arange(128, dtype=np.float32)
    for name, text in GROUP_FAULTS.items():
        with pytest.raises(RuntimeError, match=text):
            broken.run_group(name, x, np.full(128, np.nan, np.float32))
    assert len(sound) == 10
    for name in sound:
        out = np.full(128, np.nan, np.float32)
        broken.run_group(name, x, out)
        np.testing.assert_array_equal(out, x.reshape(2, 64)[:, ::-1].ravel(), name)


@pytest.mark.parametrize(("schedule", "when"), ALL_ORDERS)
def test_the_emulator_finds_every_fault_of_a_pipeline_that_blocks_share(broken, schedule, when):
    assert set(broken.ring_names()) == {"sound", *RING_FAULTS}
    schedules.set_order(broken, (schedule, when))
    size = 70, 136, 330
    for name, text in RING_FAULTS.items():
        with pytest.raises(RuntimeError, match=text):
            tile_product(broken, name, *size, run="run_ring")
    broken.clear_counts()
    got, want = tile_product(broken, "sound", *size, run="run_ring")
    np.testing.assert_allclose(got, want, atol=1e-5 * abs(want).max())
    assert broken.counts().tile_copies == 2 * 4 * 6 * 3  # of each of 8 blocks' 6 stages: b's, and a's half for two
