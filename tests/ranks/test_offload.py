"""Tensors kept elsewhere: factors, masters and AdamW's state on the host, the weights there, weights twice (hpZ).

On a CPU the host is the device. What offloading changes is still done: factors and masters are allocated as the host's,
factors go through the buffers, and where a scene says so the weights do.
"""

import contextlib
import itertools
from unittest import mock

import pytest
import torch
from comparing import STEPS, assert_same, dense, distances
from deepspeed import comm as dist
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.utils import safe_get_full_grad
from launching import on_ranks
from test_clipping import TIGHT
from test_faults import matrices_of
from test_resume import end_of, equal, saved_and_resumed
from toys import Resting, batches, micro_batches
from training import config, engine_for, mean_over_ranks, toy, train, train_step, whole_momenta, whole_weights

from ds_mofa import host_weights
from ds_mofa import owner as owner_module
from ds_mofa.deepspeed.gradients import GradientMixin
from ds_mofa.deepspeed.gradients import pieces as on_the_way

CPU = {"device": "cpu", "pin_memory": False}
PINNED = {"device": "cpu", "pin_memory": True}
NOWHERE = {}
PARAMETERS = {"offload_param": CPU}
ALL = {"offload_optimizer": PINNED, "offload_param": PINNED}
ONE_AT_A_TIME = {"update_bytes": 1}


def settings_of(stage: int, where: dict, dtype: str = "fp32", **rest) -> dict:
    """With torch's AdamW wherever its state is, so that nothing but the place differs."""
    options = {**ONE_AT_A_TIME, **rest.pop("options", {})}
    return config(
        stage, dtype=dtype, options=options, zero_optimization=where, zero_force_ds_cpu_optimizer=False, **rest
    )


def places_of(stage: int) -> list[dict]:
    return [NOWHERE, {"offload_optimizer": PINNED if stage == 1 else CPU}] + ([PARAMETERS, ALL] if stage == 3 else [])


# ---------------------------------------------------------------------- the same bits wherever they are


def everywhere(stage: int, dtype: str, **options) -> dict:
    """One run for each place, and what went through the buffers of the offloaded ones."""

    def look(engine):
        step = engine.basic_optimizer.matrices
        report = step.report.values if step.report else None
        return {"report": report, "peak": step._staging.peak, "owned": [p.numel() for p in owned(step)]}

    return {
        "runs": [train(settings_of(stage, where, dtype, options=options), 3, look=look) for where in places_of(stage)]
    }


def owned(step) -> list[torch.Tensor]:
    """U, sigma and V of each of this rank's matrices, in one tensor."""
    own = [(block, i) for block in step.layout.owned_by(step.exchange.rank) for i in range(len(block.members))]
    views = [(block.views(step.factors, step.exchange.rank * step.layout.segment), i) for block, i in own]
    return [torch.cat([part[i].flatten() for part in parts]) for parts, i in views]


def assert_the_same_everywhere(ran) -> None:
    for result in ran.ranks:
        plain, *offloaded = [{key: run[key] for key in ("losses", "weights", "momenta")} for run in result["runs"]]
        assert offloaded and all(equal(run, plain) for run in offloaded)


FEW = [{"stage": 2, "dtype": "fp32"}, {"stage": 3, "dtype": "bf16"}]


@on_ranks(everywhere, stage=[1, 2, 3], dtype=["fp32", "bf16"])
def test_offloading_changes_no_bit(ran):
    assert_the_same_everywhere(ran)


@on_ranks(everywhere, *FEW, world=[1, 3])
def test_offloading_changes_no_bit_on_one_rank_and_on_three(ran):
    assert_the_same_everywhere(ran)


@on_ranks(everywhere, stage=[2, 3], dtype=["bf16"], master_weights=[True])
def test_masters_on_the_host_change_no_bit(ran):
    assert_the_same_everywhere(ran)


@on_ranks(everywhere, *FEW, world=[1, 2, 3])
def test_factors_pass_through_two_buffers_of_a_sub_batch(ran):
    for result in ran.ranks:
        for where, run in zip(places_of(ran.stage), result["runs"]):
            seen = run["seen"]
            if "offload_optimizer" not in where:
                assert seen["peak"] == 0
                continue
            largest, buffers = 4 * max(seen["owned"]), min(2, len(seen["owned"]))
            assert buffers * largest <= seen["peak"] < buffers * (largest + 3 * 256)


