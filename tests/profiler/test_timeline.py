"""The picture of a step: every kernel in its lane, at its time."""

import pytest

from profiling.timeline import draw_timeline, kind_of, lanes
from tests.kernel_events import kernel


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("_write_pairs_kernel", "write of W"),
        ("void at::native::multi_tensor_apply_kernel<at::native::FusedOptimizerTensorListMetadata<4>>", "AdamW"),
        ("_accumulate_kernel", "sketches"),
        ("sm90_xmma_gemm_f64f64_f64f64_f64_nt_n_tilesize64x32x32_stage3_kernel__5x_cublas", "factor update"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_d884gemm_64x64_16x4_nn_align1>", "factor update"),
        ("_jacobi_kernel", "factor update"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "products"),
        ("_rms_norm_backward_kernel", "all else"),
    ],
)
def test_kernels_of_a_real_step_have_their_kinds(name, kind):
    """Names as an H200's profile had them."""
    assert kind_of(name) == kind


def test_lanes_begin_with_the_first_kernel():
    found = lanes([kernel("nvjet_b", 5000, 5500), kernel("nvjet_a", 2000, 3000), kernel("ncclAllGather", 2500, 4000)])
    assert found == {"collectives": [(0.5, 1.5)], "products": [(0.0, 1.0), (3.0, 0.5)]}


def test_the_picture_is_drawn(tmp_path):
    step = [kernel(name, i * 100, i * 100 + 90) for i, name in enumerate(["nvjet", "_project_kernel", "norm"] * 50)]
    step += [kernel("ncclDevKernel_AllGather", 1000, 9000), kernel("_write_kernel", 15000, 16000)]
    path = draw_timeline(step, tmp_path / "step.png", "fsdp2:MoFaSGD:r=32, 4096x2")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="empty"):
        draw_timeline([], tmp_path / "none.png", "nothing")
