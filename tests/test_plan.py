"""The planner: budgets hold, more is never worse, refusals name what works."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lowvram_video.attention.backend import EXACT_WORKSPACE
from lowvram_video.attention.sage import workspace_on
from lowvram_video.benchmarks.preset_plans import preset_plans, wan_footprint
from lowvram_video.memory.plan.candidates import candidates, spread_residents
from lowvram_video.memory.plan.decode import choose_decode, decode_memory, strip_memory
from lowvram_video.memory.plan.denoise import WeightBytes, denoise_memory
from lowvram_video.memory.plan.footprint import (
    GIB,
    MIB,
    UNLIMITED,
    Choice,
    Limits,
    ModelFootprint,
    WorkSize,
)
from lowvram_video.memory.plan.host_memory import RAM_MARGIN_BYTES
from lowvram_video.memory.plan.pass_times import compute_seconds
from lowvram_video.memory.plan.plan import MemoryPlan, PlanError, plan_leaner, plan_memory
from lowvram_video.memory.plan.table import describe, reasons
from lowvram_video.memory.plan.tiles import strip_rows
from lowvram_video.memory.plan.vae_footprint import VaeFootprint
from lowvram_video.system.sizes import in_gib
from lowvram_video.wanvideo.footprint import WAN21_VAE, WAN22_VAE, WanWork

WAN_14B = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
FP8 = wan_footprint("Wan 14B fp8", **WAN_14B, bytes_per_weight=1.0)
BF16 = wan_footprint("Wan 14B bf16", **WAN_14B, bytes_per_weight=2.0)
SMALL = wan_footprint("Wan 1.3B bf16", 1536, 8960, 12, 30, 2.0)
LONG_480P, LONG_720P = WorkSize(81, 480, 832), WorkSize(81, 720, 1280)
# measured on one H200: pinned copies 55 GB/s, bf16 products 816 TFLOP/s, cuDNN attention 570 TFLOP/s
H200 = {"tflops_matmul": 816.0, "tflops_attention": 570.0, "h2d_gbps": 55.4}
WORKSPACES = [EXACT_WORKSPACE, workspace_on(132 * 2048, copies_k=True), workspace_on(76 * 1536, is_hopper=True)]


def limits(gib: float, **changes) -> Limits:
    return Limits(int(gib * GIB), **changes)


def plan_or_none(model: ModelFootprint, work: WorkSize, allowed: Limits) -> MemoryPlan | None:
    try:
        return plan_memory(model, work, allowed)
    except PlanError:
        return None


@st.composite
def models(draw: st.DrawFn) -> ModelFootprint:
    heads = draw(st.sampled_from([3, 12, 24, 40]))
    blocks = draw(st.integers(1, 60))
    dim = 128 * heads
    if draw(st.booleans()):
        ffn_dim = draw(st.sampled_from([2, 4, 6])) * dim
        return wan_footprint("Wan", dim, ffn_dim, heads, blocks, draw(st.sampled_from([0.5625, 1.0, 2.0])))
    sizes = draw(st.lists(st.integers(2 * MIB, 800 * MIB), min_size=blocks, max_size=blocks))
    return ModelFootprint(
        "uneven", dim, 4 * dim, heads, tuple(sizes), 100 * MIB, vae=draw(st.sampled_from([None, WAN21_VAE]))
    )


@st.composite
def works(draw: st.DrawFn) -> WorkSize:
    frames = 4 * draw(st.integers(0, 40)) + 1
    height, width = (16 * draw(st.integers(4, 90)) for _ in range(2))
    return WorkSize(frames, height, width, batch=draw(st.integers(1, 2)), passes_per_step=draw(st.integers(1, 2)))


@st.composite
def machines(draw: st.DrawFn) -> Limits:
    return Limits(
        draw(st.integers(GIB, 40 * GIB)),
        ram_budget_bytes=draw(st.none() | st.integers(6 * GIB, 64 * GIB)),
        pinned_cap_bytes=draw(st.none() | st.integers(0, 32 * GIB)),
        num_slots=draw(st.sampled_from([None, 2, 3, 4])),
        fused=draw(st.booleans()),
        attention=draw(st.sampled_from(WORKSPACES)),
        tflops_matmul=draw(st.floats(5, 1000)),
        tflops_attention=draw(st.floats(5, 1000)),
        h2d_gbps=draw(st.floats(2, 60)),
        disk_gbps=draw(st.floats(0.1, 15)),
    )


def test_ragged_lengths_that_sageattention_is_spared_count_as_exact_attention() -> None:
    """12,240 tokens are no whole blocks of 64, 11,520 are: fewer tokens take more."""
    spares = replace(WORKSPACES[1], spared=EXACT_WORKSPACE)
    choice, spared = Choice(16384, 1, True, 40, False), limits(12, attention=spares)
    seventeen = WanWork(65, 320, 576)
    sixteen = replace(seventeen, frames=61)
    assert (seventeen.tokens, sixteen.tokens) == (12240, 11520) and spares.spares(12240) and not spares.spares(11520)

    def bytes_of(work: WorkSize, limits: Limits = spared) -> int:
        return FP8.activation_bytes(work, choice, limits)

    assert bytes_of(seventeen, limits(12, attention=EXACT_WORKSPACE)) <= bytes_of(seventeen) < bytes_of(sixteen)
    # what is beside all calls is beside these
    assert replace(spares, mean=None).beside(4.0, 3.0).nbytes(10, 20, 2, 128, 12240) == 2 * 128 * (40 + 60) + 2 * 40


def test_a_plan_is_kept_for_fewer_tokens_where_these_fit() -> None:
    """Windows of a video may end with a shorter one: of 8,775 tokens queries go in halves, of 8,190 all at once."""
    model = replace(FP8, streams_queries=True)
    plan = plan_memory(model, WorkSize(17, 624, 720), limits(1.7, attention=EXACT_WORKSPACE, **H200))
    choice = replace(plan.choice, query_chunk=8192, packed_keys=False)
    nearly = replace(plan.work, width=672)
    assert (nearly.tokens, choice.query_rows(nearly), choice.query_rows(plan.work)) == (8190, 8190, 5120)
    tight = replace(plan, choice=choice, limits=replace(plan.limits, vram_budget_bytes=plan.denoise.total))
    assert tight.has_room_for(plan.work) and tight.has_room_for(replace(plan.work, width=320))
    assert not tight.has_room_for(replace(plan.work, frames=21)), "more tokens"
    assert not tight.has_room_for(nearly)
    wider = replace(tight, limits=replace(plan.limits, vram_budget_bytes=plan.denoise.total + 64 * MIB))
    assert wider.has_room_for(nearly), "what the plan left of the budget"


class TestMonotonicity:
    @settings(max_examples=150, deadline=None)
    @given(models(), works(), machines(), st.integers(0, 16 * GIB))
    def test_more_budget_is_never_worse(self, model, work, allowed, more):
        lean = plan_or_none(model, work, allowed)
        richer_limits = replace(allowed, vram_budget_bytes=allowed.vram_budget_bytes + more)
        rich = plan_or_none(model, work, richer_limits)
        assume(lean is not None)
        assert rich is not None, "a larger budget was refused"
        assert lean.peak_bytes <= allowed.vram_budget_bytes
        assert rich.peak_bytes <= richer_limits.vram_budget_bytes
        assert rich.blocks.num_resident >= lean.blocks.num_resident
        assert rich.seconds_per_step <= lean.seconds_per_step
        assert (rich.decode.tile or 10**9) >= (lean.decode.tile or 10**9)

    @settings(max_examples=60, deadline=None)
    @given(models(), works(), machines())
    def test_the_plan_adds_up(self, model, work, allowed):
        plan = plan_or_none(model, work, allowed)
        assume(plan is not None)
        sizes = model.streamable_bytes(plan.choice.cache_text_kv)
        kept = set(plan.blocks.resident)
        assert sum(size for i, size in enumerate(sizes) if i in kept) == plan.denoise.residents
        assert sum(size for i, size in enumerate(sizes) if i not in kept) == plan.blocks.streamed_bytes
        assert (
            len(kept) == plan.blocks.num_resident
            and plan.blocks.num_resident + plan.blocks.num_streamed == model.num_blocks
        )
        if not plan.host.from_disk:
            assert plan.host.pinned_bytes + plan.host.pageable_bytes == plan.blocks.streamed_bytes
        if plan.blocks.num_streamed:
            assert 0 < plan.blocks.ring_bytes <= plan.blocks.num_slots * (max(sizes) + 256)
        if allowed.pinned_cap_bytes is not None:
            assert plan.host.pinned_bytes <= allowed.pinned_cap_bytes
        assert model.num_heads % plan.choice.head_groups == 0

    @pytest.mark.parametrize("model", [replace(FP8, packs_keys=True, row_bytes=13828), SMALL], ids=["8 bits", "bf16"])
    def test_what_candidates_have_in_common_is_what_each_has_by_itself(self, model):
        allowed = limits(8, attention=EXACT_WORKSPACE, **H200)
        for each in candidates(model, LONG_480P, allowed):
            alone = denoise_memory(model, LONG_480P, each.choice, allowed)
            weights = WeightBytes(each.denoise.residents, each.blocks.ring_bytes, each.host.pinned_bytes)
            assert each.denoise == alone.holding(weights)
            assert each.times.compute == compute_seconds(model, LONG_480P, each.choice, allowed)
            sizes = model.streamable_bytes(each.choice.cache_text_kv)
            assert each.blocks.resident == spread_residents(model.num_blocks, each.choice.num_resident)
            assert sum(sizes) == each.denoise.residents + each.blocks.streamed_bytes

    def test_what_is_too_little_for_more_weights_goes_into_larger_pieces(self):
        eight_bit = replace(FP8, packs_keys=True, row_bytes=13828, key_row_bytes=5124, vae=None)
        rest = {"blocks_to_swap": 40, "attention": EXACT_WORKSPACE, **H200}
        plan = plan_memory(eight_bit, LONG_720P, limits(3.5, **rest))
        assert plan.choice.token_chunk >= 8192 and plan.model.num_heads // plan.choice.head_groups >= 8
        lean = plan_memory(eight_bit, LONG_720P, limits(3.3, **rest))
        assert plan.times.compute < lean.times.compute

    def test_whole_blocks_and_what_passes_begin_with_are_there_where_they_fit(self):
        for gib in (4, 6, 12):
            plan = plan_memory(replace(FP8, vae=None), LONG_480P, limits(gib, blocks_to_swap=40, **H200))
            assert plan.times.total == plan.times.compute, "nothing is gained by either, as far as rates are right"
            assert not plan.choice.in_stages and not plan.choice.transient_fixed

    def test_work_whose_attention_is_looked_at_has_all_queries_as_they_were_computed(self):
        model = replace(FP8, packs_keys=True, vae=None)
        plan = plan_memory(model, replace(LONG_480P, all_queries=True), limits(6))
        while plan is not None:
            assert plan.choice.query_chunk is None and not plan.choice.packed_keys
            try:
                plan = plan_leaner(plan)
            except PlanError:
                plan = None
        assert plan_memory(model, LONG_480P, limits(2.4)).choice.packed_keys

    def test_a_budget_that_the_leanest_plan_fills_is_not_refused(self):
        for work in (LONG_480P, LONG_720P):
            with pytest.raises(PlanError) as refused:
                plan_memory(replace(FP8, vae=None), work, limits(1))
            assert refused.value.smallest_budget_bytes is not None
            plan_memory(replace(FP8, vae=None), work, Limits(refused.value.smallest_budget_bytes))

    def test_residents_are_spread_evenly(self):
        for count in range(41):
            residents = spread_residents(40, count)
            assert len(residents) == count
            gaps = [b - a for a, b in pairwise(residents)]
            assert not gaps or max(gaps) - min(gaps) <= 1

    def test_streamed_blocks_fill_the_slots_evenly(self):
        for gib in range(5, 18):
            plan = plan_memory(FP8, LONG_480P, limits(gib))
            assert plan.blocks.num_streamed % 2 == 0
            assert plan.blocks.num_streamed == 0 or plan.blocks.num_streamed > plan.blocks.num_slots


class TestKnownFigures:
    @pytest.mark.parametrize(
        ("model", "work", "gib"),
        [(FP8, LONG_480P, 3.5), (FP8, LONG_720P, 6.5), (BF16, WorkSize(17, 480, 832), 4.0)],
    )
    def test_the_promised_budgets_suffice(self, model, work, gib):
        for swap in (-1, model.num_blocks):
            plan = plan_memory(model, work, limits(gib, blocks_to_swap=swap))
            peak = plan.peak_bytes / GIB
            print(f"{model.name} {work}: predicted peak {peak:.2f} of {gib} GiB, chunk {plan.choice.token_chunk}")
            assert peak <= gib

    def test_tokens_and_block_bytes(self):
        assert LONG_480P.tokens == 32760 and LONG_720P.tokens == 75600
        assert WorkSize(121, 704, 1280, stride=(4, 16, 16)).tokens == 31 * 22 * 40
        assert FP8.block_bytes[0] == pytest.approx(351e6, rel=0.01)
        assert BF16.block_bytes[0] == pytest.approx(703e6, rel=0.01)
        # the fp8 file of 13.5 GiB
        assert sum(FP8.block_bytes) + FP8.fixed_bytes == pytest.approx(13.5 * GIB, rel=0.01)

    @pytest.mark.parametrize(
        ("work", "products", "attention"), [(LONG_480P, 19.6e12, 22.0e12), (LONG_720P, 45.2e12, 117e12)]
    )
    def test_flops_per_block(self, work, products, attention):
        total = FP8.pass_flops(work, cache_text_kv=True)
        assert total[0] / 40 == pytest.approx(products, rel=0.02)
        assert total[1] / 40 == pytest.approx(attention, rel=0.02)

    @pytest.mark.parametrize(("work", "seconds"), [(LONG_480P, 2.49), (LONG_720P, 10.5)])
    def test_time_at_full_speed_is_the_measured_limit(self, work, seconds):
        predicted = compute_seconds(FP8, work, Choice(8192, 1, True, 40, False), limits(24, **H200))
        print(f"{work}: {predicted:.2f} s predicted, limit {seconds} s")
        assert predicted == pytest.approx(seconds, rel=0.04)

    @pytest.mark.parametrize(("height", "width", "gib"), [(480, 832, 2.64), (720, 1280, 6.09)])
    def test_vae_feature_cache(self, height, width, gib):
        assert WAN21_VAE.cache_bytes_per_pixel * height * width == pytest.approx(gib * GIB, rel=0.01)

    def test_wan22_vae_cache_from_its_channels(self):
        # (inputs of the causal convolutions, positions per pixel): three frames of each are held
        stages = [
            (48 + 4 * 1024 + 6 * 1024 + 1024, 1 / 256),
            (6 * 1024 + 1024, 1 / 64),
            (1024 + 5 * 512, 1 / 16),
            (512 + 5 * 256 + 256, 1 / 4),
        ]
        expected = sum(3 * channels * share for channels, share in stages)
        assert WAN22_VAE.cache_bytes_per_pixel == pytest.approx(2 * expected, rel=0.001)

    def test_short_bf16_clip_is_transfer_bound_on_a_fast_card(self):
        plan = plan_memory(BF16, WorkSize(17, 480, 832), limits(4, **H200))
        assert plan.times.transfer_bound and plan.choice.cache_text_kv
        assert plan_memory(FP8, LONG_480P, limits(4, **H200)).times.transfer_bound is False


def assert_budget_is_the_smallest(model: ModelFootprint, work: WorkSize, allowed: Limits, named: int) -> None:
    assert plan_memory(model, work, replace(allowed, vram_budget_bytes=named)).peak_bytes <= named
    with pytest.raises(PlanError):
        plan_memory(model, work, replace(allowed, vram_budget_bytes=named - 64 * MIB))


class TestRefusals:
    @settings(max_examples=60, deadline=None)
    @given(models(), works(), machines(), st.integers(0, 7 * GIB), st.none() | st.integers(0, 60))
    def test_what_a_refusal_names_works_and_the_next_does_not(self, model, work, allowed, budget, swap):
        allowed = replace(allowed, vram_budget_bytes=budget, ram_budget_bytes=None)
        if swap is not None:
            allowed = replace(allowed, blocks_to_swap=min(swap, model.num_blocks))
        try:
            plan_memory(model, work, allowed)
        except PlanError as error:
            refusal = error
        else:
            assume(False)
        assert_budget_is_the_smallest(model, work, allowed, refusal.smallest_budget_bytes)
        frames = refusal.largest_frames
        if frames is not None:
            assert frames % 4 == 1
            plan_memory(model, replace(work, frames=frames), allowed)
        with pytest.raises(PlanError):
            plan_memory(model, replace(work, frames=frames + 4 if frames else 1), allowed)
        if refusal.largest_size is not None:
            height, width = refusal.largest_size
            assert height % 16 == width % 16 == 0
            plan_memory(model, replace(work, height=height, width=width), allowed)
            short, ratio = min(height, width) + 16, max(work.height, work.width) / min(work.height, work.width)
            long = round(short * ratio / 16) * 16
            height, width = (short, long) if work.height <= work.width else (long, short)
            with pytest.raises(PlanError):
                plan_memory(model, replace(work, height=height, width=width), allowed)

    def test_message(self):
        with pytest.raises(PlanError) as caught:
            plan_memory(FP8, LONG_720P, limits(3))
        error, message = caught.value, str(caught.value)
        print(message)
        assert isinstance(error, ValueError)
        assert "Wan 14B fp8 at 1280x720, 81 frames does not fit in 3.00 GiB" in message
        assert f"raise the VRAM budget to at least {error.smallest_budget_bytes / GIB:g} GiB" in message
        assert f"make at most {error.largest_frames} frames" in message
        assert f"at most {error.largest_size[1]}x{error.largest_size[0]}" in message

    def test_sizes_keep_to_the_unit_of_the_model(self):
        model = wan_footprint("Wan TI2V 5B", 3072, 14336, 24, 30, 2.0, 48, 48, WAN22_VAE)
        work = WorkSize(121, 1408, 2560, stride=(4, 16, 16))
        with pytest.raises(PlanError) as caught:
            plan_memory(model, work, limits(3.5))
        height, width = caught.value.largest_size
        assert height % 32 == width % 32 == 0
        assert width / height == pytest.approx(2560 / 1408, rel=0.1)

    def test_by_hand_names_the_swap_count(self):
        with pytest.raises(PlanError, match="set blocks_to_swap to at least ") as caught:
            plan_memory(FP8, LONG_480P, limits(8, blocks_to_swap=5))
        count = int(str(caught.value).split("set blocks_to_swap to at least ")[1].split(";")[0])
        plan_memory(FP8, LONG_480P, limits(8, blocks_to_swap=count))
        with pytest.raises(PlanError):
            plan_memory(FP8, LONG_480P, limits(8, blocks_to_swap=count - 1))

    def test_nothing_at_all_fits(self):
        with pytest.raises(PlanError) as caught:
            plan_memory(FP8, LONG_480P, limits(0.5))
        assert caught.value.largest_frames is None and caught.value.largest_size is None
        assert "frames;" not in str(caught.value)

    @pytest.mark.parametrize("count", [-2, 41])
    def test_swap_count_out_of_range(self, count):
        with pytest.raises(PlanError, match=rf"blocks_to_swap is {count}, but .* 40 blocks: use -1 .* or 0 to 40"):
            plan_memory(FP8, LONG_480P, limits(8, blocks_to_swap=count))

    def test_too_few_slots(self):
        with pytest.raises(PlanError, match="num_slots is 1: streaming needs at least 2"):
            plan_memory(FP8, LONG_480P, limits(8, num_slots=1))

    def test_too_little_ram(self):
        with pytest.raises(PlanError, match="Raise the RAM budget to at least") as caught:
            plan_memory(FP8, LONG_480P, limits(4, ram_budget_bytes=2 * GIB))
        smallest = caught.value.smallest_ram_bytes
        assert plan_memory(FP8, LONG_480P, limits(4, ram_budget_bytes=smallest)).host.from_disk
        with pytest.raises(PlanError):
            plan_memory(FP8, LONG_480P, limits(4, ram_budget_bytes=smallest - 64 * MIB))

    def test_bad_values(self):
        with pytest.raises(ValueError, match="frames is 0; it must be at least 1"):
            WorkSize(0, 480, 832)
        with pytest.raises(ValueError, match="h2d_gbps is 0"):
            limits(8, h2d_gbps=0)


class TestByHand:
    @pytest.mark.parametrize("count", [0, 1, 2, 7, 20, 39, 40])
    def test_exactly_that_many_are_streamed(self, count):
        plan = plan_memory(FP8, LONG_480P, limits(24, blocks_to_swap=count))
        assert plan.blocks.num_streamed == count
        assert plan.blocks.num_slots == min(2, count)
        assert f"{count} of 40 blocks are streamed, as set by hand." in reasons(plan)

    def test_slots(self):
        plan = plan_memory(FP8, LONG_480P, limits(8, num_slots=4, blocks_to_swap=40))
        two = plan_memory(FP8, LONG_480P, limits(8, num_slots=2, blocks_to_swap=40))
        assert plan.blocks.num_slots == 4 and plan.blocks.ring_bytes == 2 * two.blocks.ring_bytes


class TestHostMemory:
    def test_ram_smaller_than_the_model_streams_from_disk(self):
        plan = plan_memory(FP8, LONG_480P, limits(6, ram_budget_bytes=6 * GIB, blocks_to_swap=40))
        assert plan.host.from_disk and plan.host.num_staging == 4
        assert plan.host.pinned_bytes + RAM_MARGIN_BYTES <= 6 * GIB
        assert any("read from the file in every pass, through 4 staging buffers" in reason for reason in reasons(plan))
        assert plan.times.transfer == pytest.approx(plan.blocks.streamed_bytes / 1.5e9)

    def test_tight_ram_takes_three_staging_buffers(self):
        block = BF16.block_bytes[0]
        beside = RAM_MARGIN_BYTES + BF16.transient_bytes
        ram = beside + 3 * block + 64 * MIB
        plan = plan_memory(BF16, WorkSize(17, 480, 832), limits(4, ram_budget_bytes=ram, blocks_to_swap=40))
        assert plan.host.from_disk and plan.host.num_staging in (3, 4)
        assert plan.host.pinned_bytes + beside <= ram

    def test_residents_count_too_as_they_stay_in_ram(self):
        # 28 GB of blocks on a large card in a machine of 16 GiB
        plan = plan_memory(BF16, LONG_480P, limits(48, ram_budget_bytes=16 * GIB))
        assert (
            plan.blocks.num_streamed == 0
            and plan.host.from_disk
            and plan.host.pinned_bytes == plan.host.pageable_bytes == 0
        )
        assert plan.host.num_staging >= 3  # keys and values of the text are made of all blocks
        assert any("read from the file once, to the device: 16.00 GiB of RAM" in reason for reason in reasons(plan))
        assert not plan_memory(BF16, LONG_480P, limits(48, ram_budget_bytes=32 * GIB)).host.from_disk

    @pytest.mark.parametrize("num_cards", [1, 2])
    def test_what_is_brought_in_each_pass_lies_in_ram_for_each_card(self, num_cards):
        """A leaner plan after an out-of-memory may bring it, too, where this one keeps it on the device."""
        work, blocks = replace(LONG_480P, cards=num_cards), sum(FP8.block_bytes)
        ram = RAM_MARGIN_BYTES + blocks + num_cards * FP8.transient_bytes
        assert FP8.transient_bytes > 256 * MIB
        for gib in (6, 40):
            plan = plan_memory(FP8, work, limits(gib, ram_budget_bytes=ram))
            assert not plan.host.from_disk and plan.host.ram_bytes == ram
            assert f"{in_gib(ram)} of RAM in all, with the process, at most" in describe(plan)
            assert plan_memory(FP8, work, limits(gib, ram_budget_bytes=ram - MIB)).host.from_disk
        on_cpu = plan_memory(FP8, work, Limits(UNLIMITED, ram_budget_bytes=RAM_MARGIN_BYTES + blocks))
        assert not on_cpu.host.from_disk, "nothing is brought there"

    def test_each_card_reads_from_the_disk_through_buffers_of_its_own(self):
        block, small = FP8.block_bytes[0], WorkSize(17, 480, 832)
        beside = RAM_MARGIN_BYTES + 2 * FP8.transient_bytes
        allowed = limits(4, ram_budget_bytes=beside + 6 * block, blocks_to_swap=40)
        plan = plan_memory(FP8, replace(small, cards=2), allowed)
        assert plan.host.num_staging == 3 and plan.host.pinned_bytes == 6 * max(
            FP8.streamable_bytes(plan.choice.cache_text_kv)
        )
        assert plan.host.ram_bytes <= beside + 6 * block
        with pytest.raises(PlanError, match="6 staging buffers and the process need"):
            plan_memory(
                FP8, replace(small, cards=2), replace(allowed, ram_budget_bytes=RAM_MARGIN_BYTES + 6 * block - MIB)
            )

    def test_half_of_the_blocks_resident_halves_no_ram(self):
        plan = plan_memory(FP8, LONG_480P, limits(24, ram_budget_bytes=10 * GIB, blocks_to_swap=20))
        assert plan.blocks.num_resident == 20 and plan.host.from_disk

    def test_residents_alone_are_read_one_by_one(self):
        ram = RAM_MARGIN_BYTES + BF16.block_bytes[0]
        assert plan_memory(BF16, LONG_480P, limits(48, ram_budget_bytes=ram)).host.from_disk
        with pytest.raises(PlanError, match="1 staging buffer and the process need"):
            plan_memory(BF16, LONG_480P, limits(48, ram_budget_bytes=ram - MIB))

    def test_enough_ram_does_not(self):
        assert not plan_memory(FP8, LONG_480P, limits(6, ram_budget_bytes=16 * GIB)).host.from_disk

    def test_pinned_cap(self):
        cap = 4 * GIB
        plan = plan_memory(FP8, LONG_480P, limits(6, pinned_cap_bytes=cap, blocks_to_swap=40))
        block = FP8.streamable_bytes(plan.choice.cache_text_kv)[0]
        assert plan.host.pinned_bytes == cap // block * block
        assert plan.host.pageable_bytes == 40 * block - plan.host.pinned_bytes
        assert any("pinned memory is capped at 4.00 GiB" in reason for reason in reasons(plan))
        assert plan.times.transfer > plan_memory(FP8, LONG_480P, limits(6, blocks_to_swap=40)).times.transfer


class TestDecode:
    def test_strips_are_the_fewest_that_fit(self):
        plan = plan_memory(FP8, LONG_720P, limits(6.5))
        context, rows = limits(6.5).context_bytes, plan.decode.rows
        assert rows and not plan.decode.tile and plan.decode.total <= 6.5 * GIB
        assert plan.decode == strip_memory(WAN21_VAE, LONG_720P, 16, (rows, plan.decode.in_ram), context)
        fewer = strip_rows(LONG_720P.height)[: strip_rows(LONG_720P.height).index(rows)]
        for in_ram in (False, True):
            for thicker in fewer:
                assert strip_memory(WAN21_VAE, LONG_720P, 16, (thicker, in_ram), context).total > 6.5 * GIB
        assert any(f"in strips of {rows} rows, exactly as in whole frames" in reason for reason in reasons(plan))

    def test_less_vram_means_thinner_strips_and_ram(self):
        budgets = (12, 8, 6, 4, 3, 2.5, 2)
        ways = [choose_decode(WAN21_VAE, LONG_720P, 16, limits(gib)) for gib in budgets]
        rows = [way.rows or LONG_720P.height for way in ways]
        assert ways[0].rows == 0 and all(way.rows for way in ways[1:]) and not any(way.tile for way in ways)
        assert rows == sorted(rows, reverse=True)
        assert ways[4].in_ram and 0 < ways[4].host < 2.7 * GIB
        assert all(way.total <= gib * GIB for way, gib in zip(ways, budgets, strict=True))

    def test_twice_as_long_takes_as_much_vram(self):
        longer = replace(LONG_720P, frames=161)
        for size in (LONG_720P, longer):
            assert choose_decode(WAN21_VAE, size, 16, limits(3)).rows
        short, long = (strip_memory(WAN21_VAE, size, 16, (120, True), 0) for size in (LONG_720P, longer))
        assert long.total - short.total < 64 * MIB and long.host < 2.7 * GIB

    def test_without_ram_nothing_waits_there(self):
        scarce = limits(3, ram_budget_bytes=GIB // 4)
        way = choose_decode(WAN21_VAE, LONG_720P, 16, scarce)
        assert not way.in_ram and way.rows < choose_decode(WAN21_VAE, LONG_720P, 16, limits(3)).rows

    def test_tiles_are_the_largest_that_fit_where_there_are_no_strips(self):
        vae = VaeFootprint(254 * 10**6, 4728, 5500)
        plan = plan_memory(replace(FP8, vae=vae), LONG_720P, limits(6.5))
        assert plan.decode.tile and plan.decode.total <= 6.5 * GIB
        context = limits(6.5).context_bytes
        assert plan.decode.total == decode_memory(vae, LONG_720P, 16, plan.decode.tile, context)
        assert decode_memory(vae, LONG_720P, 16, plan.decode.tile + 64, context) > 6.5 * GIB

    def test_where_not_even_strips_fit_there_are_tiles(self):
        assert choose_decode(WAN21_VAE, LONG_720P, 16, limits(1.3)).tile
        assert choose_decode(WAN21_VAE, LONG_720P, 16, limits(1.0)) is None

    def test_whole_frames_where_they_fit(self):
        assert plan_memory(FP8, LONG_480P, limits(8)).decode.tile == 0

    def test_somebody_elses_vae(self):
        plan = plan_memory(replace(FP8, vae=None), LONG_480P, limits(4))
        assert plan.decode.total == 0


class TestChoices:
    def test_spare_memory_buys_speed_first(self):
        chunks = [plan_memory(FP8, LONG_480P, limits(gib / 8)).choice.token_chunk for gib in range(28, 40)]
        assert chunks == sorted(chunks) and chunks[-1] == 32768

    def test_everything_resident_on_a_large_card(self):
        plan = plan_memory(FP8, LONG_480P, limits(24))
        assert plan.blocks.num_streamed == plan.blocks.ring_bytes == plan.host.pinned_bytes == 0
        assert plan.seconds_per_step == plan.times.compute

    def test_guidance_pass_by_pass_doubles_time_and_text(self):
        once = plan_memory(FP8, LONG_480P, limits(24))
        twice = plan_memory(FP8, replace(LONG_480P, passes_per_step=2), limits(24))
        assert twice.seconds_per_step == pytest.approx(2 * once.seconds_per_step)
        assert twice.denoise.text == 2 * once.denoise.text

    def test_leaner_plan_until_there_is_none(self):
        allowed = limits(6)
        plan = plan_memory(FP8, LONG_480P, allowed)
        peaks = [plan.denoise.total]
        with pytest.raises(PlanError):
            while len(peaks) < 100:
                plan = plan_leaner(plan)
                peaks.append(plan.denoise.total)
        assert 3 < len(peaks) < 100
        assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)

    def test_denoising_can_be_leaner_where_decoding_takes_more(self):
        tiny = wan_footprint("tiny", 512, 1024, 4, 6, 2.0)
        plan = plan_memory(tiny, WorkSize(5, 256, 256), limits(8))
        assert plan.denoise.total < plan.decode.total
        leaner = plan_leaner(plan)
        assert leaner.denoise.total < plan.denoise.total and leaner.decode == plan.decode


class TestInputs:
    def test_every_control_video_has_its_tokens(self) -> None:
        model, one = replace(FP8, control_streams=1), WanWork(81, 480, 832)
        tokens = one.rows * model.dim * model.compute_bytes
        more = [
            plan_memory(model, replace(one, controls=count), Limits(1 << 40)).denoise.activations for count in (1, 2, 3)
        ]
        assert [more[1] - more[0], more[2] - more[1]] == [tokens, tokens]

    def test_the_cameras_rays_are_counted(self) -> None:
        work = WorkSize(81, 480, 832)
        without, beside = (
            plan_memory(replace(FP8, ray_channels=channels), work, Limits(1 << 40)).denoise.activations
            for channels in (0, 1536)
        )
        assert beside - without >= 81 // 4 * 60 * 104 * 1536 * 2


class TestText:
    def test_table_says_it_all(self):
        plan = plan_memory(FP8, LONG_480P, limits(6))
        text = describe(plan)
        print(text)
        assert (
            f"blocks: {plan.blocks.num_resident} resident, {plan.blocks.num_streamed} streamed through 2 slots" in text
        )
        assert f"{plan.blocks.streamed_bytes / 1e9:.2f} GB over the bus" in text
        assert f"{plan.denoise.total / GIB:.2f} GiB" in text
        assert all(reason in text for reason in reasons(plan))
        assert "hide behind compute" in text

    def test_it_opens_with_a_verdict(self):
        first = [describe(plan_memory(FP8, LONG_480P, limits(gb))).splitlines()[0] for gb in (6, 24)]
        some, all_stay = (plan_memory(FP8, LONG_480P, limits(gb)) for gb in (6, 24))
        budget, stay = some.budget_bytes / GIB, some.blocks.num_resident
        kept = f"{stay} blocks stay, " if stay else ""
        assert first[0] == f"Fits in {budget:.2f} GiB: {kept}{some.blocks.num_streamed} stream behind compute."
        assert first[1] == f"Fits in {all_stay.budget_bytes / GIB:.2f} GiB: all 40 blocks stay."
        bound = plan_memory(BF16, WorkSize(17, 480, 832), limits(4, **H200))
        assert describe(bound).splitlines()[0].endswith("stream and set the pace.")

    def test_transfer_bound_is_said(self):
        plan = plan_memory(BF16, WorkSize(17, 480, 832), limits(4, **H200))
        assert "so they set the pace" in describe(plan)

    def test_presets(self):
        presets = preset_plans()
        assert {preset.card_gib for preset in presets} == {6, 8, 12, 16, 24}
        for preset in presets:
            assert (preset.plan is None) != (preset.refusal is None)
            if preset.plan is not None:
                assert preset.plan.peak_bytes <= preset.card_gib * GIB
        assert all(preset.plan is not None for preset in presets), "each of these works has to run on 6 GB"
        assert preset_plans(cards_gib=(2,))[-1].refusal