@on_ranks(everywhere, stage=[2], dtype=["fp32"], diagnostics_every=[2])
def test_reports_are_the_same_wherever_the_factors_are(ran):
    for result in ran.ranks:
        reports = [run["seen"]["report"] for run in result["runs"]]
        assert reports[0].any() and all(torch.equal(report, reports[0]) for report in reports)


def resting(stage: int, optimizer: str) -> dict:
    """bf16 with masters, of matrices that are unused in some steps; the last place is where all that can be is away."""
    options = {"master_weights": True, "explore": 3} if optimizer == "MoFaSGD" else {"master_weights": True}
    runs, places = [], (NOWHERE, places_of(stage)[-1])
    for where in places:
        settings = settings_of(stage, where, "bf16", options={**ONE_AT_A_TIME, **options}, optimizer=optimizer)
        with engine_for(settings, model=toy(Resting)) as engine:
            kept = {0: whole_weights(engine.module)}
            for number, batch in enumerate(batches(STEPS), start=1):
                train_step(engine, batch)
                kept[number] = whole_weights(engine.module)
            runs.append({"kept": kept, "momenta": whole_momenta(engine)})
    return {"runs": runs}


@on_ranks(resting, stage=[2, 3], optimizer=["MoFaSGD", "GaLore"])
def test_a_matrix_without_a_gradient_stays_on_the_host_too(ran):
    rests = {"spare.weight": (2, 3), "late.weight": (1, 2), "fixed.weight": (3, 4, 5)}
    for result in ran.ranks:
        here, away = result["runs"]
        assert equal(away, here)
        kept = here["kept"]
        for name, steps in rests.items():
            assert all(torch.equal(kept[number][name], kept[number - 1][name]) for number in steps)
            assert not torch.equal(kept[STEPS][name], kept[0][name])


def skipping(stage: int) -> dict:
    """fp16 from a loss scale at which the first steps overflow."""
    scale = {"initial_scale_power": 24, "hysteresis": 1}

    def look(engine):
        step = engine.basic_optimizer.matrices
        return {"steps": step.steps, "skipped": step.skipped}

    places = (NOWHERE, places_of(stage)[-1])
    return {"runs": [train(settings_of(stage, where, "fp16", fp16=scale), 10, look=look) for where in places]}


@on_ranks(skipping, stage=[2, 3])
def test_steps_that_are_skipped_change_nothing_on_the_host(ran):
    assert_the_same_everywhere(ran)
    for run in ran.ranks[0]["runs"]:
        assert run["seen"]["skipped"] > 0 and run["seen"]["steps"] > 1


def clipped(stage: int) -> dict:
    return train(settings_of(stage, places_of(stage)[-1], micro=3, gradient_clipping=TIGHT), STEPS)


@on_ranks(clipped, stage=[1, 2, 3])
def test_the_norm_to_clip_by_takes_the_offloaded_factors(ran):
    wanted = dense(clip=TIGHT)
    assert_same(ran, wanted)
    for result in ran.ranks:
        assert result["norms"] == pytest.approx(wanted["norms"], rel=1e-5)


# ---------------------------------------------------------------------- saved here, resumed there


def moved(stage: int, dtype: str, master_weights: bool) -> dict:
    """Saved after three steps by each of two runs, of which one offloads; resumed by both kinds from both."""
    data, places = batches(6), [NOWHERE, places_of(stage)[-1]]
    kinds = [settings_of(stage, where, dtype, options={"master_weights": master_weights}) for where in places]
    ends = {}
    for i, settings in enumerate(kinds):
        with engine_for(settings) as engine:
            for batch in data[:3]:
                train_step(engine, batch)
            engine.save_checkpoint(f"saved{i}")
            ends[f"{i} goes on"] = end_of(engine)
    for (i, _), (j, settings) in itertools.product(enumerate(kinds), repeat=2):
        with engine_for(settings, model=toy(seed=1)) as engine:
            engine.load_checkpoint(f"saved{i}")
            ends[f"{j} from {i}"] = end_of(engine)
    return ends


@on_ranks(
    moved,
    {"stage": 1, "dtype": "fp32", "master_weights": False},
    {"stage": 2, "dtype": "bf16", "master_weights": True},
    {"stage": 3, "dtype": "bf16", "master_weights": True},
)
def test_a_checkpoint_does_not_know_where_its_tensors_were(ran):
    for result in ran.ranks:
        assert len(result) == 6
        for end in result.values():
            assert equal(end, result["0 goes on"])


# ---------------------------------------------------------------------- an SVD that fails half-way


def svd_fails(stage: int) -> dict:
    """In the third step the second SVD on rank 1 raises: one sub-batch has been worked on, and another not."""
    svd, calls = torch.linalg.svd, itertools.count()

    def fail(*args, **kwargs):
        if dist.get_rank() == 1 and next(calls) == 1:
            raise torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")
        return svd(*args, **kwargs)

    with engine_for(settings_of(stage, places_of(stage)[-1], "bf16")) as engine:
        *data, bad = batches(3)
        for batch in data:
            train_step(engine, batch)
        before = matrices_of(engine)
        with mock.patch("torch.linalg.svd", fail):
            train_step(engine, bad)
        after = matrices_of(engine)
        train_step(engine, bad)
        return {"before": before, "after": after, "end": matrices_of(engine), "calls": next(calls)}


@on_ranks(svd_fails, stage=[2, 3])
def test_a_failure_half_way_leaves_offloaded_factors_as_they_were(ran):
    assert ran.ranks[1]["calls"] == 2
    for result in ran.ranks:
        assert equal(result["before"], result["after"])
        assert result["end"]["steps"] == 3 and not equal(result["end"]["weights"], result["after"]["weights"])


# ---------------------------------------------------------------------- moved by hand, gathered by slices


def put_away(stage: int) -> dict:
    """Four steps with DeepSpeed's states away and back after the second, and without; the factors by slices."""
    include = None if stage < 3 else [OffloadStateTypeEnum.lp_grads, OffloadStateTypeEnum.contiguous_grad_buffer]
    ends = []
    for away in (False, True):
        with engine_for(settings_of(stage, NOWHERE, "bf16")) as engine:
            for number, batch in enumerate(batches(4)):
                if away and number == 2:
                    engine.offload_states(include=include, pin_memory=False)
                    engine.reload_states()
                train_step(engine, batch)
            ends.append(matrices_of(engine))
            with mock.patch.object(owner_module, "_SLICE", 100):
                by_slices = engine.basic_optimizer.matrices.state_dict()
            at_once = engine.basic_optimizer.matrices.state_dict()
    return {"stayed": ends[0], "went": ends[1], "by slices": by_slices, "at once": at_once}


@on_ranks(put_away, stage=[1, 2, 3])
def test_deepspeeds_states_go_and_come_back(ran):
    for result in ran.ranks:
        assert equal(result["stayed"], result["went"])


@on_ranks(put_away, stage=[2])
def test_factors_gathered_by_slices_are_the_factors(ran):
    assert ran.ranks[0]["at once"]["matrices"]
    for result in ran.ranks:
        assert equal(result["by slices"], result["at once"])


# ---------------------------------------------------------------------- weights through the buffers


def through(dtype: str, chunk: int, **options) -> dict:
    """Stage 3 with the weights on the host: written in place, and as beside a GPU, in chunks through the buffers."""
    settings = settings_of(3, PARAMETERS, dtype, options=options)

    def look(engine):
        return engine.basic_optimizer.matrices._staging.peak

    plain = train(settings, STEPS, look=look)
    with (
        mock.patch.object(host_weights, "_elsewhere", lambda tensor, device: True),
        mock.patch.object(host_weights, "CHUNK_BYTES", chunk),
    ):
        staged = train(settings, STEPS, look=look)
    return {"plain": plain, "staged": staged}


LARGE, SMALL = 1 << 26, 600
WHOLE = {"chunk": LARGE, "dtype": "bf16"}


@on_ranks(through, WHOLE, world=[2, 3])
def test_weights_that_pass_through_the_buffers_get_the_same_bits(ran):
    assert_written(ran)


@on_ranks(through, WHOLE, master_weights=[True])
def test_so_do_their_masters(ran):
    assert_written(ran)


def assert_written(ran) -> None:
    for result in ran.ranks:
        plain, staged = ({key: result[run][key] for key in ("losses", "weights")} for run in ("plain", "staged"))
        assert equal(plain, staged)
        assert result["plain"]["seen"] == 0 < result["staged"]["seen"]


@on_ranks(through, dtype=["fp32"], chunk=[SMALL], world=[3])
def test_chunks_that_end_inside_a_row_are_the_whole_to_the_order_of_a_gemm_s_sums(ran):
    for result in ran.ranks:
        assert max(distances(result["staged"], {**dense(), "momenta": {}}).values()) < 1e-5
        assert result["staged"]["seen"] == 2 * 768  # 150 elements each, and no more of any weight


# ---------------------------------------------------------------------- gradients to the host in pieces

PIECE = 100  # elements; embedding and head have 1295
ON_ITS_WAY = (
    "async_inplace_copy_grad_to_fp32_buffer_from_gpu",
    "async_accumulate_grad_in_cpu_via_gpu",
    "_restore_cpu_offload_grad_to_gpu",
    "reduce_independent_p_g_buckets_and_remove_grads",
)


def in_pieces_and_whole(stage: int, dtype: str, micro: int, managed: bool = True, masters: str = "fp32") -> dict:
    """The same run with gradients that go to the host in pieces, and by DeepSpeed's own methods."""
    extra = {"dtype": dtype, "micro": micro, "managed_gradient_accumulation": managed}
    if dtype == "fp16":
        extra["fp16"] = {"initial_scale_power": 24, "hysteresis": 1}
    elif masters == "bf16":
        extra["bf16"] = {"bf16_master_weights_and_grads": True}
    where = {"offload_optimizer": CPU, "reduce_bucket_size": 500}  # less than embedding and head
    settings = settings_of(stage, where, **extra)
    return {"ours": going_to_host(settings, micro), "deepspeed's": going_to_host(settings, micro, whole=True)}


def going_to_host(settings: dict, micro: int, whole: bool = False) -> dict:
    sizes, asked, left, copied = [], [], [], []
    pieces, plan = on_the_way.pieces_of, GradientMixin.plan_reductions
    reduce = stage_1_and_2.DeepSpeedZeroOptimizer.reduce_independent_p_g_buckets_and_remove_grads

    def counted(*tensors):
        made = list(pieces(*tensors))
        sizes.append([target.numel() for target, _ in made])
        return made

    def large(engine):
        return [engine.module.embed.weight, engine.module.head.weight]

    def watched(self, param, i):
        copied.append(param.numel() > self.reduce_bucket_size)
        reduce(self, param, i)

    def keep_the_buffer(self, *args):
        buffer = self.temp_grad_buffer_for_gpu_offload
        plan(self, *args)
        self.temp_grad_buffer_for_gpu_offload = buffer

    def step(engine, batch):
        total = torch.zeros(())
        embed, head = large(engine)
        hook = embed.register_hook(
            lambda _: left.append(engine.optimizer.get_param_gradient_attribute(head) is not None)
        )
        for number, part in enumerate(micro_batches(batch, dist.get_rank(), dist.get_world_size(), micro)):
            loss = engine(*part)
            engine.backward(loss)
            if number == micro - 1:
                found = [safe_get_full_grad(weight) for weight in large(engine)]
                asked.extend(grad.nan_to_num() for grad in found if grad is not None)
            if engine.managed_gradient_accumulation() or number == micro - 1:
                engine.step()
            total += loss.detach().float() / micro
        hook.remove()
        return mean_over_ranks(total)

    with contextlib.ExitStack() as patches:
        patch = lambda *args: patches.enter_context(mock.patch.object(*args))  # noqa: E731
        patch(on_the_way, "PIECE", PIECE)
        patch(on_the_way, "pieces_of", counted)
        patch(stage_1_and_2.DeepSpeedZeroOptimizer, "reduce_independent_p_g_buckets_and_remove_grads", watched)
        patch(stage_1_and_2, "DeepSpeedCPUAdam", torch.optim.AdamW)  # what DeepSpeed wants for 16-bit masters
        if whole:
            patch(GradientMixin, "plan_reductions", keep_the_buffer)
            for name in ON_ITS_WAY:
                patch(GradientMixin, name, getattr(stage_1_and_2.DeepSpeedZeroOptimizer, name))
        look = lambda engine: engine.optimizer.temp_grad_buffer_for_gpu_offload.numel()  # noqa: E731
        run = train(settings, 8 if "fp16" in settings else 2, look=look, step=step)
    return {**run, "sizes": sizes, "asked": dict(enumerate(asked)), "left": left, "copied": sum(copied)}


@on_ranks(
    in_pieces_and_whole,
    *({"stage": stage, "dtype": dtype, "micro": n} for stage in (1, 2) for dtype in ("fp32", "bf16") for n in (1, 3)),
    {"stage": 1, "dtype": "fp16", "micro": 3},
    {"stage": 2, "dtype": "fp16", "micro": 1},
)
def test_gradients_go_to_the_host_in_pieces_of_the_same_bits(ran):
    assert_the_same_bits_in_pieces(ran)


@on_ranks(in_pieces_and_whole, {"stage": 2, "dtype": "bf16", "micro": 3}, managed=[False])
def test_so_do_those_of_a_caller_who_manages_the_accumulation(ran):
    assert_the_same_bits_in_pieces(ran)


@on_ranks(in_pieces_and_whole, {"dtype": "bf16", "micro": 3, "masters": "bf16"}, stage=[1, 2])
def test_so_do_those_of_masters_in_16_bits(ran):
    assert_the_same_bits_in_pieces(ran)


@on_ranks(in_pieces_and_whole, {"stage": 2, "dtype": "bf16"}, micro=[1, 3], world=[1])
def test_on_one_rank_large_ones_go_without_a_copy(ran):
    assert_the_same_bits_in_pieces(ran)
    (result,) = ran.ranks
    assert result["ours"]["copied"] == 0 and result["deepspeed's"]["copied"] == 2 * 2 * ran.micro  # steps, parameters


@on_ranks(in_pieces_and_whole, {"stage": 2, "dtype": "bf16", "micro": 3}, world=[1])
def test_what_the_host_has_of_the_head_is_gone_when_the_embedding_comes(ran):
    for result in ran.ranks:
        assert result["ours"]["left"] == [False] * 6
        assert result["deepspeed's"]["left"] == [True, True, False] * 2


def assert_the_same_bits_in_pieces(ran) -> None:
    for result in ran.ranks:
        ours, deepspeeds = result["ours"], result["deepspeed's"]
        assert (ours["seen"], deepspeeds["seen"], deepspeeds["sizes"]) == (PIECE, 1295, [])
        assert any(len(sizes) > 2 and 0 < sizes[-1] < PIECE for sizes in ours["sizes"])
        assert all(0 < max(sizes) <= PIECE for sizes in ours["sizes"])
        assert equal(*({key: run[key] for key in ("losses", "norms", "weights", "asked")} for run in result.values()))
        assert len(ours["asked"]) and any(grad.any() for grad in ours["asked"].values())


# ---------------------------------------------------------------------- against the dense reference


def optimizer(stage: int) -> dict:
    settings = config(stage, zero_optimization={"offload_optimizer": CPU}, zero_force_ds_cpu_optimizer=False)
    return train(settings, STEPS)


def parameters(capture: str) -> dict:
    zero = {"offload_param": CPU, "offload_optimizer": CPU}
    options = {"capture": capture}
    return train(config(3, options=options, zero_optimization=zero, zero_force_ds_cpu_optimizer=False), STEPS)


def persistent() -> dict:
    """Stage 3 with every weight below the size from which DeepSpeed releases them: gathered all the time."""
    return train(config(3, zero_optimization={"stage3_param_persistence_threshold": 100_000}), STEPS)


HPZ = {"zero_hpz_partition_size": 2}


def hpz(dtype: str) -> dict:
    return train(config(3, dtype=dtype, zero_optimization=HPZ), STEPS)


@on_ranks(optimizer, stage=[1, 2, 3])
def test_offloaded_optimizer_state(ran):
    assert_same(ran, dense())


@on_ranks(parameters, capture=["linear", "hook"])
def test_offloaded_parameters(ran):
    assert_same(ran, dense())


@on_ranks(persistent)
def test_persistent_parameters(ran):
    assert_same(ran, dense())


@on_ranks(hpz, dtype=["fp32"])
def test_hpz_agrees_with_the_reference(ran):
    assert_same(ran, dense())


@on_ranks(hpz, dtype=["bf16"])
def test_hpz_in_bf16(ran):
    for result in ran.ranks:
        assert equal(result["weights"], ran.ranks[0]["weights"])
        assert distances(result, {**dense(), "momenta": {}})["losses"] < 0.01


# The seed is that of the run that was saved: after loading DeepSpeed goes on with its old copies of frozen weights.
@on_ranks(saved_and_resumed, {"stage": 3, "seed": 0, "zero_optimization": HPZ}, dtype=["fp32", "bf16"])
def test_hpz_resumes_bit_for_bit(ran):
    for result in ran.ranks:
        assert equal(result["saved"], result["loaded"])
        assert equal(result["uninterrupted"], result["resumed"])


def on_deepspeeds_cpu_adam(stage: int) -> dict:
    zero = {"offload_optimizer": CPU} | ({"offload_param": CPU} if stage == 3 else {})
    return train(config(stage, options={"torch_adam": False}, zero_optimization=zero), STEPS)


@pytest.mark.slow  # compiles an extension of DeepSpeed's, once a machine
@on_ranks(on_deepspeeds_cpu_adam, stage=[2, 3])
def test_deepspeeds_own_cpu_adam(ran):
    assert_same(ran, dense())
